"""From what a run leaves to what the report says."""

import json
import math
import re
import struct
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sparse_video_attention.kernels import TokenLayout

from demo.checkpoints import make_cogvideox_checkpoint, make_wan_checkpoint
from demo.comparison import (
    Comparison,
    SparseRun,
    logged_density,
    logged_layout,
    pack_lines,
    relative_error,
)
from demo.families import COGVIDEOX, WAN, family_of
from demo.frames import (
    cogvideox_miniature,
    difference,
    principal_components,
    psnr,
    to_bytes,
    upscale,
    wan_preview,
)
from demo.mask import KEPT, draw_mask, radial_plan
from demo.methods import PSA, RADIAL
from demo.report import write_report
from demo.session import RunResult
from demo.video import video_grid, write_video
from devtools.errors import DevError

LOG = """
[INFO] Requested to load WAN21
[INFO] [sparse_video_attention] radial (decay 0.2, block 128) on WanModel, 21x12x20 tokens: 3 of \
4 layers sparse on 9 of 12 steps, density 0.484, kernel torch; dense calls: 9 x layer 0
[INFO] Prompt executed in 20.00 seconds
"""
SETTINGS = {"block_size": 128, "decay_factor": 0.2, "skipped_blocks": "drop"}


class TestLogLine:
    def test_only_the_pack_s_own_lines_are_taken(self):
        (line,) = pack_lines(LOG)
        assert line.startswith("radial (decay 0.2") and line.endswith("layer 0")

    def test_density_and_grid(self):
        assert logged_density(LOG) == 0.484
        assert logged_layout(LOG) == TokenLayout(21, 12, 20)

    def test_text_in_front_of_the_video(self):
        log = LOG.replace("21x12x20 tokens", "13x12x20 (226 before) tokens")
        assert logged_layout(log) == TokenLayout(13, 12, 20, prefix_tokens=226)

    def test_the_last_run_counts(self):
        assert logged_density(LOG + LOG.replace("0.484", "0.250")) == 0.25

    @pytest.mark.parametrize("log", ["", "density 0.3 in another program"])
    def test_nothing_logged(self, log):
        assert logged_density(log) is None and logged_layout(log) is None


class TestPictures:
    def test_psnr_of_a_known_error(self):
        zeros = torch.zeros(2, 3, 4, 3)
        assert psnr(zeros, zeros + 0.1) == pytest.approx(20.0, abs=1e-5)
        assert psnr(zeros, zeros) == math.inf

    def test_relative_error_of_a_scaled_latent(self):
        latent = torch.randn(16, 3, 4, 5, generator=torch.Generator().manual_seed(0))
        assert relative_error(latent, 1.5 * latent) == pytest.approx(0.5)

    def test_principal_components_find_what_varies_most(self):
        generator = torch.Generator().manual_seed(0)
        latent = torch.zeros(16, 4, 8, 8)
        strong = torch.randn(4, 8, 8, generator=generator)
        latent[5] = 10 * strong
        latent[9] = torch.randn(4, 8, 8, generator=generator)
        red = principal_components(latent)(latent)[..., 0]
        correlation = torch.corrcoef(torch.stack([red.flatten(), strong.flatten()]))[0, 1]
        assert abs(correlation) > 0.999

    def test_both_latents_go_through_one_map(self):
        generator = torch.Generator().manual_seed(0)
        reference = torch.randn(16, 4, 8, 8, generator=generator)
        show = principal_components(reference)
        shift = 0.01 * torch.randn(16, 1, 1, 1, generator=generator)
        moved = show(reference + shift) - show(reference)
        assert torch.allclose(moved, moved[:1, :1, :1].expand_as(moved), atol=1e-5)

    @pytest.mark.comfy
    @pytest.mark.parametrize("family", ["wan", "cogvideox"])
    def test_what_a_miniature_was_trained_on_comes_back_from_a_saved_latent(self, family, comfyui):
        from comfy.latent_formats import CogVideoX, Wan21

        from miniature.latents import cogvideox_colours, wan_colours

        video = torch.rand(3, 4, 6, 3, generator=torch.Generator().manual_seed(0))
        colours = {"wan": wan_colours, "cogvideox": cogvideox_colours}[family]()
        latent_format = {"wan": Wan21, "cogvideox": CogVideoX}[family]()
        show = {"wan": wan_preview, "cogvideox": cogvideox_miniature}[family]()
        saved = latent_format.process_out(colours.encode(video).unsqueeze(0))[0]
        assert torch.allclose(show(saved), video, atol=1e-4)

    def test_upscaling_keeps_flat_areas_and_makes_video_pixels(self):
        large = upscale(torch.full((2, 3, 5, 3), 0.25))
        assert large.shape == (2, 24, 40, 3)
        assert torch.allclose(large, torch.tensor(0.25))

    def test_the_difference_is_amplified(self):
        a = torch.full((1, 2, 2, 3), 0.5)
        assert torch.allclose(difference(a, a + 0.1, 4.0), torch.tensor(0.4))


