"""Triton kernel: what quantising needs to know beforehand, the first pass over k (and v)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def magnitude(x):
    """|x|, and infinity for NaN, which reductions drop and integers do not have.

    An infinite scale takes it to the output after all.
    """
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit(do_not_specialize=["first_head", "heads", "k_len", "chunk_tokens"])
def statistics_kernel(
    K,
    V,
    KSums,
    VLargest,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    first_head,
    heads,
    k_len,
    chunk_tokens,
    HEAD_DIM: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Grid (chunks, heads of this launch). Sums of k and, with VALUES, largest |v| per channel.

    KSums, VLargest: fp32 [heads of this launch, chunks, HEAD_DIM], one row per chunk_tokens.
    """
    head = first_head + tl.program_id(1)
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    dims = tl.arange(0, HEAD_DIM)
    lanes = tl.arange(0, 32)[:, None]
    first = tl.program_id(0) * chunk_tokens
    last = tl.minimum(first + chunk_tokens, k_len)
    sums = tl.zeros([32, HEAD_DIM], tl.float32)
    largest = tl.zeros([32, HEAD_DIM], tl.float32)
    for start in tl.range(first, last, 32):
        tokens = (start + lanes).to(tl.int64)
        at = K + tokens * stride_kn + dims[None, :]
        sums += tl.load(at, mask=tokens < last, other=0.0).to(tl.float32)
        if VALUES:
            at = V + tokens * stride_vn + dims[None, :]
            values = tl.load(at, mask=tokens < last, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, magnitude(values))
    out = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * HEAD_DIM + dims
    tl.store(KSums + out, tl.sum(sums, 0))
    if VALUES:
        tl.store(VLargest + out, tl.max(largest, 0))
