"""python -m benchmarks.quality: its numbers, its settings, and what it concludes."""

import argparse
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from sparse_video_attention.kernels import BlockPlan, block_sparse_attention

from benchmarks import quality
from benchmarks.eight_bit import int8_twin
from benchmarks.quality_blocks import block_scale, fine_suffix
from benchmarks.quality_metrics import psnr, ssim
from benchmarks.quality_setting import Setting
from benchmarks.quality_settings import GRIDS, settings
from benchmarks.quality_summary import directions, summarise
from miniature.wan import WanMiniature


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class TestMetrics:
    def test_psnr_of_a_known_error(self):
        video = noise(2, 12, 14, 3)
        assert psnr(video, video + 0.01) == pytest.approx(40.0, abs=1e-3)
        assert psnr(video, video) == math.inf

    def test_ssim_is_its_definition_at_every_pixel(self):
        a, b = noise(1, 13, 12, 3), noise(1, 13, 12, 3, seed=1)
        weights = [math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)]
        total = sum(weights)
        values = []
        for colour in range(3):
            for top in range(3):
                for left in range(2):
                    moments = [0.0] * 5
                    for i in range(11):
                        for j in range(11):
                            w = weights[i] * weights[j] / total**2
                            x = float(a[0, top + i, left + j, colour])
                            y = float(b[0, top + i, left + j, colour])
                            for n, value in enumerate((x, y, x * x, y * y, x * y)):
                                moments[n] += w * value
                    x, y, xx, yy, xy = moments
                    values.append(
                        (2 * x * y + 1e-4)
                        * (2 * (xy - x * y) + 9e-4)
                        / ((x * x + y * y + 1e-4) * (xx - x * x + yy - y * y + 9e-4))
                    )
        assert ssim(a, b) == pytest.approx(sum(values) / len(values), abs=1e-6)
        assert ssim(a, a) == pytest.approx(1.0)

    def test_frames_smaller_than_the_window_are_refused(self):
        with pytest.raises(ValueError, match="SSIM needs at least 11 pixels"):
            ssim(noise(1, 8, 20, 3), noise(1, 8, 20, 3))


def test_blocks_are_as_small_as_a_grid_has_them():
    assert [block_scale(grid, None) for grid in GRIDS] == [1, 1, 1, 1, 8, 8, 8]
    assert block_scale("frames", 2) == 2 and block_scale("fine", 8) == 8
    names = [fine_suffix("small", 1), fine_suffix("fine_few_steps", 8), fine_suffix("frames", 8)]
    assert names == ["", "_fine", "_fine8"], "one file is not written over the other"
    for grid, scale, allowed in (("frames", 3, "2, 4, 8"), ("fine", 4, "8"), ("full", 8, "1")):
        with pytest.raises(ValueError, match=f"allowed with grid {grid} is {allowed}"):
            block_scale(grid, scale)
    assert {s.block_scale for s in settings("wan", "frames", scale=2)} == {2}


def test_an_unknown_grid_is_named():
    with pytest.raises(ValueError, match="grid 'huge': allowed are small, full, few_steps, ends"):
        settings("wan", "huge")


def test_int8_is_offered_on_a_cpu_while_it_is_measured():
    q, k, v = (noise(1, 2, 100, 64, seed=seed) - 0.5 for seed in range(3))
    blocks = torch.ones(2, 4, dtype=torch.bool)
    plan = BlockPlan.from_mask(blocks, block_m=64, block_n=32, q_len=100, k_len=100)
    want = block_sparse_attention(q, k, v, plan)
    with int8_twin():
        out = block_sparse_attention(q, k, v, plan, precision="int8")
        native = block_sparse_attention(q, k, v, plan)
    assert torch.equal(native, want)
    assert 1e-4 < (out - want).norm() / want.norm() < 0.025
    with pytest.raises(ValueError, match="no kernel offers precision 'int8'"):
        block_sparse_attention(q, k, v, plan, precision="int8")


def row(curve, label, density, db, method="radial", seed=0):
    return {
        "family": "wan",
        "size": "9x24x40",
        "curve": curve,
        "label": label,
        "method": method,
        "density": density,
        "psnr_db": db,
        "ssim": 0.9,
        "seconds": 2.0,
        "seed": seed,
        "prompt": "one red disc",
    }


