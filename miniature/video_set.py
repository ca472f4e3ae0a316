"""The endless video set: clip `index` of seed `seed` is always the same."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .prompts import Prompt
from .scene import Draw, draw_prompt, draw_scene, render
from .seeds import private_seed


@dataclass(frozen=True)
class VideoSet:
    """Clips of one size.

    Attributes:
        seed: of all of them.
        frames, height, width: of every clip.
        variety, placement: how much scenes differ, 0 to 1 (`draw_scene`); clips begin at any time
            up to 16 placement frames.
    """

    seed: int
    frames: int
    height: int
    width: int
    variety: float = 1.0
    placement: float = 1.0

    def clip(self, index: int, prompt: Prompt | None = None) -> tuple[Prompt, Tensor]:
        """The prompt and the video, fp32 [frames, height, width, 3] between 0 and 1.

        Args:
            prompt: what to show, None for a random choice.
        """
        draw = Draw(private_seed("clip", self.seed, index))
        chosen = draw_prompt(draw)
        shown = chosen if prompt is None else prompt
        scene = draw_scene(shown, draw, self.variety, self.placement)
        start = self.placement * draw.uniform(0.0, 16.0)
        size = {"frames": self.frames, "height": self.height, "width": self.width}
        return scene.prompt, render(scene, start=start, **size)
