"""The picture of a run: what is counted in it is what was recorded."""

from collections import Counter

import numpy as np
import pytest
from sparse_video_attention.patching.call_record import CallRecord
from sparse_video_attention.patching.record import RunRecord
from sparse_video_attention.patching.report_picture import (
    DENSE,
    DENSE_SECONDS,
    NOT_CALLED,
    WIDTH,
    density_colour,
    error_colour,
    reason_colours,
    run_picture,
    scale_of_errors,
)

QUARTER, LAYER, FAULT = "first 2 of 8 steps", "layer 0 is in dense_layers", "out of memory"


def record(layers=6, steps=8, calls=1, fault=None, density=0.3, **fields):
    """A finished run: two dense steps, a dense layer, and perhaps a call that fell back."""
    made = RunRecord("radial (decay 0.2, block 128)", "WanModel", layers, steps, **fields)
    for step in range(steps):
        for call in range(calls):
            forward = []
            for layer in range(layers):
                reason = QUARTER if step < 2 else LAYER if layer == 0 else None
                reason = FAULT if (layer, step, call) == fault else reason
                ran, kept = ("triton", density) if reason is None else ("dense", None)
                seconds = 0.1 if reason is None else 0.4
                forward.append(CallRecord(step, layer, ran, kept, reason, None, seconds))
            made.add_forward("9x12x20", forward, step)
    made.finish()
    return made


def pixels(picture):
    """How many pixels of each colour."""
    return Counter(map(tuple, np.asarray(picture).reshape(-1, 3).tolist()))


class TestCells:
    def test_every_layer_and_step_has_the_colour_of_what_ran_there(self):
        made = record(layers=5, steps=8, fault=(3, 6, 0))
        image = np.asarray(run_picture(made))
        colours = {reason: DENSE[place] for place, reason in enumerate((QUARTER, LAYER, FAULT))}
        assert reason_colours(made) == colours
        # The cells' corner and size, from the only part that is a grid: the first dense cell, and
        # the sparse colour that is nowhere else but in cells and bars.
        dense = (image == colours[QUARTER]).all(-1)
        top, left = np.argwhere(dense)[0]
        across = int(np.argmin(dense[top, left:])) + 1
        down = int(np.argmin(dense[top:, left])) + 1
        for call in made.calls:
            y = top + call.layer * down + down // 2
            x = left + call.step * across + across // 2
            expected = density_colour(0.3) if call.reason is None else colours[call.reason]
            assert tuple(image[y, x]) == expected, (call.layer, call.step)

    def test_calls_of_one_cell_share_it(self):
        one = pixels(run_picture(record(calls=2, fault=(3, 5, 0))))[DENSE[2]]
        both = pixels(run_picture(record(calls=1, fault=(3, 5, 0))))[DENSE[2]]
        square = pixels(run_picture(record(calls=2)))[DENSE[2]]
        assert square == 0
        # The mark in the list is the same in both pictures.
        mark = 14 * 14
        assert one - mark == pytest.approx((both - mark) / 2, rel=0.1)

    def test_what_was_not_called_is_neither_sparse_nor_dense(self):
        whole, cut = record(), record()
        cut.calls = [call for call in cut.calls if call.step < 4]
        cut.ended_early = True
        sparse = density_colour(0.3)
        assert pixels(run_picture(cut))[sparse] < pixels(run_picture(whole))[sparse] / 2
        image = np.asarray(run_picture(cut))
        assert (image == NOT_CALLED).all(-1).sum() > 4 * 6 * 100
        assert not (np.asarray(run_picture(whole)) == NOT_CALLED).all(-1).any()
        # Cells before the cut are the same in both.
        assert pixels(run_picture(cut))[DENSE[0]] > 0