class TestSummary:
    def test_seeds_become_a_mean_and_a_spread_and_equal_videos_are_left_out(self):
        rows = [row("c", "a", 0.2, db, seed=n) for n, db in enumerate((20.0, 24.0))]
        (summary,) = summarise([*rows, row("c", "a", 0.2, None)])
        assert (summary.psnr, summary.psnr_spread, len(summary.videos)) == (22.0, 2.0, 2)

    def test_directions_count_what_holds_and_what_does_not(self):
        rows = [
            row("radial drop", "decay=0.1 skipped_blocks=drop", 0.2, 20.0),
            row("radial drop", "decay=0.5 skipped_blocks=drop", 0.4, 26.0),
            row("radial drop", "decay=0.9 skipped_blocks=drop", 0.6, 25.0),
            row("radial pool", "decay=0.1 skipped_blocks=pool", 0.2, 21.0),
            row("radial pool", "decay=0.5 skipped_blocks=pool", 0.4, 25.5),
            row("dense_timesteps", "sparge dense_timesteps=0", 0.2, 15.0),
            row("dense_timesteps", "sparge dense_timesteps=4", 0.2, 25.0),
            row("dense_layers", "sparge dense_layers=", 0.2, 18.0),
            row("dense_layers", "sparge dense_layers=0", 0.2, 17.0),
            row("dense_layers", "sparge dense_layers=0, -1", 0.2, 19.0),
            row("psa topk", "psa a", 0.1, 22.0),
            row("psa topk", "psa b", 0.1, 23.0),
            row("psa topk one order", "psa a alternate_orders=False", 0.1, 21.0),
            row("psa topk one order", "psa b alternate_orders=False", 0.1, 24.0),
            row("psa topk one order", "psa c alternate_orders=False", 0.3, 9.0),
            row("sparge raster", "sparge topk=0.2 block_order=raster", 0.3, 20.0),
            row("sparge Gilbert", "sparge topk=0.2 block_order=Gilbert", 0.3, 21.0),
            row("sparge raster", "sparge topk=0.3 block_order=raster", 0.3, 23.0),
            row("sparge Gilbert", "sparge topk=0.3 block_order=Gilbert", 0.3, 22.0),
            row("sparge Gilbert", "sparge topk=0.5 block_order=Gilbert", 0.3, 30.0),
        ]
        found = {d.claim: (d.held, d.compared) for d in directions(summarise(rows))}
        assert found == {
            "quality falls with density": (2, 3),
            "pooling skipped blocks is closer than dropping them": (1, 2),
            "Sparge in Gilbert order is closer than in raster order": (1, 2),
            "orders that take turns are closer than one order": (1, 2),
            "more dense_timesteps is closer": (1, 1),
            "more dense_layers is closer": (1, 2),
        }

    def test_settings_of_other_videos_are_not_compared(self):
        rows = [
            row("radial drop", "skipped_blocks=drop", 0.2, 20.0),
            row("radial pool", "skipped_blocks=pool", 0.2, 21.0, seed=1),
            row("sparge topk", "topk=0.1", 0.1, 20.0),
            row("sparge topk", "topk=0.2", 0.2, 19.0),
            row("sparge topk", "topk=0.2", 0.2, 19.0, seed=1),
        ]
        assert not any(d.compared for d in directions(summarise(rows)))
        rows += [row("sparge topk", "topk=0.1", 0.1, 20.0, seed=1)]
        assert [(d.held, d.compared) for d in directions(summarise(rows)) if d.compared] == [(0, 1)]

    def test_settings_that_come_to_the_same_mask_are_compared_once(self):
        rows = [
            row(f"radial {skipped}", f"decay={decay} skipped_blocks={skipped}", 0.5, db)
            for skipped, db in (("drop", 20.0), ("pool", 21.0))
            for decay in (0.1, 0.2, 0.5)
        ]
        (pooled,) = [d for d in directions(summarise(rows)) if d.claim.startswith("pooling")]
        assert (pooled.held, pooled.compared) == (1, 1)


