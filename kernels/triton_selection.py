"""The largest values of a row by bisection of their bits, for Triton kernels that hold a row whole.

Where the n-th largest value lies is found bit by bit from the highest, one count over the row a
bit: no sort, and no exchange of values between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-(2**31))


@triton.jit
def ordered_bits(x):
    """int32 that are ordered as the fp32 values are; -0.0 comes below 0.0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def edge_of_count(bits, wanted, SIGNED: tl.constexpr, guess=None):
    """The wanted-th largest of bits; above all of them if none is wanted.

    SIGNED: some that are wanted may be negative. guess: not negative, tried first.
    """
    found = 0
    steps = 31
    if SIGNED:
        found = tl.where(tl.sum((bits >= 0).to(tl.int32), 0) >= wanted, 0, _LOWEST)
    if guess is not None:
        above = tl.sum((bits > guess).to(tl.int32), 0)
        right = (above < wanted) & (tl.sum((bits >= guess).to(tl.int32), 0) >= wanted)
        found = tl.where(right, guess, found)
        steps = tl.where(right, 0, steps)
    for step in tl.range(0, steps):
        trial = found | (1 << (30 - step))
        found = tl.where(tl.sum((bits >= trial).to(tl.int32), 0) >= wanted, trial, found)
    return found


@triton.jit
def count_within(bits, values, limit, total, length):
    """How many of the largest values add up to no more than the limit; length if all do.

    bits: of the values, which are not negative, in int32; total: their sum. Returns that and the
    bits of the first value that does not fit, 0 where all do.
    """
    edge = 0  # of the first one that does not fit
    for step in tl.range(0, 31):
        trial = edge | (1 << (30 - step))
        edge = tl.where(tl.sum(tl.where(bits >= trial, values, 0.0), 0) > limit, trial, edge)
    above = bits > edge
    left = limit - tl.sum(tl.where(above, values, 0.0), 0)
    # Of equal values at the edge, as many as still fit.
    value = (bits * 0 + edge).to(tl.float32, bitcast=True)
    fitting = tl.max(tl.math.floor(left / value).to(tl.int32), 0)
    count = tl.sum(above.to(tl.int32), 0) + fitting
    return tl.where(limit >= total, length, tl.minimum(count, length)), edge


@triton.jit
def end_of_first(chosen, count):
    """Before which place the first `count` that are chosen lie, in a row of less than 2**14.

    Bisected too: a scan takes far more registers.
    """
    place = tl.arange(0, chosen.shape[0])
    # Mostly all are wanted, and there is nothing to look for.
    too_many = tl.sum(chosen.to(tl.int32), 0) > count
    end = tl.where(too_many, 0, 1 << 14)  # before it no more than count are chosen
    for step in tl.range(0, tl.where(too_many, 14, 0)):
        trial = end | (1 << (13 - step))
        end = tl.where(tl.sum((chosen & (place < trial)).to(tl.int32), 0) > count, end, trial)
    return end


@triton.jit
def edge_and_end(bits, count, SIGNED: tl.constexpr, guess=None):
    """Of the count largest, the least value, and before which place its last one lies."""
    edge = edge_of_count(bits, count, SIGNED, guess)
    end = end_of_first(bits == edge, count - tl.sum((bits > edge).to(tl.int32), 0))
    return edge, end


@triton.jit
def is_among(bits, edge, end):
    """Mask of what edge_and_end bounds: the largest, of equal ones the first."""
    return (bits > edge) | ((bits == edge) & (tl.arange(0, bits.shape[0]) < end))


@triton.jit
def largest(bits, count, SIGNED: tl.constexpr):
    """Mask of the count largest; of equal ones the first."""
    edge, end = edge_and_end(bits, count, SIGNED)
    return is_among(bits, edge, end)
