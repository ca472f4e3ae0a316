"""The record of a run as a picture: layers by steps, what was dense and why, seconds per step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from PIL import Image

from .call_record import CallRecord
from .errors_told import errors_of
from .page import LINE, MARGIN, SPARSE, TEXT, WIDTH, Colour, Page, text_picture, wrapped
from .record import RunRecord

# A layer or step, None where it is not known.
Name = int | None

# Room for the names of layers, and the height of the bars of seconds.
LABELS, BARS = 64, 72
NOT_CALLED = (236, 236, 238)
# Of no error and of the largest in a run.
ERRORS: tuple[Colour, Colour] = ((250, 240, 215), (150, 20, 50))
# Seconds of dense calls, of whatever reason.
DENSE_SECONDS = (92, 92, 98)
# Of the reasons why calls were dense, the commonest first; the last is for all that follow. A run
# has two or three: its first steps, its dense layers, and what else came up.
DENSE: tuple[Colour, ...] = (
    (160, 160, 166),
    (196, 168, 132),
    (240, 178, 84),
    (222, 110, 60),
    (178, 62, 84),
    (126, 86, 150),
)


def _between(ends: tuple[Colour, Colour], share: float) -> Colour:
    share = min(max(share, 0.0), 1.0)
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(*ends, strict=True))
    return red, green, blue


def density_colour(density: float) -> Colour:
    """Of a sparse call of this density, 0 to 1."""
    return _between(SPARSE, density)


def error_colour(error: float, largest: float) -> Colour:
    """Of a sparse call with this error."""
    return _between(ERRORS, error / largest if largest > 0 else 0.0)


def scale_of_errors(errors: list[float]) -> float:
    """The error that the darkest colour is for.

    A few far above the rest would leave that in one shade.

    Args:
        errors: of a run, sorted.
    """
    if not errors:
        return 0.0
    most = errors[(len(errors) - 1) * 95 // 100]
    return min(errors[-1], 2 * most) or errors[-1]


def reason_colours(record: RunRecord) -> dict[str, Colour]:
    """A colour for every reason why calls were dense, the commonest first."""
    reasons = [reason for reason, _ in record.dense_reasons().most_common()]
    return {reason: DENSE[min(place, len(DENSE) - 1)] for place, reason in enumerate(reasons)}


def _names(seen: Iterable[Name], length: int) -> list[Name]:
    """0 to length - 1 and whatever else was seen; what is not known is last."""
    found = set(seen)
    numbers = sorted({name for name in found if name is not None} | set(range(length)))
    return [*numbers, *([None] if None in found else [])]


class _Chart:
    """Layers from the top, steps from the left, and where they are on the page."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.reasons, self._told = reason_colours(record), record.told_reasons()
        self.layers = _names((call.layer for call in record.calls), record.num_layers)
        self.steps = _names((call.step for call in record.calls), record.total_steps)
        room = WIDTH - 2 * MARGIN - LABELS
        self.across = min(36.0, room / len(self.steps))
        self.down = min(18.0, max(5.0, 480 / len(self.layers)))
        self.left = MARGIN + LABELS
        self.errors = sorted(errors_of(record.calls))
        self.largest = scale_of_errors(self.errors)
        rows = round(self.down * len(self.layers))
        self.height = rows + BARS + 6 * LINE + (rows + 6 * LINE if self.errors else 0)

        self.cells: dict[tuple[Name, Name], list[CallRecord]] = defaultdict(list)
        for call in record.calls:
            self.cells[call.layer, call.step].append(call)
        self.has_gaps = len(self.cells) < len(self.layers) * len(self.steps)

    def _colour(self, call: CallRecord) -> Colour:
        if call.reason is not None:
            return self.reasons[self._told[call.reason]]
        return density_colour(1.0 if call.density is None else float(call.density))

    def _error_colour(self, call: CallRecord) -> Colour:
        of_call = errors_of([call])
        return error_colour(of_call[0], self.largest) if of_call else NOT_CALLED

    def draw_calls(self, page: Page) -> None:
        """What ran."""
        self._draw_cells(page, "layer", self._colour)

    def draw_errors(self, page: Page) -> None:
        """How far sparse calls were from full attention, where that was measured."""
        if not self.errors:
            return
        page.y += LINE // 2
        self._draw_cells(page, "error of each call; layer", self._error_colour)
        self._draw_steps(page)
        for pixel in range(120):
            page.patch(MARGIN + pixel, page.y + 2, 1, TEXT, _between(ERRORS, pixel / 119))
        mean, largest = sum(self.errors) / len(self.errors), self.errors[-1]
        more = f" (largest {largest:.3f})" if largest > self.largest else ""
        text = f"error against full attention, 0 to {self.largest:.3f}{more}, {mean:.3f} on average"
        page.write(text, MARGIN + 128, page.y)
        page.y += LINE
        page.patch(MARGIN, page.y + 2, TEXT, TEXT, NOT_CALLED)
        page.paragraph("not measured: dense, or not called", 24)

    def _draw_cells(self, page: Page, title: str, colour: Callable[[CallRecord], Colour]) -> None:
        """A cell per layer and step; its calls (two with guidance) side by side."""
        page.write(title, MARGIN, page.y)
        page.y += LINE
        gap = 1 if min(self.across, self.down) >= 6 else 0
        for row, layer in enumerate(self.layers):
            y = page.y + row * self.down
            self._label(page, row, layer, self.left - 8, y + self.down / 2, "rm")
            for column, step in enumerate(self.steps):
                x = self.left + column * self.across
                calls = self.cells.get((layer, step), [])
                width, height = self.across - gap, self.down - gap
                page.patch(x, y, width, height, NOT_CALLED)
                for place, call in enumerate(calls):
                    begin = x + width * place / len(calls)
                    page.patch(begin, y, x + width - begin, height, colour(call))
        page.y += round(self.down * len(self.layers)) + 4

    def _label(self, page: Page, place: int, name: Name, x: float, y: float, anchor: str) -> None:
        """The number of a row or column, where there is room for it."""
        cell, room = (self.across, 24.0) if anchor == "ma" else (self.down, TEXT + 2.0)
        every = next(
            n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if n * cell >= room
        )
        if name is None or place % every == 0:
            # Layers are counted from 0, as in dense_layers, steps from 1.
            shown = "?" if name is None else str(name + 1 if anchor == "ma" else name)
            page.write(shown, x, y, anchor)

    def _draw_steps(self, page: Page) -> None:
        """Their numbers, under their columns."""
        for column, step in enumerate(self.steps):
            middle = self.left + (column + 0.5) * self.across
            self._label(page, column, step, middle, page.y, "ma")
        page.write("step", MARGIN, page.y)
        page.y += LINE + 4

    def draw_seconds(self, page: Page) -> None:
        """Names of the steps, and under each a bar of the seconds of its calls."""
        self._draw_steps(page)
        spent: dict[Name, list[float]] = {step: [0.0, 0.0] for step in self.steps}
        for call in self.record.calls:
            spent[call.step][call.reason is not None] += call.seconds
        longest = max(sum(parts) for parts in spent.values())
        page.write("seconds", MARGIN, page.y)
        if longest > 0:
            page.write(f"{longest:.3g}", MARGIN, page.y + LINE)
            colours = (density_colour(self.record.sparse().density), DENSE_SECONDS)
            for column, step in enumerate(self.steps):
                bottom = float(page.y + BARS)
                for seconds, colour in zip(reversed(spent[step]), reversed(colours), strict=True):
                    height = BARS * seconds / longest
                    if height >= 0.5:
                        bottom -= height
                        x = self.left + column * self.across
                        page.patch(x, bottom, self.across - (self.across >= 6), height, colour)
        page.y += BARS + LINE // 2

    def draw_legend(self, page: Page) -> None:
        """What the colours mean."""
        sparse = self.record.sparse()
        if sparse.calls:
            for pixel in range(120):
                page.patch(MARGIN + pixel, page.y + 2, 1, TEXT, density_colour(pixel / 119))
            text = f"sparse: {sparse.calls} x density 0 to 1, {sparse.density:.3f} on average"
            page.write(text, MARGIN + 128, page.y)
            page.y += LINE
        counts = self.record.dense_reasons()
        for reason, colour in self.reasons.items():
            page.patch(MARGIN, page.y + 2, TEXT, TEXT, colour)
            page.paragraph(f"dense: {counts[reason]} x {reason}", 24)
        if self.reasons:
            page.patch(MARGIN, page.y + 2, TEXT, TEXT, DENSE_SECONDS)
            page.paragraph("seconds of dense calls", 24)
        if self.has_gaps:
            page.patch(MARGIN, page.y + 2, TEXT, TEXT, NOT_CALLED)
            page.paragraph("not called", 24)


def run_picture(record: RunRecord, *remarks: str) -> Image.Image:
    """What ran, RGB, WIDTH pixels wide.

    Args:
        record: of a finished run.
        remarks: sentences above it.
    """
    told = [*remarks, *record.summary().split("; ")]
    lines = sum(len(wrapped(part)) for part in told)
    if not record.calls:
        return text_picture(*told)
    chart = _Chart(record)
    lines += 4 + sum(len(wrapped(f"dense: 123456 x {why}", 24)) for why in chart.reasons)
    page = Page(lines * LINE + chart.height + 2 * MARGIN)
    for part in told:
        page.paragraph(part)
    page.y += LINE // 2
    chart.draw_calls(page)
    chart.draw_seconds(page)
    chart.draw_legend(page)
    chart.draw_errors(page)
    return page.image.crop((0, 0, WIDTH, page.y + MARGIN))