class TestArguments:
    @pytest.mark.parametrize("text", ["9x24", "9x24x41", "0x24x40", "9x24x40x1", "big"])
    def test_a_size_that_is_none_is_named(self, text):
        with pytest.raises(ValueError, match=f"size '{text}'"):
            quality.parse_size(text)

    @pytest.mark.parametrize(
        ("text", "why"), [("mochi=a", "write them as"), ("wan=/nowhere", "there is no such file")]
    )
    def test_weights_that_are_none_are_named(self, text, why):
        with pytest.raises(ValueError, match=why):
            quality.find_weights("wan", [text])

    def test_floors_asked_for_and_none_is_no_measurement(self):
        with pytest.raises(SystemExit, match="floors 0: method dense is the floors"):
            quality.main(["--methods", "dense", "--floors", "0"])

    def test_without_trained_weights_it_says_how_to_get_some(self, monkeypatch, tmp_path):
        monkeypatch.setattr(quality, "weights_path", lambda family: tmp_path / "none")
        with pytest.raises(SystemExit, match="no trained weights in miniature/weights; train"):
            quality.main(["--families", "wan"])


@pytest.mark.comfy
def test_a_measurement_compares_with_the_dense_video_of_the_same_seed(
    comfyui, tmp_path, monkeypatch
):
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.15 * torch.randn(weight.shape, generator=generator)
        for name, weight in WanMiniature(128, 64, 2).state_dict().items()
    }
    save_file(weights, tmp_path / "wan.safetensors")
    everything = Setting(
        "sparge", "all", {"topk": 1.0, "simthreshd1": -1.0}, {"dense_timesteps": 0}
    )
    # Dropped: random weights attend so evenly that means of blocks stand for them.
    own = {"topk": 0.1, "simthreshd1": -1.0, "skipped_blocks": "drop"}
    little = Setting("sparge", "few", own, {"dense_timesteps": 0})
    monkeypatch.setattr(quality, "settings", lambda *given, **how: [everything, little])
    given = ["--families", "wan", "--weights", f"wan={tmp_path / 'wan.safetensors'}"]
    given += ["--sizes", "4x16x24", "--seeds", "3", "4", "--prompts", "0", "--steps", "2"]
    arguments = quality.parser().parse_args([*given, "--device", "cpu", "--out", str(tmp_path)])
    assert isinstance(arguments, argparse.Namespace)
    arguments.given = given
    (path,) = quality.run(arguments)
    assert path.name == "quality_wan_4x16x24_2steps.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    floors = {(r["seed"], r["label"]): r for r in result["rows"] if r["method"] == "dense"}
    in_bf16, in_int8 = "dense in bf16", "dense, logits in int8"
    # One in bf16 is enough on a CPU.
    assert floors.keys() == {(3, in_bf16), (3, in_int8), (4, in_int8)}
    rows = {(r["seed"], r["curve"]): r for r in result["rows"] if r["method"] != "dense"}
    assert rows.keys() == {(3, "all"), (3, "few"), (4, "all"), (4, "few")}
    for seed in (3, 4):
        floor = floors[seed, in_int8]
        # Every layer, in int8, whole.
        assert (floor["sparse_calls"], floor["dense_calls"]) == (4, 0)
        assert floor["density"] == pytest.approx(1.0)
        assert all("int8" in kernel for kernel in floor["kernels"])
        whole, few = rows[seed, "all"], rows[seed, "few"]
        # Two steps with cond and uncond in one batch; layer 0 is dense.
        assert (whole["sparse_calls"], whole["dense_calls"]) == (2, 2)
        assert whole["density"] == pytest.approx(1.0) and few["density"] < 0.5
        assert whole["psnr_db"] is None or whole["psnr_db"] > 70
        assert few["psnr_db"] < 60 and few["ssim"] < 1
        exact = math.inf if whole["psnr_db"] is None else whole["psnr_db"]
        assert few["psnr_db"] + 10 < floors[seed, in_int8]["psnr_db"] < exact
    assert 20 < floors[3, in_bf16]["psnr_db"] < 90
    assert path.with_suffix(".png").stat().st_size > 0
