"""The settings whose quality is measured: nodes' inputs, grouped into curves over density."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from sparse_video_attention.psa import load_presets

from .fine_blocks import SCALE
from .node_defaults import CLOSEST_PRESETS
from .quality_setting import Setting

METHODS = ("radial", "psa", "sparge")
STEPS = 12
QUARTER = STEPS // 4
# First and last denoising steps that stay dense, of few.
FEW_DENSE = ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1))
# Their blocks are smaller than the nodes'.
FRAMES = "frames"
FINE_GRIDS = ("fine", "fine_few_steps", FRAMES)
GRIDS = ("small", "full", "few_steps", "ends", *FINE_GRIDS)
PUBLISHED_BLOCKS = {"block_order": "raster", "skipped_blocks": "drop"}
ALL_LAYERS = {"dense_layers": ""}
# Sparge's default schedule, where a setting differs in other inputs alone; and none of it dense.
LAST_DENSE = {"dense_timesteps": 0, "last_dense_timesteps": -1}
NO_STEP_DENSE = {"dense_timesteps": 0, "last_dense_timesteps": 0}
NONE_DENSE = NO_STEP_DENSE | ALL_LAYERS
# Of a miniature's large blocks few are alike; without this nearly all would be kept.
ALIKE = {"simthreshd1": -1.0}
# As published, and what grids of the nodes' own blocks are measured with.
BLOCK_MEANS = {"block_scores": "block means"}
# Sparge's means and scores before they went by the queries nearby and by groups of tokens.
PLAIN = {"skipped_blocks": "pool"} | BLOCK_MEANS
# Ends the name of a curve whose settings do not take turns with the mirrored order.
ONE_ORDER = " one order"
# End the names of curves whose settings differ in more than one dial.
UNLIKE = (" choices", " presets")


def _radial(full: bool) -> Iterator[Setting]:
    decays = (0.05, 0.1, 0.2, 0.5, 1.0) if full else (0.05, 0.2, 1.0)
    for skipped in ("drop", "pool"):
        for block in (64, 128):
            for decay in decays:
                own = {"block_size": block, "decay_factor": decay, "skipped_blocks": skipped}
                yield Setting("radial", f"radial {block} {skipped}", own)


def _psa_presets(family: str) -> Iterator[tuple[str, str]]:
    """("section/preset", its mask_mode)."""
    wanted = "cog" if family == "cogvideox" else "wan"
    for section, presets in load_presets().items():
        if section.lower().startswith(wanted):
            for name, preset in presets.items():
                if preset.type == "psa":
                    yield f"{section}/{name}", preset.mask_mode


def _psa(family: str) -> Iterator[Setting]:
    for preset, mask_mode in _psa_presets(family):
        # The same layers and steps dense as for the other methods' curves.
        schedule = {"dense_layers": "0", "warmup_steps": QUARTER}
        for skipped in ("drop", "pool"):
            own = {"preset": preset, "skipped_blocks": skipped}
            yield Setting("psa", f"psa {mask_mode} {skipped}", own, schedule)


def _sparge(full: bool) -> Iterator[Setting]:
    shares = (0.1, 0.2, 0.3, 0.5, 0.7) if full else (0.2, 0.5)
    for order in ("raster", "Gilbert"):
        for skipped in ("drop", "pool"):
            for share in shares:
                chosen = {"block_order": order, "skipped_blocks": skipped}
                own = {"topk": share} | chosen | ALIKE
                yield Setting("sparge", f"sparge {order} {skipped}", own)
    if full:
        for threshold in (0.3, 0.6, 0.9):
            own = {"cdfthreshd": threshold} | PUBLISHED_BLOCKS | ALIKE
            yield Setting("sparge", "sparge by sum", own)


def _one_order(settings: Iterable[Setting]) -> Iterator[Setting]:
    """Of the settings given: those that move tokens, without the mirrored order.

    Pooled ones alone: those are what PSA's node does unless told otherwise.
    """
    presets = load_presets()
    for setting in settings:
        section, _, name = setting.own.get("preset", "").partition("/")
        moves = setting.own.get("block_order") == "Gilbert"
        moves |= bool(name) and presets[section][name].token_order is not None
        if moves and setting.own["skipped_blocks"] == "pool":
            curve = f"{setting.curve}{ONE_ORDER}"
            yield replace(setting, curve=curve, policy={"alternate_orders": False})


def _by_block_means(settings: Iterable[Setting]) -> Iterator[Setting]:
    """The settings given, with Sparge's scores as published but for its defaults."""
    for setting in settings:
        pinned = setting.method == "sparge" and setting != Setting("sparge", "sparge defaults")
        instead = BLOCK_MEANS if "skipped_blocks" in setting.own else PLAIN
        yield replace(setting, policy=setting.policy | instead) if pinned else setting


