"""Kernels for the tests of the stand-in."""

import triton
import triton.language as tl


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def twice_kernel(X, Out, count, BLOCK: tl.constexpr):
    """Out = 2 X, of any type; grid: count / BLOCK programs."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < count)
    tl.store(Out + at, _twice(x) + tl.zeros([BLOCK], X.dtype.element_ty), mask=at < count)


@triton.jit
def product_kernel(A, B, Out, steps, SIZE: tl.constexpr):
    """Out = the sum of so many products of squares of fp16, one after the other in memory."""
    rows = tl.arange(0, SIZE)
    at = rows[:, None] * SIZE + rows[None, :]
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for step in range(steps):
        first = step * SIZE * SIZE
        total += tl.dot(tl.load(A + first + at), tl.load(B + first + at))
    tl.store(Out + at, total)