class TestVideo:
    def test_a_written_video_can_be_read_back(self, tmp_path):
        ramp = torch.linspace(0.1, 0.9, 64).expand(6, 48, 64).unsqueeze(-1).expand(-1, -1, -1, 3)
        frames = to_bytes(ramp * torch.linspace(0.5, 1, 6).view(6, 1, 1, 1))
        path = write_video(tmp_path / "video.mp4", frames, fps=4)
        with av.open(str(path)) as container:
            assert container.streams.video[0].average_rate == 4
            read = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
        assert read.shape == frames.shape
        assert np.abs(read.astype(int) - frames).mean() < 3

    def test_odd_sizes_lose_a_line_instead_of_failing(self, tmp_path):
        path = write_video(tmp_path / "video.mp4", np.zeros((2, 33, 47, 3), np.uint8), fps=4)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.height, stream.width) == (32, 46)

    def test_a_grid_has_each_video_under_its_caption_and_leaves_empty_places_white(self):
        black, grey = (np.full((3, 40, 60, 3), value, np.uint8) for value in (0, 128))
        grid = video_grid([[("left", black), ("right", grey)], [None, ("below", black)]])
        above, below = np.split(grid, 2, axis=1)
        assert (above[:, -40:, :60] == 0).all() and (above[:, -40:, -60:] == 128).all()
        assert (below[:, -40:, -60:] == 0).all() and (below[:, :, :60] == 255).all()
        for tile in (above[0, :20, :60], above[0, :20, -60:], below[0, :20, -60:]):
            assert (tile < 100).any(), "no caption"


class TestMask:
    def test_the_picture_shows_the_plan(self):
        layout = TokenLayout(21, 12, 20, prefix_tokens=226)
        plan = radial_plan(layout, SETTINGS)
        pixels = np.asarray(draw_mask(plan, layout))
        cell = pixels.shape[0] // plan.num_q_blocks
        assert pixels.shape == (plan.num_q_blocks * cell, plan.num_k_blocks * cell, 3)
        kept = plan.to_levels()[0, 0] == 1
        checked = 0
        for i in range(plan.num_q_blocks):
            for j in range(plan.num_k_blocks):
                tile = pixels[i * cell : (i + 1) * cell, j * cell : (j + 1) * cell].reshape(-1, 3)
                blue = (tile == KEPT).all(-1).mean()
                # Borders of frames cover part of a cell.
                assert (blue > 0.5) == bool(kept[i, j])
                checked += 1
        assert checked == kept.numel()


class TestFamilies:
    @pytest.mark.parametrize(
        ("make", "family"), [(make_wan_checkpoint, WAN), (make_cogvideox_checkpoint, COGVIDEOX)]
    )
    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    def test_weights_tell_their_family(self, make, family, prefix, tmp_path):
        from safetensors.torch import load_file

        tensors = load_file(make(tmp_path / "model.safetensors", num_layers=1))
        path = tmp_path / "prefixed.safetensors"
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
        assert family_of(path) is family

    def test_another_model_is_named(self, tmp_path):
        path = tmp_path / "sd15.safetensors"
        save_file({"input_blocks.0.0.weight": torch.zeros(1)}, path)
        with pytest.raises(DevError, match=r"sd15.safetensors is neither a WAN nor a CogVideoX"):
            family_of(path)

    @pytest.mark.parametrize(
        "content",
        [b"", b"\x80\x02]q\x00", struct.pack("<Q", 1 << 60), struct.pack("<Q", 4) + b"nope"],
        ids=["empty", "pickle", "absurd-length", "no-json"],
    )
    def test_another_kind_of_file_is_said(self, content, tmp_path):
        path = tmp_path / "model.ckpt"
        path.write_bytes(content)
        with pytest.raises(DevError, match="model.ckpt is not a safetensors file"):
            family_of(path)


