"""Stand-ins for the external block-sparse kernels, which read a plan in their own forms."""

from typing import NamedTuple

import torch

from .conftest import exact, over_tokens


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None


def attend_lists(q, k, v, scale, counts, indices, size):
    """[B, N, H, D] attention over lists, row by row."""
    batch, tokens, heads, _ = q.shape
    mask = torch.zeros(batch, heads, *indices.shape[2:], dtype=torch.bool)
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape[:3])).tolist():
        shared = (min(b, counts.shape[0] - 1), min(h, counts.shape[1] - 1), row)
        mask[b, h, row, indices[shared][: counts[shared]].long()] = True
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    allowed = over_tokens(mask, size, (tokens, k.shape[2]))
    return exact(q, k, v, scale, allowed).to(q.dtype).transpose(1, 2).contiguous()


def flash4(stand_in, calls):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, block_sparse_tensors=None):
        given = block_sparse_tensors
        assert not causal and given.mask_block_cnt.sum() == 0
        calls.add(q, k, v, size=given.block_size)
        lists = given.full_block_cnt, given.full_block_idx
        return attend_lists(q, k, v, softmax_scale, *lists, given.block_size)

    stand_in("flash_attn.cute", flash_attn_func=flash_attn_func)
    stand_in("flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=BlockSparseTensorsTorch)


def attend_mask(q, k, v, scale, mask_id, size):
    """Heads-first attention over a full, contiguous int8 mask of exactly the expected shape."""
    tokens = (q.shape[2], k.shape[2])
    blocks = tuple(-(-n // side) for n, side in zip(tokens, size, strict=True))
    assert mask_id.dtype == torch.int8 and mask_id.is_contiguous()
    assert mask_id.shape == (*q.shape[:2], *blocks)
    return exact(q, k, v, scale, over_tokens(mask_id, size, tokens)).to(q.dtype)


def spas(stand_in, calls):
    def block_sparse_sage2_attn_cuda(
        q,
        k,
        v,
        mask_id=None,
        dropout_p=0.0,
        scale=None,
        smooth_k=True,
        pvthreshd=50,
        attention_sink=False,
        tensor_layout="HND",
        return_sparsity=False,
    ):
        size = (64, 128) if torch.cuda.get_device_capability() == (9, 0) else (128, 64)
        assert smooth_k and pvthreshd >= 20 and not attention_sink and not return_sparsity
        assert tensor_layout == "HND"
        calls.add(q, k, v, size=size)
        return attend_mask(q, k, v, scale, mask_id, size).contiguous()

    stand_in("spas_sage_attn", block_sparse_sage2_attn_cuda=block_sparse_sage2_attn_cuda)


def sparse_sage(stand_in, calls):
    def sparse_sageattn(q, k, v, mask_id=None, is_causal=False, tensor_layout="HND"):
        assert not is_causal
        calls.add(q, k, v, size=(128, 64), tensor_layout=tensor_layout)
        if tensor_layout == "HND":
            return attend_mask(q, k, v, None, mask_id, (128, 64))
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = attend_mask(*heads_first, None, mask_id, (128, 64))
        return out.transpose(1, 2).contiguous()

    stand_in("sparse_sageattn", sparse_sageattn=sparse_sageattn)


LIBRARIES = {"flash_attn4": flash4, "spas_sage_attn": spas, "sparse_sageattn": sparse_sage}
