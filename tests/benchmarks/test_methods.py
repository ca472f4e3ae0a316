"""python -m benchmarks.methods: its numbers against attention written out, its rows and dials."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sparse_video_attention.kernels import BlockPlan, TokenLayout, available, registry
from sparse_video_attention.kernels.registry import KernelCall
from sparse_video_attention.patching import router
from sparse_video_attention.patching.speed import SpeedCheck
from sparse_video_attention.sparge import SpargePolicy

from benchmarks import method_list
from benchmarks.grids import FRAME_GRIDS, GRID_SHAPES, find_grid_shape
from benchmarks.left_out import is_left_out, leave_out_kernels
from benchmarks.method_call import MethodCall
from benchmarks.method_list import DIALS, DialDensity, methods, nearest_setting
from benchmarks.methods import main
from benchmarks.shapes import SHAPES
from benchmarks.stages import OTHER, STAGES
from benchmarks.structured import structured_inputs

from .written_out import attention_over_levels, attention_row

# Ragged last blocks of every size, and text in the first block.
WAN, COGVIDEOX = "8x8x9:2x32", "20+8x8x9:2x32"
PSA_NAMES = {
    WAN: [
        "psa Wan2.1_14b/psa_balanced",
        "psa Wan2.1_1.3b/psa_balanced",
        "psa Wan2.1_1.3b/psa_topk",
        "psa Wan2.2_A14B/psa_balanced",
        "psa Wan2.2_5B/psa_balanced",
    ],
    COGVIDEOX: [
        "psa CogVideo1.5_5b/psa_balanced",
        "psa CogVideo_5b/psa_balanced",
        "psa CogVideo_5b/psa_4steps",
    ],
}
OTHER_NAMES = ["radial", "radial pool", "sparge raster", "sparge raster pool"]
OTHER_NAMES += [
    "sparge group means 0.2 pool",
    "sparge Gilbert",
    "sparge Gilbert pool",
    "sparge group means 0.2 weighted pool",
    "sparge group means 0.12 weighted pool 64x32",
    "sparge group means 0.2 weighted pool 128x32",
]
OTHER_NAMES += ["radial 64 pool"]
CASES = [
    (shape, name)
    for shape, presets in PSA_NAMES.items()
    for name in [*OTHER_NAMES, *presets, *(f"{preset} pool" for preset in presets)]
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run of the command wrote, its folder, and the global generator before and after."""
    out = tmp_path_factory.mktemp("results")
    before = torch.get_rng_state()
    main(["--device", "cpu", "--shapes", WAN, COGVIDEOX, "--repeats", "3", "--out", str(out)])
    after = torch.get_rng_state()
    (path,) = out.glob("cpu-*/methods.json")
    return json.loads(path.read_text(encoding="utf-8")), path.parent, (before, after)


@pytest.fixture(scope="module")
def rows(run):
    return {(row["shape"], row["method"]): row for row in run[0]["rows"]}


def case(shape_name, method_name):
    """The shape, the method's policy, and the benchmark's inputs [1, H, N, D] in fp64."""
    shape = find_grid_shape(shape_name)
    (policy,) = [m.policy for m in methods(shape.model_family) if m.name == method_name]
    inputs = structured_inputs(shape.layout, shape.heads, shape.head_dim)
    q, k, v = (x.double() for x in inputs.heads_first())
    return shape, policy, q, k, v


def test_kernels_to_do_without_are_chosen_by_nothing(monkeypatch):
    monkeypatch.setattr(registry, "_KERNELS", dict(registry.kernels()))
    monkeypatch.setenv("BENCHMARK_WITHOUT", "triton hopper:pooled")
    leave_out_kernels()
    assert "triton" not in available() and {"torch", "hopper"} <= set(available())
    assert is_left_out("triton", pooled=True) and is_left_out("hopper", pooled=True)
    assert not is_left_out("hopper") and not is_left_out("torch", pooled=True)
    q = torch.zeros(1, 1, 64, 64)
    levels = torch.tensor([[1, 2]], dtype=torch.int8)
    plan = BlockPlan.from_levels(levels, block_m=64, block_n=32, q_len=64, k_len=64)
    refused = registry.kernels()["hopper"].refuses(KernelCall(q, q, q, plan, 0.1))
    assert refused == "BENCHMARK_WITHOUT leaves it out for pooled plans"


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("without", ["", "hopper:pooled"])
@pytest.mark.parametrize("shape_name", [WAN, COGVIDEOX])
def test_pooled_methods_also_run_on_the_hopper_kernel(shape_name, without, hopper, monkeypatch):
    reason = None if hopper else "no such device"
    monkeypatch.setattr(method_list, "unavailable_reason", lambda name: reason)
    monkeypatch.setenv("BENCHMARK_WITHOUT", without)
    listed = list(methods(find_grid_shape(shape_name).model_family))
    by_name = [m for m in listed if m.kernel != "auto"]
    pooled = [
        "radial",
        "radial 64",
        "sparge raster",
        "sparge Gilbert",
        "sparge group means 0.2 weighted",
        "sparge group means 0.2",
    ]
    pooled += PSA_NAMES[shape_name]
    expected = {(f"{name} pool hopper", "hopper") for name in pooled}
    assert {(m.name, m.kernel) for m in by_name} == (expected if hopper and not without else set())
    names = [m.name for m in listed]
    for name, _ in expected & {(m.name, m.kernel) for m in by_name}:
        assert names[names.index(name) - 1] == name.removesuffix(" hopper")


