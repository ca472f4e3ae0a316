"""How much faster a run can be, by operations alone: what the README says before any times.

Counted as Preview Attention Mask counts: linear layers and attention of all steps, each operation
taking as long as any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.patching.layout import COGVIDEOX, WAN
from sparse_video_attention.patching.operations import LayerOperations, layer_operations
from sparse_video_attention.patching.schedule import Schedule
from sparse_video_attention.patching.settings import SparsePolicy, as_close_of
from sparse_video_attention.psa import PsaPolicy, load_presets
from sparse_video_attention.radial_attn import RadialPolicy

from .markdown import table
from .node_defaults import CLOSEST_PRESETS, SPARGE_POLICY

WAN_TEXT, COGVIDEOX_TEXT = 512, 226
DENSE_LAYERS = frozenset({0})


@dataclass(frozen=True)
class Model:
    """What counts of a network.

    Attributes:
        ffn_dim: of WAN's; CogVideoX's follows from dim.
    """

    name: str
    family: str
    dim: int
    layers: int
    ffn_dim: int = 0


WAN_14B = Model("WAN 14B", WAN, 5120, 40, 13824)
WAN_1_3B = Model("WAN 2.1 1.3B", WAN, 1536, 30, 8960)
WAN_5B = Model("WAN 2.2 5B", WAN, 3072, 30, 14336)
COGVIDEOX_1_5 = Model("CogVideoX 1.5 5B", COGVIDEOX, 3072, 42)


@dataclass(frozen=True)
class Run:
    """A video and the steps it takes.

    Attributes:
        video: WIDTHxHEIGHTxFRAMES.
        layout: its tokens.
    """

    model: Model
    video: str
    layout: TokenLayout
    steps: int

    def layer(self) -> LayerOperations:
        """Of the model's layers, one."""
        return layer_operations(self.model, self.model.family, self.layout.num_tokens, WAN_TEXT)


@dataclass(frozen=True)
class Node:
    """A node's settings.

    Attributes:
        in_halves: in smaller blocks, as on GPUs that run them faster.
        dense_timesteps, last_dense_timesteps: as in the node; -1 of the first also stands for the
            warm-up of PSA's presets, 15 steps, in place of which up to 30 have a quarter dense.
    """

    name: str
    policy: SparsePolicy
    dense_timesteps: int
    last_dense_timesteps: int = 0
    in_halves: bool = False

    def density(self, layout: TokenLayout) -> float:
        """Of a call."""
        other = as_close_of(self.policy, layout) if self.in_halves else None
        return density(self.policy if other is None else other[0], layout)

    def dense_steps(self, steps: int) -> int:
        schedule = Schedule(DENSE_LAYERS, self.dense_timesteps, self.last_dense_timesteps)
        return schedule.first_dense_steps(steps) + schedule.last_dense_steps(None)


def runs() -> Iterator[Run]:
    """What people make; of four steps those of WAN 2.2's two experts together."""
    small, large = TokenLayout(21, 30, 52), TokenLayout(21, 45, 80)
    for steps in (20, 4):
        yield Run(WAN_14B, "832x480x81", small, steps)
        yield Run(WAN_14B, "1280x720x81", large, steps)
    yield Run(WAN_1_3B, "832x480x81", small, 20)
    yield Run(WAN_5B, "1280x704x121", TokenLayout(31, 22, 40), 20)
    # A token of CogVideoX 1.5 is two latent frames.
    text_first = TokenLayout(11, 48, 85, prefix_tokens=COGVIDEOX_TEXT)
    yield Run(COGVIDEOX_1_5, "1360x768x81", text_first, 30)


def nodes(family: str) -> Iterator[Node]:
    """The nodes at their defaults, and what makes them faster."""
    yield Node("Sparge at its defaults", SPARGE_POLICY, 0, -1)
    yield Node("where smaller blocks are faster", SPARGE_POLICY, 0, -1, in_halves=True)
    yield Node("`topk` 0.3", replace(SPARGE_POLICY, topk=0.3), 0, -1)
    yield Node("`topk` 0.5", replace(SPARGE_POLICY, topk=0.5), 0, -1)
    yield Node("`topk` 0.3, no dense steps", replace(SPARGE_POLICY, topk=0.3), 0)
    section, name = CLOSEST_PRESETS[family.lower()]
    preset = load_presets()[section][name]
    psa = PsaPolicy.from_preset(preset, skipped_blocks="pool")
    yield Node("PSA, closest preset", psa, -1)
    yield Node("Radial at its defaults", RadialPolicy(), -1)


def density(policy: SparsePolicy, layout: TokenLayout) -> float:
    """Of a call.

    Raises:
        ValueError: only a call can tell.
    """
    known = policy.forecast(layout)
    if isinstance(known, str):
        raise ValueError(known)
    return known[0].density()


def speedup(run: Run, node: Node) -> float:
    """Of all steps, over dense ones."""
    layers, steps = run.model.layers, run.steps
    dense_steps = node.dense_steps(steps)
    sparse = (steps - dense_steps) / steps * (layers - len(DENSE_LAYERS)) / layers
    return run.layer().speedup(sparse * (1 - node.density(run.layout)))


def counted_table() -> str:
    """By run and node, for the README."""
    lines = [
        (
            f"{run.model.name}, {run.video}",
            str(run.steps),
            f"{100 * run.layer().attention_share:.0f} %",
            *(f"{speedup(run, node):.1f}x" for node in nodes(run.model.family)),
        )
        for run in runs()
    ]
    names = [node.name for node in nodes(WAN)]
    return table(["video", "steps", "attention", *names], lines)
