"""Triton function: fold one tile of keys and values into the running softmax of a query block.

Online softmax (arXiv 2112.05682) in base 2, fp32 statistics. In 8 bits: int8 queries and keys
with one scale per row and per key block (arXiv 2411.10958), fp8 weights and values.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The float 1.5 * 2**23 holds an integer below 2**22 in its last bits, so adding its bits turns
# an integer into a float. The conversion instruction would share a slow unit with exp2.
MINUS_FLOAT_BITS: tl.constexpr = tl.constexpr(-0x4B400000)
FLOAT_ZERO: tl.constexpr = tl.constexpr(12582912.0)
# Weights reach fp8, and fp16 where they add up in it, as 2**8 times themselves: small ones are
# below the range of both. The division at the end cancels it.
NARROW_SHIFT: tl.constexpr = tl.constexpr(8.0)


@triton.jit
def fp8_order(position):
    """Which token, of every 16, is at a position of values stored as fp8."""
    return position // 16 * 16 + position // 2 % 2 * 8 + position % 16 // 4 * 2 + position % 2


@triton.jit
def _in_fp8_order(weights):
    """weights[:, fp8_order]: where a thread holds them and where it needs them then agree."""
    M: tl.constexpr = weights.shape[0]
    N: tl.constexpr = weights.shape[1]
    pairs = tl.reshape(weights, [M, N // 16, 2, 4, 2])
    return tl.reshape(tl.permute(pairs, [0, 1, 3, 2, 4]), [M, N])


@triton.jit
def _weighed(weights, values, acc, rescale, FP8_VALUES: tl.constexpr, FP16_SUMS: tl.constexpr):
    """acc * rescale + weights times values, as softmax_step has them."""
    if FP8_VALUES:
        # Tensor cores add fp8 products with about 14 bits: only within a tile, then in fp32.
        partial = tl.dot(_in_fp8_order(weights.to(values.dtype)), tl.trans(values))
        acc = tl.math.fma(acc, tl.broadcast_to(rescale[:, None], acc.shape), partial)
    elif FP16_SUMS:
        partial = tl.dot(weights.to(values.dtype), values, out_dtype=tl.float16)
        acc = acc * rescale[:, None] + partial.to(tl.float32)
    else:
        acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None])
    return acc


@triton.jit
def softmax_step(
    query,
    keys,
    values,
    more_values,
    acc,
    more_acc,
    row_max,
    row_sum,
    scale,
    key_scale,
    bias,
    SHIFT: tl.constexpr,
    MASKED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    KEY_SCALES: tl.constexpr,
    FP8_VALUES: tl.constexpr,
    FP16_SUMS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Returns acc, more_acc, row_max and row_sum with one tile more. Logits are in units of log2.

    query [M, D], keys [N, D]; values [N, D], or with FP8_VALUES [D, N] of fp8, tokens in fp8_order.
    SPLIT: values and acc [M, D] have the first half of the channels, more_values and more_acc the
        other; else those are not looked at.
    scale: of the products; with QUANTIZED one per row, and key_scale on top: one number, or one
        per key with KEY_SCALES.
    bias: added to the logits; a number, or with MASKED one per key (-inf: no such key).
        MASKED and QUANTIZED together need KEY_SCALES.
    SHIFT: log2 of the factor on acc and row_sum, the same in every step.
    FP16_SUMS: weights times values add up in fp16 within a tile of at most 64 values of at most 2,
        which takes half the time on some tensor cores; tiles in fp32.
    """
    products = tl.dot(query, tl.trans(keys))
    zero = 0.0
    column = scale
    if QUANTIZED:
        products = (products - MINUS_FLOAT_BITS).to(tl.float32, bitcast=True)
        if KEY_SCALES:
            # As one instruction; what its last term is rounded by is below 1 in the products.
            factor = tl.broadcast_to(key_scale[None, :], products.shape)
            offset = tl.broadcast_to((key_scale * -FLOAT_ZERO)[None, :], products.shape)
            products = tl.math.fma(products, factor, offset)
        else:
            # Stays in the products; taken off inside the exponent, where it costs nothing.
            zero = FLOAT_ZERO
            scale = scale * key_scale
        column = scale[:, None]
    if MASKED:
        logits = products * column + bias[None, :]
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        weights = tl.math.exp2(logits - (new_max - SHIFT)[:, None])
    else:
        new_max = tl.maximum(row_max, (tl.max(products, 1) - zero) * scale + bias)
        taken_off = new_max - (bias + SHIFT)
        if QUANTIZED:
            taken_off += zero * scale
        weights = tl.math.exp2(products * column - taken_off[:, None])
    rescale = tl.math.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    acc = _weighed(weights, values, acc, rescale, FP8_VALUES, FP16_SUMS)
    if SPLIT:
        more_acc = _weighed(weights, more_values, more_acc, rescale, FP8_VALUES, FP16_SUMS)
    return acc, more_acc, new_max, row_sum