def _published() -> Iterator[Setting]:
    """What the nodes do otherwise than published: Sparge's blocks, PSA's dense first layer."""
    own = {"topk": 0.5} | PUBLISHED_BLOCKS
    yield Setting("sparge", "sparge published", own, policy=BLOCK_MEANS)
    yield Setting("psa", "psa all layers", schedule=ALL_LAYERS)


def _defaults() -> Iterator[Setting]:
    """The nodes as they are dragged in."""
    for method in METHODS:
        yield Setting(method, f"{method} defaults")


def _few_steps(family: str) -> Iterator[Setting]:
    """What schedules of few steps need: which of them dense, and which preset of PSA."""
    bases = [Setting(method, method) for method in ("radial", "sparge")]
    for base in bases:
        for first, last in FEW_DENSE:
            schedule = {"dense_timesteps": first, "last_dense_timesteps": last}
            yield replace(base, curve=f"{base.method} few", schedule=schedule)
    for preset, _ in _psa_presets(family):
        for first, last in FEW_DENSE:
            schedule = {"warmup_steps": first, "last_dense_timesteps": last} | ALL_LAYERS
            yield Setting("psa", f"psa few {preset}", {"preset": preset}, schedule)


def _ends(steps: int) -> Iterator[Setting]:
    """Whether one more dense step does more at the beginning or at the end of a schedule."""
    quarter = max(1, steps // 4)
    own = {"radial": {}, "sparge": {"topk": 0.5} | PUBLISHED_BLOCKS}
    for first, last in ((quarter, 0), (quarter + 1, 0), (quarter, 1), (quarter - 1, 1)):
        schedule = {"dense_timesteps": first, "last_dense_timesteps": last}
        for method in ("radial", "sparge"):
            yield Setting(method, f"{method} ends", own[method], schedule)
        warmup = {"warmup_steps": first, "last_dense_timesteps": last} | ALL_LAYERS
        yield Setting("psa", "psa ends", schedule=warmup)


def _schedules(full: bool) -> Iterator[Setting]:
    """One method with other steps and layers dense, and in 8 bits."""
    base = Setting("sparge", "", {"topk": 0.2} | PUBLISHED_BLOCKS | ALIKE)
    for steps in (0, 1, 2, 4, 8) if full else (0, 4):
        yield replace(base, curve="dense_timesteps", schedule={"dense_timesteps": steps})
    for layers in ("", "0", "1", "-1", "0, -1") if full else ("", "0", "-1"):
        yield replace(base, curve="dense_layers", schedule={"dense_layers": layers})
    if full:
        for steps in (0, 1, 2):
            yield replace(base, curve="last_dense", schedule={"last_dense_timesteps": steps})
    for precision in ("native", "int8"):
        yield replace(base, curve="precision", schedule={"precision": precision})


def _in_fine_blocks(family: str) -> Iterator[Setting]:
    """Every method, the choices that matter most at the block counts of real models."""
    yield from _defaults()
    yield from _published()
    own = {"topk": 0.5} | PUBLISHED_BLOCKS
    yield Setting("sparge", "sparge published, none dense", own, NONE_DENSE, BLOCK_MEANS)
    for preset, _ in _psa_presets(family):
        quarter = {"warmup_steps": QUARTER}
        yield Setting("psa", "psa presets", {"preset": preset}, quarter)
        yield Setting("psa", "psa all layers presets", {"preset": preset}, quarter | ALL_LAYERS)
    section, preset = CLOSEST_PRESETS[family]
    closest = {"preset": f"{section}/{preset}", "skipped_blocks": "weighted"}
    yield Setting("psa", "psa weighted presets", closest, {"warmup_steps": QUARTER})
    for share in (0.1, 0.2, 0.3, 0.5):
        yield Setting("sparge", "sparge topk", {"topk": share})
        yield Setting("sparge", "sparge plain topk", {"topk": share}, policy=PLAIN)
    for share in (0.1, 0.3, 0.5):
        yield Setting("sparge", "sparge topk last dense", {"topk": share}, LAST_DENSE)
    smaller = {"128x32": (0.1, 0.2), "64x32": (0.06, 0.1, 0.12, 0.18, 0.2, 0.3)}
    for shape, shares in smaller.items():
        for share in shares:
            own = {"topk": share, "block_shape": shape}
            yield Setting("sparge", f"sparge {shape} last dense", own, LAST_DENSE)
    choices = (("Gilbert", "drop"), ("Gilbert", "pool"), ("raster", "weighted"))
    for order, skipped in choices:
        own = {"topk": 0.2, "block_order": order, "skipped_blocks": skipped}
        yield Setting("sparge", "sparge choices", own)
    for first, last in FEW_DENSE:
        schedule = {"dense_timesteps": first, "last_dense_timesteps": last}
        yield Setting("sparge", "sparge ends", schedule=schedule)
    one_order = {"alternate_orders": False}
    yield Setting("sparge", f"sparge topk{ONE_ORDER}", {"topk": 0.2}, policy=one_order)
    weighted = {"skipped_blocks": "weighted"}
    for own in ({"skipped_blocks": "drop"}, weighted, {"decay_factor": 0.8}):
        yield Setting("radial", "radial choices", own)


def _few_in_fine_blocks(family: str) -> Iterator[Setting]:
    """Which of few steps to keep dense, at the block counts of real models."""
    section, preset = CLOSEST_PRESETS[family]
    bases = [
        Setting("sparge", "sparge few"),
        Setting("sparge", "sparge few 0.3", {"topk": 0.3}),
        Setting("radial", "radial few"),
        Setting("psa", "psa few", {"preset": f"{section}/{preset}"}),
    ]
    for base in bases:
        own = "warmup_steps" if base.method == "psa" else "dense_timesteps"
        for first, last in FEW_DENSE:
            yield replace(base, schedule={own: first, "last_dense_timesteps": last})
    for share in (0.1, 0.2):
        smaller = {"topk": share, "block_shape": "64x32"}
        yield Setting("sparge", "sparge few 64x32", smaller, NO_STEP_DENSE)


def _frames() -> Iterator[Setting]:
    """What Sparge needs in frames of fewer blocks."""
    own = {"topk": 0.5} | PUBLISHED_BLOCKS
    yield Setting("sparge", "sparge published", own, policy=BLOCK_MEANS)
    whole = {"halves_in_small_frames": False}
    for share in (0.2, 0.3, 0.5):
        yield Setting("sparge", "sparge last dense", {"topk": share}, LAST_DENSE)
        for order in ("Gilbert", "raster"):
            own = {"topk": share, "block_order": order}
            yield Setting("sparge", f"sparge {order} whole blocks", own, LAST_DENSE, whole)


def settings(family: str, grid: str, steps: int = STEPS, scale: int = SCALE) -> list[Setting]:
    """All of them.

    Args:
        family: "wan" or "cogvideox".
        grid: one of GRIDS; "small", "full", "fine" and "frames" are for STEPS denoising steps.
        steps: of the schedule, to "ends".
        scale: how many times smaller the blocks are, in FINE_GRIDS.

    Raises:
        ValueError: another grid.
    """
    if grid not in GRIDS:
        raise ValueError(f"grid {grid!r}: allowed are {', '.join(GRIDS)}")
    if grid == "few_steps":
        return list(_by_block_means(_few_steps(family)))
    if grid == "ends":
        return list(_by_block_means(_ends(steps)))
    if grid in FINE_GRIDS:
        fine = {"fine": _in_fine_blocks, "fine_few_steps": _few_in_fine_blocks}
        ours = fine[grid](family) if grid in fine else _frames()
        return [replace(setting, block_scale=scale) for setting in ours]
    full = grid == "full"
    choosing = [*_psa(family), *_sparge(full)]
    chosen = [
        *_defaults(),
        *_published(),
        *_radial(full),
        *choosing,
        *_one_order(choosing),
        *_schedules(full),
    ]
    return list(_by_block_means(chosen))