@pytest.fixture
def comparison(tmp_path):
    layout = TokenLayout(21, 12, 20)
    video = write_video(tmp_path / "v.mp4", np.zeros((2, 16, 16, 3), np.uint8), fps=4)

    def run(method, seconds, **results):
        log = LOG + "[sparse_video_attention] <b>bold</b>"
        result = RunResult(seconds + 1, seconds, {}, log)
        report = Image.new("RGB", (8, 4), "white")
        return SparseRun(method, SETTINGS, result, layout=layout, report=report, **results)

    return Comparison(
        family=WAN,
        weights="tiny",
        prompt=None,
        steps=12,
        size=(320, 192, 81),
        dense=RunResult(31.0, 30.0, {}, ""),
        runs=(
            run(RADIAL, 20.0, density=0.484, psnr=27.25, latent_error=0.123),
            run(PSA, 60.0, density=None, psnr=math.inf, latent_error=0.0),
        ),
        colours="colours & more",
        videos={"side_by_side": video},
        mask=draw_mask(radial_plan(layout, SETTINGS), layout),
    )


class TestReport:
    def write(self, comparison, tmp_path):
        page = write_report(tmp_path / "report.html", [comparison], {"system": {}})
        return page.read_text(encoding="utf-8")

    def rows(self, page):
        table = page.partition('<table class="results">')[2].partition("</table>")[0]
        return [re.findall(r"<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]

    def test_every_run_has_a_row_with_its_numbers(self, comparison, tmp_path):
        dense, radial, psa = self.rows(self.write(comparison, tmp_path))
        assert dense[0] == "dense" and "30.0 s" in dense[1]
        assert radial[0] == "radial" and "20.0 s" in radial[1]
        widths = [float(re.search(r"\* (\d\.\d+)", row[1])[1]) for row in (dense, radial, psa)]
        assert widths == [0.5, 0.333, 1.0]
        assert radial[2:] == ["1.50x faster", "48%", "27.2 dB", "12.3%"]
        assert psa[2:] == ["2.00x slower", "nothing sparse", "equal", "0.0%"]

    def test_real_weights_have_no_column_of_latents(self, comparison, tmp_path):
        runs = tuple(replace(run, latent_error=None) for run in comparison.runs)
        rows = self.rows(self.write(replace(comparison, weights="real", runs=runs), tmp_path))
        assert {len(row) for row in rows} == {5}

    def test_it_is_one_file_with_everything_in_it(self, comparison, tmp_path):
        page = self.write(comparison, tmp_path)
        sources = re.findall(r'(?:src|href)="([^"]*)"', page)
        # The video, the mask, and a report per method.
        assert len(sources) == 2 + len(comparison.runs)
        assert all(f"what ran with {run.method.title}" in page for run in comparison.runs)
        assert {source.partition(",")[0] for source in sources} == {
            "data:video/mp4;base64",
            "data:image/png;base64",
        }
        assert "http" not in re.sub(r'src="[^"]*"', "", page) and "$" not in page.split("<main>")[0]

    def test_each_model_says_whose_weights_it_has(self, comparison, tmp_path):
        said = {
            weights: self.write(replace(comparison, weights=weights), tmp_path)
            for weights in ("tiny", "miniature", "real")
        }
        assert "This is not a real video" in said["tiny"]
        assert "trained on moving shapes" in said["miniature"]
        assert "that were given" in said["real"] and "not a real" not in said["real"]

    def test_a_prompt_is_quoted_where_there_is_one(self, comparison, tmp_path):
        assert "&ldquo;" not in self.write(comparison, tmp_path)
        page = self.write(replace(comparison, prompt="one <red> disc"), tmp_path)
        assert "&ldquo;one &lt;red&gt; disc&rdquo;" in page

    def test_what_the_log_says_cannot_become_markup(self, comparison, tmp_path):
        page = self.write(comparison, tmp_path)
        assert "<b>bold</b>" not in page and "&lt;b&gt;bold" in page
        assert "colours &amp; more" in page

    def test_the_facts_are_valid_json_even_for_equal_videos(self, comparison):
        facts = json.loads(json.dumps(comparison.facts(), allow_nan=False))
        assert facts["tokens"] == 5040 and facts["methods"]["radial"]["speedup"] == 1.5
        assert facts["methods"]["psa"]["psnr_db"] is None


def test_no_file_of_the_demo_names_a_place_on_a_machine():
    for path in (Path(__file__).resolve().parents[2] / "demo").rglob("*.*"):
        if path.suffix in (".py", ".html"):
            assert not re.search(r"(?<![\w.])/(home|root|Users|work)/", path.read_text("utf-8"))
