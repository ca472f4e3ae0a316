"""How much faster a run can be, by operations alone: what the README says before any times.

Counted as Preview Attention Mask counts: linear layers and attention of all steps, each operation
taking as long as any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.patching.layout import WAN
from sparse_video_attention.patching.operations import LayerOperations, layer_operations
from sparse_video_attention.patching.settings import SparsePolicy
from sparse_video_attention.psa import PsaPolicy, load_presets
from sparse_video_attention.radial_attn import RadialPolicy

from .markdown import table
from .node_defaults import SPARGE_POLICY

WAN_14B = SimpleNamespace(dim=5120, ffn_dim=13824, blocks=range(40))
TEXT_TOKENS = 512
STEPS = 20
SIZES = {"832x480": TokenLayout(21, 30, 52), "1280x720": TokenLayout(21, 45, 80)}


@dataclass(frozen=True)
class Row:
    """A node's settings.

    Attributes:
        dense_layers, dense_steps: how many; of the steps those of a sampler of STEPS.
    """

    node: str
    policy: SparsePolicy
    dense_layers: int
    dense_steps: int


def rows() -> Iterator[Row]:
    """The nodes at their defaults, and what makes them faster."""
    yield Row("Sparge at its defaults", SPARGE_POLICY, 1, 1)
    yield Row("Sparge, `topk` 0.2", replace(SPARGE_POLICY, topk=0.2), 1, 1)
    preset = load_presets()["Wan2.1_1.3b"]["psa_topk"]
    psa = PsaPolicy.from_preset(preset, skipped_blocks="pool")
    yield Row("PSA, `preset` Wan2.1_1.3b/psa_topk", psa, 1, STEPS // 4)
    yield Row("the same, `warmup_steps` 1", psa, 1, 1)
    yield Row("Radial at its defaults", RadialPolicy(), 1, STEPS // 4)


def density(policy: SparsePolicy, layout: TokenLayout) -> float:
    """Of a call.

    Raises:
        ValueError: only a call can tell.
    """
    known = policy.forecast(layout)
    if isinstance(known, str):
        raise ValueError(known)
    return known[0].density()


def layer(layout: TokenLayout) -> LayerOperations:
    """Of WAN 14B."""
    return layer_operations(WAN_14B, WAN, layout.num_tokens, TEXT_TOKENS)


def speedup(row: Row, layout: TokenLayout) -> float:
    """Of STEPS steps, over dense ones."""
    layers = len(WAN_14B.blocks)
    sparse = (STEPS - row.dense_steps) / STEPS * (layers - row.dense_layers) / layers
    return layer(layout).speedup(sparse * (1 - density(row.policy, layout)))


def counted_table() -> str:
    """By node, for the README."""
    shares = " and ".join(
        f"{100 * layer(at).attention_share:.0f} % at {size}" for size, at in SIZES.items()
    )
    lines = [
        (
            row.node,
            ", ".join(dict.fromkeys(f"{density(row.policy, at):.2f}" for at in SIZES.values())),
            str(row.dense_steps),
            *(f"{speedup(row, at):.1f}x" for at in SIZES.values()),
        )
        for row in rows()
    ]
    head = ["node", "density at each size", "dense steps", *SIZES]
    return (
        f"Attention is only part of a step: of a dense one of WAN 14B, with 81 frames, {shares} of "
        "the operations. A sparse call computes the share of it under *density*, and some steps "
        "stay dense. By that count, which *Preview Attention Mask* makes for your settings, "
        f"{STEPS} steps become this much faster:\n\n{table(head, lines)}"
    )
