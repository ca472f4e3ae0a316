"""The record of a run as a picture: layers by steps, what was dense and why, seconds per step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .record import CallRecord, RunRecord

Colour = tuple[int, int, int]
# A layer or step, None where it is not known.
Name = int | None

WIDTH, MARGIN, LINE, TEXT = 880, 24, 20, 14
# Room for the names of layers, and the height of the bars of seconds.
LABELS, BARS = 64, 72
BACKGROUND, INK, NOT_CALLED = (255, 255, 255), (32, 32, 36), (236, 236, 238)
# Of a sparse call of density 0 and 1: dark where much was left out.
SPARSE = ((8, 64, 105), (190, 225, 215))
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


def density_colour(density: float) -> Colour:
    """Of a sparse call of this density, 0 to 1."""
    share = min(max(density, 0.0), 1.0)
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(*SPARSE, strict=True))
    return red, green, blue


def reason_colours(record: RunRecord) -> dict[str, Colour]:
    """A colour for every reason why calls were dense, the commonest first."""
    reasons = [reason for reason, _ in record.dense_reasons().most_common()]
    return {reason: DENSE[min(place, len(DENSE) - 1)] for place, reason in enumerate(reasons)}


@cache
def _font() -> Any:
    try:
        return ImageFont.load_default(TEXT)
    except TypeError:
        raise RuntimeError("it needs Pillow 10.1 or newer: pip install -U Pillow") from None


def _wrapped(text: str, indent: int = 0) -> list[str]:
    """Lines that fit, broken at spaces where there are any."""
    room, lines = WIDTH - 2 * MARGIN - indent, [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if _font().getlength(longer) <= room:
            lines[-1] = longer
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = word
        while _font().getlength(lines[-1]) > room:
            fits = next(n for n in range(len(word), 0, -1) if _font().getlength(word[:n]) <= room)
            lines[-1], word = word[:fits], word[fits:]
            lines.append(word)
    return lines


def _names(seen: Iterable[Name], length: int) -> list[Name]:
    """0 to length - 1 and whatever else was seen; what is not known is last."""
    found = set(seen)
    numbers = sorted({name for name in found if name is not None} | set(range(length)))
    return [*numbers, *([None] if None in found else [])]


class _Page:
    """A picture that is filled from the top."""

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (WIDTH, height), BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)
        self.y = MARGIN

    def write(self, text: str, x: float, y: float, anchor: str = "la") -> None:
        self.draw.text((x, y), text, INK, font=_font(), anchor=anchor)

    def paragraph(self, text: str, indent: int = 0) -> None:
        for line in _wrapped(text, indent):
            self.write(line, MARGIN + indent, self.y)
            self.y += LINE

    def patch(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """A filled rectangle, a pixel at least."""
        right, bottom = max(x, x + width - 1), max(y, y + height - 1)
        self.draw.rectangle((x, y, right, bottom), colour)


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
        self.height = round(self.down * len(self.layers)) + BARS + 6 * LINE

        self.cells: dict[tuple[Name, Name], list[CallRecord]] = defaultdict(list)
        for call in record.calls:
            self.cells[call.layer, call.step].append(call)
        self.has_gaps = len(self.cells) < len(self.layers) * len(self.steps)

    def _colour(self, call: CallRecord) -> Colour:
        if call.reason is not None:
            return self.reasons[self._told[call.reason]]
        return density_colour(1.0 if call.density is None else float(call.density))

    def draw_calls(self, page: _Page) -> None:
        """A cell per layer and step; its calls (two with guidance) side by side."""
        page.write("layer", MARGIN, page.y)
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
                    page.patch(begin, y, x + width - begin, height, self._colour(call))
        page.y += round(self.down * len(self.layers)) + 4

    def _label(self, page: _Page, place: int, name: Name, x: float, y: float, anchor: str) -> None:
        """The number of a row or column, where there is room for it."""
        cell, room = (self.across, 24.0) if anchor == "ma" else (self.down, TEXT + 2.0)
        every = next(
            n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if n * cell >= room
        )
        if name is None or place % every == 0:
            # Layers are counted from 0, as in dense_layers, steps from 1.
            shown = "?" if name is None else str(name + 1 if anchor == "ma" else name)
            page.write(shown, x, y, anchor)

    def draw_seconds(self, page: _Page) -> None:
        """Names of the steps, and under each a bar of the seconds of its calls."""
        for column, step in enumerate(self.steps):
            middle = self.left + (column + 0.5) * self.across
            self._label(page, column, step, middle, page.y, "ma")
        page.write("step", MARGIN, page.y)
        page.y += LINE + 4
        spent: dict[Name, list[float]] = {step: [0.0, 0.0] for step in self.steps}
        for call in self.record.calls:
            spent[call.step][call.reason is not None] += call.seconds
        longest = max(sum(parts) for parts in spent.values())
        page.write("seconds", MARGIN, page.y)
        if longest > 0:
            page.write(f"{longest:.3g}", MARGIN, page.y + LINE)
            colours = (density_colour(self.record.sparse().density), DENSE[0])
            for column, step in enumerate(self.steps):
                bottom = float(page.y + BARS)
                for seconds, colour in zip(reversed(spent[step]), reversed(colours), strict=True):
                    height = BARS * seconds / longest
                    if height >= 0.5:
                        bottom -= height
                        x = self.left + column * self.across
                        page.patch(x, bottom, self.across - (self.across >= 6), height, colour)
        page.y += BARS + LINE // 2

    def draw_legend(self, page: _Page) -> None:
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
    lines = sum(len(_wrapped(part)) for part in told)
    if not record.calls:
        return text_picture(*told)
    chart = _Chart(record)
    lines += 3 + sum(len(_wrapped(f"dense: 123456 x {why}", 24)) for why in chart.reasons)
    page = _Page(lines * LINE + chart.height + 2 * MARGIN)
    for part in told:
        page.paragraph(part)
    page.y += LINE // 2
    chart.draw_calls(page)
    chart.draw_seconds(page)
    chart.draw_legend(page)
    return page.image.crop((0, 0, WIDTH, page.y + MARGIN))


def text_picture(*sentences: str) -> Image.Image:
    """Sentences in place of a picture of a run."""
    page = _Page(sum(len(_wrapped(text)) for text in sentences) * LINE + 2 * MARGIN)
    for text in sentences:
        page.paragraph(text)
    return page.image