class TestSeconds:
    def test_bars_are_as_high_as_their_seconds(self):
        # One layer, which is dense at first and sparse after: 0.4 and 0.1 seconds.
        made = record(layers=2, steps=8)
        made.calls = [call for call in made.calls if call.layer == 1]
        made.num_layers = 1
        image = np.asarray(run_picture(made))
        dense = (image == DENSE_SECONDS).all(-1)
        sparse = (image == density_colour(0.3)).all(-1)
        columns = [int(np.argwhere(found.any(0)).max()) for found in (dense, sparse)]
        heights = [int(f[:, x].sum()) for f, x in zip((dense, sparse), columns, strict=True)]
        cell = 17  # the row of the only layer that was called
        assert heights[0] == 72 and heights[1] - cell == pytest.approx(72 / 4, abs=1)

    def test_bars_of_dense_calls_have_a_colour_that_no_reason_has(self):
        assert DENSE_SECONDS not in {*DENSE, NOT_CALLED}
        mark = 14 * 14  # in the list
        assert pixels(run_picture(record()))[DENSE_SECONDS] > 2 * mark
        sparse = record()
        sparse.calls = [call for call in sparse.calls if call.reason is None]
        assert pixels(run_picture(sparse))[DENSE_SECONDS] == 0


class TestErrors:
    def made(self, **errors):
        """A run whose layers 1 and 2 had these errors in every sparse call."""
        made = record(layers=6, steps=8)
        given = {int(layer[1:]): error for layer, error in errors.items()}
        made.calls = [
            call._replace(error=given.get(call.layer)) if call.reason is None else call
            for call in made.calls
        ]
        return made

    def test_a_second_chart_has_them_by_layer_and_step(self):
        plain, made = record(layers=6, steps=8), self.made(l1=0.4, l2=0.1)
        picture = run_picture(made)
        assert picture.height > run_picture(plain).height + 6 * 18
        found = pixels(picture)
        largest, quarter = error_colour(0.4, 0.4), error_colour(0.1, 0.4)
        # Six of eight steps are sparse; cells are as large as those of the first chart, and the
        # scale has each shade in one column or none.
        cell = pixels(run_picture(plain))[NOT_CALLED] == 0 and 35 * 17
        assert found[largest] >= 6 * cell and found[quarter] >= 6 * cell
        assert abs(found[largest] - found[quarter]) <= 2 * 14
        # Dense calls have none: 8 of layer 0, 2 x 5 of first steps, 3 x 6 of other layers. The
        # mark in the legend is as large as in the list.
        assert found[NOT_CALLED] == 36 * cell + 14 * 14

    def test_a_few_large_ones_leave_the_rest_its_shades(self):
        assert scale_of_errors([0.01] * 98 + [0.5, 0.6]) == pytest.approx(0.02)
        assert scale_of_errors(sorted(n / 100 for n in range(100))) == 0.99
        assert scale_of_errors([0.0] * 99 + [0.3]) == 0.3
        assert scale_of_errors([0.4]) == 0.4 and scale_of_errors([]) == 0.0
        made = self.made(l1=0.02, l2=0.01)
        places = [at for at, call in enumerate(made.calls) if call.layer == 1 and call.error]
        made.calls[places[0]] = made.calls[places[0]]._replace(error=0.9)
        found = pixels(run_picture(made))
        assert found[error_colour(0.01, 0.04)] >= 6 * 35 * 17
        assert found[error_colour(0.9, 0.04)] >= 35 * 17

    def test_without_any_there_is_no_chart(self):
        assert run_picture(self.made()).height == run_picture(record(layers=6, steps=8)).height

    def test_what_is_not_finite_is_left_out(self):
        made = self.made(l1=float("nan"), l2=0.2)
        found = pixels(run_picture(made))
        assert found[error_colour(0.2, 0.2)] >= 6 * 35 * 17
        assert run_picture(self.made(l1=0.0)).height > 0, "a largest error of 0"

    def test_more_is_darker_and_told_apart_from_the_rest(self):
        shades = [sum(error_colour(share / 10, 1.0)) for share in range(11)]
        assert shades == sorted(shades, reverse=True) and len(set(shades)) == 11
        errors = {error_colour(share / 100, 1.0) for share in range(101)}
        assert not errors & {density_colour(share / 100) for share in range(101)}
        assert not errors & {*DENSE, DENSE_SECONDS, NOT_CALLED}