@pytest.mark.parametrize(("shape_name", "name"), CASES, ids=lambda text: text.replace(" ", "-"))
def test_error_and_density_are_those_of_attention_written_out(rows, shape_name, name):
    shape, policy, q, k, v = case(shape_name, name)
    order = policy.order(shape.layout)
    order = torch.arange(shape.layout.num_tokens) if order is None else order
    ordered_q, ordered_k, ordered_v = (x[:, :, order] for x in (q, k, v))
    scale = shape.head_dim**-0.5
    plan = policy.plan(ordered_q.float(), ordered_k.float(), shape.layout, layer=1, scale=scale)
    levels = plan.to_levels().expand(1, shape.heads, -1, -1)[0]

    row = rows[shape_name, name]
    density = np.mean([0.0 if level == 0 else 1 / level for level in levels.flatten().tolist()])
    assert row["density"] == pytest.approx(density, rel=1e-5)

    sparse, dense = torch.empty_like(q[0]), torch.empty_like(q[0])
    for head in range(shape.heads):
        sparse[head, order] = attention_over_levels(
            ordered_q[0, head],
            ordered_k[0, head],
            ordered_v[0, head],
            levels[head],
            plan.block_m,
            plan.block_n,
            plan.pool_rows,
        )
        dense[head] = attention_row(q[0, head], [*k[0, head]], [*v[0, head]], [0.0] * k.shape[2])
    error = float((sparse - dense).norm() / dense.norm())
    assert row["rel_l2"] == pytest.approx(error, rel=1e-3)
    assert 1e-3 < error < 1.0


def test_every_method_has_one_row_and_every_preset_its_three_of_equal_density(run, rows):
    assert len(rows) == len(run[0]["rows"])
    own = {key for key, row in rows.items() if row["equal_to"] is None}
    assert own == set(CASES)
    for shape, presets in PSA_NAMES.items():
        for preset in presets:
            others = [
                row
                for (row_shape, _), row in rows.items()
                if row_shape == shape and row["equal_to"] == preset
            ]
            assert [row["method"] for row in others] == [
                f"{dial.name} as {preset}" for dial in DIALS
            ]
            for row in others:
                difference = row["density"] - rows[shape, preset]["density"]
                assert row["density_difference"] == pytest.approx(difference, abs=1e-9)
                assert row["call_ms"] is None


@pytest.mark.parametrize(("shape_name", "name"), CASES, ids=lambda text: text.replace(" ", "-"))
def test_times_of_a_method_add_up(run, rows, shape_name, name):
    row = rows[shape_name, name]
    assert sum(row["shares"].values()) == pytest.approx(1.0)
    assert sum(row["stages_ms"].values()) == pytest.approx(row["call_ms"])
    assert sorted(row["samples_ms"])[1] == pytest.approx(row["call_ms"], abs=1e-5)
    assert row["call_ms"] / row["stages_ms"]["kernel"] == pytest.approx(row["call_over_kernel"])
    for stage, share in row["shares"].items():
        assert share * row["call_ms"] == pytest.approx(row["stages_ms"][stage])
    (dense_ms,) = [s["dense_ms"] for s in run[0]["shapes"] if s["shape"] == shape_name]
    assert dense_ms / row["call_ms"] == pytest.approx(row["speedup"])


@pytest.mark.parametrize(("shape_name", "name"), CASES, ids=lambda text: text.replace(" ", "-"))
def test_a_method_has_the_stages_of_its_policy(rows, shape_name, name):
    expected = {"kernel", OTHER}
    by_default = "group means" in name
    in_order = name.startswith("psa") and "CogVideo_5b" not in name
    if by_default or in_order or "Gilbert" in name:
        expected |= {"permutation"}
    if not name.startswith("radial"):
        expected |= {"importance", "levels", "lists"}
    if name.startswith("psa Wan2.1_1.3b/psa_balanced"):
        expected |= {"similarity cap"}
    found = set(rows[shape_name, name]["stages_ms"])
    if name.startswith("psa") or name.endswith("pool"):
        assert "pooling" in found
    # A kernel may go through its pooling with nothing to pool.
    assert found - {"pooling"} == expected
    assert found <= set(STAGES)


