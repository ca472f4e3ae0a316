"""The generalised Hilbert curve through a 3-D grid of any size (J. Cerveny, "gilbert").

A box has a main axis a, along which the curve starts and ends, and two others, b and c. It is cut
into smaller boxes that the curve passes one after the other, each with axes of its own, until
boxes are lines. Few different boxes occur, so each is walked once and copied where it recurs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class _Axis(NamedTuple):
    """An axis of a box in terms of the box it was cut from."""

    axis: int
    part: str
    sign: int


def _boxes(*cut: str) -> tuple[tuple[_Axis, ...], ...]:
    """Boxes written as their axes a, b, c in terms of the parent's.

    "<" and ">" are the first and the second part of that axis; "-" runs along it backwards.
    """
    return tuple(
        tuple(
            _Axis("abc".index(text.strip("-<>")), text[-1], -1 if text[0] == "-" else 1)
            for text in box.split()
        )
        for box in cut
    )


_LONG_A = _boxes("a< b c", "a> b c")
_LONG_B = _boxes("b< c a<", "a b> c", "-b< c -a>")
_LONG_C = _boxes("c< a< b", "a b c>", "-c< -a> b")
_EVEN = _boxes("b< c< a<", "c a< b>", "a -b< -c>", "-c -a> b>", "-b< c< -a>")


def _cut(a: int, b: int, c: int) -> tuple[tuple[_Axis, ...], ...]:
    if 2 * a > 3 * b and 2 * a > 3 * c:
        return _LONG_A
    if 3 * b > 4 * c:
        return _LONG_B
    return _LONG_C if 3 * c > 4 * b else _EVEN


def _first_part(length: int, direction: int) -> int:
    """About half of an axis, even where it can be.

    An odd axis that runs against the grid is halved upwards, as in the published curve.
    """
    half = length // 2 if direction > 0 else -(-length // 2)
    return half + 1 if half % 2 and length > 2 else half


class _Walk:
    """Curves through boxes, each kept by the lengths and directions of its axes.

    A curve is int32 [3, points]: steps taken along axes a, b and c of the box, from its start.
    The directions, 1 or -1 relative to the grid, matter for where odd lengths are cut.
    """

    def __init__(self) -> None:
        self._curves: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}

    def curve(self, lengths: tuple[int, ...], directions: tuple[int, ...]) -> Tensor:
        key = (lengths, directions)
        if key not in self._curves:
            is_line = lengths.count(1) >= 2
            self._curves[key] = self._line(lengths) if is_line else self._pieces(*key)
        return self._curves[key]

    def _line(self, lengths: tuple[int, ...]) -> Tensor:
        points = max(lengths)
        curve = torch.zeros(3, points, dtype=torch.int32)
        curve[lengths.index(points)] = torch.arange(points)
        return curve

    def _pieces(self, lengths: tuple[int, ...], directions: tuple[int, ...]) -> Tensor:
        first = [_first_part(*axis) for axis in zip(lengths, directions, strict=True)]
        out = torch.empty(3, lengths[0] * lengths[1] * lengths[2], dtype=torch.int32)
        done = 0
        for box in _cut(*lengths):
            begins = [first[axis] if part == ">" else 0 for axis, part, _ in box]
            ends = [first[axis] if part == "<" else lengths[axis] for axis, part, _ in box]
            extents = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
            if 0 in extents:  # an axis of one point has an empty part
                continue
            curve = self.curve(extents, tuple(sign * directions[axis] for axis, _, sign in box))
            piece = out[:, done : done + curve.shape[1]]
            for steps, (axis, _, sign), begin, end in zip(curve, box, begins, ends, strict=True):
                start = begin if sign > 0 else end - 1
                torch.add(start, steps, alpha=sign, out=piece[axis])
            done += curve.shape[1]
        return out


def gilbert_order(width: int, height: int, depth: int) -> Tensor:
    """Order of the points of a grid along the generalised Hilbert curve.

    Consecutive points are neighbours where every extent is even; with odd ones some steps are
    diagonal or pass over a point or two.

    Returns:
        int64 [width * height * depth], curve position -> x + width * (y + height * z).

    Raises:
        ValueError: an extent is less than 1.

    Source: github.com/jakubcerveny/gilbert, the 3-D curve.
    """
    extents = (width, height, depth)
    if min(extents) < 1:
        raise ValueError(
            f"width, height and depth must be at least 1; got {width}, {height}, {depth}"
        )
    strides = (1, width, width * height)
    # The longest axis (the first of equals) leads; the others keep their order.
    leading = extents.index(max(extents))
    axes = [leading, *(axis for axis in range(3) if axis != leading)]
    curve = _Walk().curve(tuple(extents[axis] for axis in axes), (1, 1, 1))
    order = torch.zeros(curve.shape[1], dtype=torch.int64)
    for axis, steps in zip(axes, curve, strict=True):
        order += strides[axis] * steps.long()
    return order
