"""The largest values of a row by bisection of their bits, for Triton kernels that hold a row whole.

Where the n-th largest value lies is found by halving what it lies between, one count over the row
a time, until no other value is left there or the count is met: no sort, and no exchange of values
between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

# One more than the lowest int32: a difference of two bounds of one sign is an int32 too.
_LOWEST = tl.constexpr(-(2**31) + 1)
# Above the bits of every number.
HIGHEST = tl.constexpr(2**31 - 1)
# A factor of 2, in bits: a good first guess of how far one edge lies below the next one.
OCTAVE = tl.constexpr(2**23)


@triton.jit
def ordered_bits(x):
    """int32 that are ordered as the fp32 values are; -0.0 comes below 0.0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def count_from(bits, bound):
    """How many lie at the bound or above it."""
    return tl.sum((bits >= bound).to(tl.int32), 0)


@triton.jit
def bound_above(bits):
    """A bound that none lies at or above, but for a NaN of the largest bits."""
    return tl.minimum(tl.max(bits, 0), HIGHEST - 1) + 1


@triton.jit
def _sum_from(bits, bound):
    """The sum of the values whose bits lie at the bound or above it, which is above 0."""
    return tl.sum(tl.where(bits >= bound, bits.to(tl.float32, bitcast=True), 0.0), 0)


@triton.jit
def _between(low, high, reach):
    """The middle, but no farther than reach below high; for bounds of one sign, 2 or more apart."""
    return high - tl.minimum((high - low) >> 1, reach)


@triton.jit
def _farther(reach):
    return 4 * tl.minimum(reach, 1 << 27)


@triton.jit
def edge_of_count(bits, wanted, low, count_from_low, high, REACH: tl.constexpr):
    """A bound that `wanted` lie at or above, and how many do: more where equal values leave no such
    bound, which is then the wanted-th largest of bits.

    low, high: bounds of one sign; at least `wanted` lie at low or above, it is below high. REACH:
    how far below high it is looked for first.
    """
    reach = tl.full([], REACH, tl.int32)
    while (high - low > 1) & (count_from_low != wanted):
        trial = _between(low, high, reach)
        reach = _farther(reach)
        count = count_from(bits, trial)
        is_low = count >= wanted
        low = tl.where(is_low, trial, low)
        count_from_low = tl.where(is_low, count, count_from_low)
        high = tl.where(is_low, high, trial)
    return low, count_from_low


@triton.jit
def count_within(bits, limit, total, length, high, sum_from_high, REACH: tl.constexpr):
    """How many of the largest values add up to no more than the limit; length if all do.

    bits: int32, of the values, which are not negative; -1 for what does not count. total: their
    sum. high: a bound above the first value that does not fit, and the sum of what lies from it on.
    REACH: as in edge_of_count.

    Returns that, the bits of the first value that does not fit (of the largest below high where all
    fit), how many are larger, and their sum.
    """
    # What does not fit is spread over no more than all values: one of them is as large as that.
    share = 0.5 * (total - limit) / length
    low = tl.where(total - limit > 1e-3 * total, share.to(tl.int32, bitcast=True), 0)
    sum_from_low = total
    # Two values between the bounds are worth two of the lower one. Where that is too little for
    # a sum in fp32 to tell, bisection goes on until there is no room for two unlike ones.
    least = 1e-5 * total
    is_found = limit >= total
    reach = tl.full([], REACH, tl.int32)
    while (high - low > 1) & (is_found == 0):
        trial = _between(low, high, reach)
        reach = _farther(reach)
        found = _sum_from(bits, trial)
        is_low = found > limit
        low = tl.where(is_low, trial, low)
        sum_from_low = tl.where(is_low, found, sum_from_low)
        high = tl.where(is_low, high, trial)
        sum_from_high = tl.where(is_low, sum_from_high, found)
        value = low.to(tl.float32, bitcast=True)
        is_found = (value > least) & (sum_from_low - sum_from_high < 1.5 * value)
    edge = tl.maximum(tl.max(tl.where(bits < high, bits, -1), 0), 0)
    larger = count_from(bits, edge + 1)
    their_sum = _sum_from(bits, edge + 1)
    # Of equal values at the edge, as many as still fit.
    value = edge.to(tl.float32, bitcast=True)
    left = limit - their_sum
    fitting = tl.math.floor(left / value)
    # A GPU's quotient may be a little off.
    fitting += ((fitting + 1) * value <= left).to(tl.float32)
    fitting -= (fitting * value > left).to(tl.float32)
    count = tl.where(limit >= total, length, tl.minimum(larger + fitting.to(tl.int32), length))
    return count, edge, larger, their_sum


@triton.jit
def end_at_edge(bits, edge, too_many):
    """Before which place the equal values at an edge are taken, in a row of less than 2**14, so
    that `too_many` of them are not.

    Bisected too: a scan takes far more registers.
    """
    place = tl.arange(0, bits.shape[0])
    # Mostly all are taken, and there is nothing to look for.
    end = tl.where(too_many > 0, 0, 1 << 14)
    for step in tl.range(0, tl.where(too_many > 0, 14, 0)):
        trial = end | (1 << (13 - step))
        left_out = tl.sum(((bits == edge) & (place >= trial)).to(tl.int32), 0)
        end = tl.where(left_out >= too_many, trial, end)
    return end


@triton.jit
def is_among(bits, edge, end):
    """Mask of what lies above an edge, and at it before a place."""
    return (bits > edge) | ((bits == edge) & (tl.arange(0, bits.shape[0]) < end))


@triton.jit
def largest(bits, count, REACH: tl.constexpr):
    """Mask of the count largest, of no more than there are; of equal ones the first."""
    from_zero = count_from(bits, 0)
    is_positive = from_zero >= count
    # Of negative ones no matter how many there are: a row is shorter.
    edge, found = edge_of_count(
        bits, count, tl.where(is_positive, 0, _LOWEST), tl.where(is_positive, from_zero, 1 << 14),
        tl.where(is_positive, bound_above(bits), 0), REACH,
    )  # fmt: skip
    return is_among(bits, edge, end_at_edge(bits, edge, found - count))