@pytest.mark.parametrize("wanted", [0.1, 0.37, 0.5, 0.93])
@pytest.mark.parametrize("dial", DIALS, ids=lambda dial: dial.name.replace(" ", "-"))
def test_no_other_setting_is_nearer_to_a_density(dial, wanted):
    layout = TokenLayout(6, 12, 16)
    inputs = structured_inputs(layout, 1, 32)
    density_of = DialDensity(dial, layout, inputs)
    chosen = nearest_setting(density_of, wanted, dial.low, dial.high)
    everywhere = np.linspace(dial.low, dial.high, 60)
    nearest = min(abs(density_of(float(setting)) - wanted) for setting in everywhere)
    assert abs(density_of(chosen) - wanted) <= nearest + 1e-6


def test_density_of_a_dial_is_that_of_its_plan():
    layout = TokenLayout(6, 12, 16)
    inputs = structured_inputs(layout, 2, 32)
    q, k, _ = inputs.heads_first()
    plan = SpargePolicy(topk=0.4).plan(q, k, layout, layer=1, scale=32**-0.5)
    (dial,) = [dial for dial in DIALS if dial.name == "sparge raster"]
    assert DialDensity(dial, layout, inputs)(0.4) == plan.density()


def test_inputs_are_repeatable_and_leave_the_global_generator_alone(run):
    layout = TokenLayout(2, 5, 7, prefix_tokens=3)
    first, again, other = (structured_inputs(layout, 2, 32, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert not torch.equal(first.q, other.q)
    before, after = run[2]
    assert torch.equal(before, after)


def test_header_inputs_and_picture_are_written(run):
    written, folder, _ = run
    assert written["header"]["torch"] == torch.__version__
    assert "smooth fields" in written["inputs"]["what"] and written["inputs"]["PLACE_LOGIT"] > 0
    assert written["repeats"] == 3 and written["clock"] == "wall time"
    assert [shape["shape"] for shape in written["shapes"]] == [WAN, COGVIDEOX]
    for shape in written["shapes"]:
        assert 0.3 < shape["top_tenth_mass"] < 0.999
        assert shape["dense_rel_l2"] < 1e-5
    picture = Image.open(folder / "methods.png")
    assert picture.width > 1000 and len(picture.convert("P").getcolors()) > 10


def test_errors_only_takes_no_times(run, tmp_path):
    main(["--device", "cpu", "--shapes", WAN, "--errors-only", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("cpu-*/*.json")
    assert path.name == "method_errors.json" and path.with_suffix(".png").is_file()
    written = json.loads(path.read_text(encoding="utf-8"))
    assert all(row["call_ms"] is None and row["stages_ms"] is None for row in written["rows"])
    timed = {row["method"]: row["rel_l2"] for row in run[0]["rows"] if row["shape"] == WAN}
    assert {row["method"]: row["rel_l2"] for row in written["rows"]} == pytest.approx(timed)


def test_grids_fit_the_shapes_and_wrong_ones_are_named():
    for name, (height, width) in FRAME_GRIDS.items():
        assert height * width == SHAPES[name].tokens_per_frame
        assert GRID_SHAPES[name].layout.num_tokens == SHAPES[name].tokens
    with pytest.raises(SystemExit, match="21x30x52:12x128.*got '3x13:2x32'"):
        main(["--device", "cpu", "--shapes", "3x13:2x32"])


@pytest.mark.gpu
def test_times_on_a_gpu_add_up(tmp_path):
    # Of all precisions and settings of equal density it would compile over a hundred kernels.
    size = ["--shapes", "9x16x24:4x64", "--repeats", "3", "--times-only", "--precisions", "native"]
    main([*size, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*/methods.json")
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        if row["equal_to"] is None:
            assert sum(row["shares"].values()) == pytest.approx(1.0)
            assert row["call_ms"] > row["stages_ms"]["kernel"] > 0


@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_every_method_runs_where_calls_are_timed_before(precision, monkeypatch):
    """As on a GPU, where a call's first run compares what may run it."""
    monkeypatch.setattr(router, "can_be_timed", lambda device: True)
    timed = []
    compare = SpeedCheck.compare

    def counted(*args):
        timed.append(args)
        return compare(*args)

    monkeypatch.setattr(SpeedCheck, "compare", counted)
    shape = find_grid_shape(WAN)
    inputs = structured_inputs(shape.layout, shape.heads, shape.head_dim)
    for method in methods(shape.model_family, [precision]):
        call = MethodCall(method.policy, shape.layout, inputs, method.precision, method.kernel)
        assert call.run().isfinite().all() and call.record().reason is None
    assert timed
