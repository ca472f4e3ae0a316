"""A page of text and coloured patches, as the nodes show it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .log import log, one_line

Colour = tuple[int, int, int]

WIDTH, MARGIN, LINE, TEXT = 880, 24, 20, 14
BACKGROUND, INK = (255, 255, 255), (32, 32, 36)
# Of density 0 and 1: dark where much was left out.
SPARSE = ((8, 64, 105), (190, 225, 215))


@cache
def _font() -> Any:
    try:
        return ImageFont.load_default(TEXT)
    except TypeError:
        raise RuntimeError("Pillow 10.1 or newer is needed: pip install -U Pillow") from None


def wrapped(text: str, indent: int = 0) -> list[str]:
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


class Page:
    """A picture that is filled from the top."""

    def __init__(self, height: int) -> None:
        self.image = Image.new("RGB", (WIDTH, height), BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)
        self.y = MARGIN

    def write(self, text: str, x: float, y: float, anchor: str = "la") -> None:
        self.draw.text((x, y), text, INK, font=_font(), anchor=anchor)

    def paragraph(self, text: str, indent: int = 0) -> None:
        for line in wrapped(text, indent):
            self.write(line, MARGIN + indent, self.y)
            self.y += LINE

    def patch(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """A filled rectangle, a pixel at least."""
        right, bottom = max(x, x + width - 1), max(y, y + height - 1)
        self.draw.rectangle((x, y, right, bottom), colour)


def text_picture(*sentences: str) -> Image.Image:
    """Sentences in place of a picture."""
    page = Page(sum(len(wrapped(text)) for text in sentences) * LINE + 2 * MARGIN)
    for text in sentences:
        page.paragraph(text)
    return page.image


def image_tensor(draw: Callable[[], Image.Image]) -> Tensor:
    """An RGB picture as ComfyUI's IMAGE, fp32 [1, height, width, 3] between 0 and 1.

    A small blank one where it cannot be drawn: a picture must not end a graph.
    """
    try:
        picture = draw()
    except Exception as error:
        log.warning(f"no picture could be drawn: {one_line(error)}")
        return torch.zeros(1, 64, 64, 3)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
