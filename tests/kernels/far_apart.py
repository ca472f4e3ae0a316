"""Attention over tensors whose elements lie more than 2**31 apart, in the interpreter's process.

The storage is a sparse file: only what is written takes room.
"""

import torch
from sparse_video_attention.kernels import block_sparse_attention

ELEMENTS = 2**31 + 2**27


def spread(path, x, stride_b, stride_h, stride_n):
    """x [B, H, N, D], laid out with these strides in the file, which is made."""
    storage = torch.from_file(path, shared=True, size=ELEMENTS, dtype=x.dtype)
    far = storage.as_strided(x.shape, (stride_b, stride_h, stride_n, 1))
    return far.copy_(x)


def attend(paths, q, k, v, plan, strides, precision):
    far = [spread(path, x, *strides) for path, x in zip(paths, (q, k, v), strict=True)]
    assert any(2**31 < x.stride(i) * (x.shape[i] - 1) for x in far for i in range(3))
    return block_sparse_attention(*far, plan, kernel="triton", precision=precision)
