"""What is trained, on what, for how long: one frozen record per family and budget."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Some steps on clips of one size.

    Attributes:
        steps: of the optimiser.
        clips: per step.
        frames, height, width: of a clip, in latent pixels.
        variety, placement: of the scenes, 0 to 1 (`draw_scene`).
        stored: share of clips that show one of the stored prompts (`PROMPTS`), 0 to 1.
        hardest: share of these that show `HARDEST` instead, 0 to 1.
        word, word_share: of the rest so many show one of the stored prompts that have this word,
            a share of 0 to 1.
        train_shift: WAN's, None for the recipe's.
    """

    steps: int
    clips: int
    frames: int
    height: int
    width: int
    variety: float = 1.0
    placement: float = 1.0
    stored: float = 0.0
    hardest: float = 0.0
    word: str = ""
    word_share: float = 0.0
    train_shift: float | None = None

    @property
    def tokens(self) -> int:
        """Per clip."""
        return self.frames * (self.height // 2) * (self.width // 2)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the trained weights, but for rounding.

    Attributes:
        family: "wan" or "cogvideox".
        dim, ffn_dim, num_layers: of the model; CogVideoX always has an ffn_dim of 4 dim.
        stages: one after the other; clips grow, since attention is relative and carries over.
        matrix_lr: of Muon, for the matrices of the blocks.
        vector_lr: of AdamW, for everything else.
        warmup, cooldown: steps over which the rates rise from 0 and, at the end, fall to 0.
        train_shift: where noise levels are drawn: WAN samples at shift 8 (ComfyUI's default),
            which leaves few steps for detail, so training looks at detail more, unless a stage says
            otherwise.
        unseen_weight: of the loss in latent directions that are no colour.
        dropped_prompts: share of clips that are trained with the empty prompt.
        ema_steps: over how many steps weights are averaged.
        seed: of weights, clips and noise.
    """

    family: str
    dim: int
    ffn_dim: int
    num_layers: int
    stages: tuple[Stage, ...]
    matrix_lr: float = 0.02
    vector_lr: float = 1.5e-3
    warmup: int = 40
    cooldown: int = 200
    train_shift: float = 4.0
    unseen_weight: float = 0.05
    dropped_prompts: float = 0.1
    ema_steps: int = 200
    seed: int = 1

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage that a step belongs to.

        Raises:
            ValueError: the recipe has no such step.
        """
        left = step
        for stage in self.stages:
            if left < stage.steps:
                return stage
            left -= stage.steps
        raise ValueError(f"step {step}: the recipe has {self.steps}")

    def learning_rate(self, step: int, first_step: int = 0) -> float:
        """Between 0 and 1, times matrix_lr and vector_lr; it rises from first_step on."""
        rising = min(1.0, (step - first_step + 1) / self.warmup) if self.warmup else 1.0
        falling = min(1.0, (self.steps - step) / self.cooldown) if self.cooldown else 1.0
        return rising * falling