class TestColours:
    def test_less_density_is_darker_and_all_are_told_apart_from_dense(self):
        shades = [sum(density_colour(share / 10)) for share in range(11)]
        assert shades == sorted(shades) and len(set(shades)) == 11
        assert not {density_colour(share / 100) for share in range(101)} & set(DENSE)
        assert density_colour(-1.0) == density_colour(0.0)
        assert density_colour(2.0) == density_colour(1.0)

    def test_any_number_of_reasons(self):
        made = RunRecord("psa", "WanModel", 40, 2)
        made.calls = [
            CallRecord(0, layer, "dense", None, f"fault {layer}", None, 0.1) for layer in range(40)
        ]
        colours = reason_colours(made)
        assert len(colours) == 40 and set(colours.values()) == set(DENSE)
        assert run_picture(made).height > 40 * 20

    def test_dense_layers_are_one_reason_and_a_rare_fault_stands_out(self):
        made = RunRecord("radial", "WanModel", 40, 2)
        dense = {0, 1, 2, 7, 38, 39}
        reasons = {layer: f"layer {layer} is in dense_layers" for layer in dense} | {20: FAULT}
        made.calls = [
            CallRecord(step, layer, "dense", None, reasons[layer], None, 0.1)
            if layer in reasons and (layer != 20 or step)
            else CallRecord(step, layer, "triton", 0.3, None, None, 0.1)
            for step in range(2)
            for layer in range(40)
        ]
        made.forwards = 2
        together = "layers 0-2, 7, 38-39 are in dense_layers"
        assert made.dense_reasons() == {together: 12, FAULT: 1}
        assert reason_colours(made) == {together: DENSE[0], FAULT: DENSE[1]}
        assert f"12 x {together}" in made.summary()
        found = pixels(run_picture(made))
        # A mark in the list each, and a cell of equal size per call.
        cell = found[DENSE[1]] - 14 * 14
        assert cell > 0 and found[DENSE[0]] - 14 * 14 == pytest.approx(12 * cell, rel=0.1)


class TestAnyRun:
    @pytest.mark.parametrize(
        ("layers", "steps", "calls"), [(1, 1, 1), (60, 100, 2), (40, 1000, 1), (2, 4, 9)], ids=str
    )
    def test_of_any_size_is_a_picture_that_fits(self, layers, steps, calls):
        made = record(layers, steps, calls)
        picture = run_picture(made)
        assert picture.mode == "RGB" and picture.width == WIDTH and picture.height < 1200
        # Nothing is drawn over the edge.
        edge = np.asarray(picture)
        assert (edge[:, -20:] == 255).all() and (edge[-20:] == 255).all()
        assert pixels(picture)[density_colour(0.3)] > 0 or steps <= 2

    def test_with_layers_and_steps_that_are_not_known(self):
        made = RunRecord("sparge", "WanModel")
        made.calls = [
            CallRecord(None, None, "dense", None, "ComfyUI does not say", None),
            CallRecord(0, 3, "torch", 0.5, None, None),
        ]
        assert pixels(run_picture(made))[density_colour(0.5)] > 0

    def test_without_a_single_call(self):
        made = RunRecord("sparge", "WanModel", 4, 4, forwards=4)
        picture = run_picture(made)
        assert picture.height < 200 and not set(DENSE) & set(pixels(picture))

    def test_with_dense_backends_only(self):
        made = RunRecord("", "WanModel", 4, 4, dense_backends="self_attn_1_type xformers")
        made.count_backend("self_attn_1_type", "xformers")
        assert made.summary().startswith("dense attention on WanModel: self_attn_1_type xformers")
        assert run_picture(made).height < 200

    def test_with_a_word_that_has_no_end_and_letters_of_any_script(self):
        made = record(notes=["W" * 500, "W" * 70 + " " + "1" * 108, "因为 – ünïcödé"])
        assert (np.asarray(run_picture(made))[:, -20:] == 255).all()

    def test_with_a_pillow_that_is_too_old_says_so(self, monkeypatch):
        from PIL import ImageFont
        from sparse_video_attention.patching import page

        monkeypatch.setattr(ImageFont, "load_default", lambda: None)
        page._font.cache_clear()
        with pytest.raises(RuntimeError, match=r"Pillow 10\.1 or newer"):
            run_picture(record())
        monkeypatch.undo()
        run_picture(record())
