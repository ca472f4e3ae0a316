"""Which methods are measured, and radial and Sparge settings of equal density."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.kernels.registry import unavailable_reason
from sparse_video_attention.patching.settings import SparsePolicy
from sparse_video_attention.psa import PsaPolicy, PsaPreset, load_presets
from sparse_video_attention.radial_attn import RadialPolicy
from sparse_video_attention.radial_attn.mask import MAX_DECAY_FACTOR
from sparse_video_attention.sparge import SpargePolicy

from .left_out import is_left_out
from .method_call import LAYER, MethodCall
from .node_defaults import SPARGE_POLICY
from .structured import AttentionInputs

# Halvings of a setting's range when a density is looked for.
BISECTIONS = 10
# Ends the name of a method whose skipped blocks are pooled, the default of all nodes.
POOLED = " pool"
HOPPER = "hopper"
# With the policy of the node's defaults, in whole blocks: halves have a row of their own.
SPARGE_DEFAULT = f"sparge group means 0.2 weighted{POOLED}"


@dataclass(frozen=True)
class Method:
    """A policy to measure.

    Attributes:
        name: in tables.
        equal_to: the preset whose density its setting was chosen for; such a method is not timed.
        precision, kernel: as in kernels.block_sparse_attention; part of the name unless "auto".
    """

    name: str
    policy: SparsePolicy
    equal_to: str | None = None
    precision: str = "auto"
    kernel: str = "auto"


def methods(model_family: str, precisions: Iterable[str] = ("auto",)) -> Iterator[Method]:
    """Radial, Sparge and the presets of the sections that begin with model_family.

    Where hopper runs, also every pooled method on it, which "auto" does not choose, right after the
    one by "auto": a GPU's clocks wander.
    """
    hopper = unavailable_reason(HOPPER) is None and not is_left_out(HOPPER, pooled=True)
    for precision in precisions:
        for method in _methods(model_family):
            if precision != "auto":
                yield replace(method, name=f"{method.name} {precision}", precision=precision)
                continue
            yield method
            if hopper and method.name.endswith(POOLED):
                yield replace(method, name=f"{method.name} {HOPPER}", kernel=HOPPER)


def _methods(model_family: str) -> Iterator[Method]:
    # The most telling first, for runs that are cut short.
    yield Method("radial pool", RadialPolicy())
    whole = replace(SPARGE_POLICY, halves_if_faster=False)
    yield Method(SPARGE_DEFAULT, whole)
    yield Method("radial", RadialPolicy(skipped_blocks="drop"))
    yield Method("sparge raster", SpargePolicy())
    for label, preset in _presets(model_family):
        pooling = PsaPolicy.from_preset(preset, skipped_blocks="pool", label=label)
        yield Method(f"psa {label}{POOLED}", pooling)
    # What the weights of its means take.
    plain = replace(whole, skipped_blocks="pool")
    yield Method(f"sparge group means 0.2{POOLED}", plain)
    # Smaller blocks are as close at a lower topk; what do they take?
    for topk, block_m, block_n in ((0.12, 64, 32), (0.2, 128, 32)):
        shape = {"block_m": block_m, "block_n": block_n, "halves_in_small_frames": False}
        finer = replace(whole, topk=topk, **shape)
        yield Method(f"sparge group means {topk:g} weighted pool {block_m}x{block_n}", finer)
    yield Method("sparge Gilbert", SpargePolicy(block_order="Gilbert"))
    yield Method("sparge raster pool", SpargePolicy(skipped_blocks="pool"))
    gilbert = SpargePolicy(block_order="Gilbert", skipped_blocks="pool")
    yield Method("sparge Gilbert pool", gilbert)
    for label, preset in _presets(model_family):
        yield Method(f"psa {label}", PsaPolicy.from_preset(preset, label=label))
    yield Method("radial 64 pool", RadialPolicy(block_size=64))


def _presets(model_family: str) -> Iterator[tuple[str, PsaPreset]]:
    """("section/preset", the preset)."""
    for section, presets in load_presets().items():
        for name, preset in presets.items():
            if preset.type == "psa" and section.startswith(model_family):
                yield f"{section}/{name}", preset


@dataclass(frozen=True)
class Dial:
    """A method with one setting whose density rises with it, from low to high."""

    name: str
    policy: Callable[[float], SparsePolicy]
    low: float
    high: float


DIALS = (
    Dial("radial", lambda decay: RadialPolicy(128, decay, "drop"), 0.0, MAX_DECAY_FACTOR),
    Dial("sparge raster", lambda topk: SpargePolicy(topk=topk), 0.0, 1.0),
    Dial("sparge Gilbert", lambda topk: SpargePolicy(topk=topk, block_order="Gilbert"), 0.0, 1.0),
)


class DialDensity:
    """The density of a dial's setting on some inputs; every setting is tried once."""

    def __init__(self, dial: Dial, layout: TokenLayout, inputs: AttentionInputs) -> None:
        self._dial, self._layout = dial, layout
        # The setting changes the plan and not the order of the tokens.
        self._q, self._k, _ = MethodCall(dial.policy(dial.low), layout, inputs).prepared()
        self._known: dict[float, float] = {}

    def __call__(self, setting: float) -> float:
        if setting not in self._known:
            self._known[setting] = (
                self._dial.policy(setting)
                .plan(
                    self._q,
                    self._k,
                    self._layout,
                    layer=LAYER,
                    scale=self._q.shape[-1] ** -0.5,
                )
                .density()
            )
        return self._known[setting]


def nearest_setting(
    density_of: Callable[[float], float], wanted: float, low: float, high: float
) -> float:
    """The setting between low and high whose density is nearest to the one wanted.

    Args:
        density_of: (setting) -> density; it must not fall.
    """
    tried = [low, high]
    if density_of(low) < wanted < density_of(high):
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            tried.append(middle)
            low, high = (middle, high) if density_of(middle) < wanted else (low, middle)
    return min(tried, key=lambda setting: abs(density_of(setting) - wanted))


def of_equal_density(
    wanted: Mapping[str, float], layout: TokenLayout, inputs: AttentionInputs
) -> Iterator[Method]:
    """Every dial as near to each density as its setting allows, on these inputs.

    Args:
        wanted: density by the name of the method that has it.
    """
    for dial in DIALS:
        density_of = DialDensity(dial, layout, inputs)
        for name, density in wanted.items():
            setting = nearest_setting(density_of, density, dial.low, dial.high)
            yield Method(f"{dial.name} as {name}", dial.policy(setting), equal_to=name)
