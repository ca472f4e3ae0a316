"""Block importance: how much the best of a query block's rows sees in each key block."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.twins import Twins, how_far
from .quantized import round_keys, round_rows, scores_in_8_bits
from .sampling import QUARTER, Sample

# Scores held at once, in elements of 4 bytes; there are two such buffers.
# A CPU keeps them in its cache; other devices pay for every launch.
CHUNK_ELEMENTS = {"cpu": 2**18}
CHUNK_ELEMENTS_ELSEWHERE = 2**24


def check_heads(q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless q and k have as many heads of one size."""
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q and k are [batch, heads, tokens, head_dim] with equal batch, heads and head_dim; "
            f"got {list(q.shape)} and {list(k.shape)}"
        )


def check_sampled(q: Tensor, k: Tensor, tokens_per_q_block: int, tokens_per_k_block: int) -> None:
    """Raise ValueError unless q and k are whole blocks of sampled tokens that fit each other."""
    check_heads(q, k)
    for name, x, tokens in (("q", q, tokens_per_q_block), ("k", k, tokens_per_k_block)):
        if tokens < 1 or x.shape[2] < 1 or x.shape[2] % tokens:
            raise ValueError(
                f"{name} has {x.shape[2]} sampled tokens, which are not whole blocks of "
                f"tokens_per_{name}_block={tokens}"
            )


def _block_maxima(q: Tensor, k: Tensor, maxima: Tensor, scores: Tensor) -> None:
    """maxima[g, r, j] = max over tokens c of block j of q[g, r] . k[g, j, c].

    q: [G, R, D]; k: [G, N, tokens, D]; maxima, scores: [G, R, N]. One product per position in
    the block, over all blocks at once: the maximum then runs along memory.
    """
    for position, keys in enumerate(k.unbind(2)):
        into = scores if position else maxima
        torch.bmm(q, keys.transpose(1, 2), out=into)
        if position:
            torch.maximum(maxima, scores, out=maxima)


def _score_chunk(q: Tensor, k: Tensor, maxima: Tensor, scores: Tensor, out: Tensor) -> None:
    """Importance of some query blocks. q: [G, m, rows, D], scaled; out: [G, m, N]."""
    groups, blocks, rows, head_dim = q.shape
    shape = (groups, blocks * rows, k.shape[1])
    size = shape[0] * shape[1] * shape[2]
    maxima, scores = maxima[:size].view(shape), scores[:size].view(shape)
    _block_maxima(q.reshape(groups, blocks * rows, head_dim), k, maxima, scores)
    maxima -= maxima.amax(-1, keepdim=True)
    # exp is monotone: the maximum over rows first leaves it fewer values.
    torch.amax(maxima.view(groups, blocks, rows, -1), dim=2, out=out)
    out.exp_()
    out /= out.sum(-1, keepdim=True)


def _importance(
    q: Tensor, k: Tensor, rows: int, tokens: int, scale: float, mean: Tensor | None = None
) -> Tensor:
    """block_importance in torch; with k's mean, fp32 [B, H, D], as if in 8 bits."""
    batch, heads, q_tokens, _ = q.shape
    blocks, num_k_blocks = q_tokens // rows, k.shape[2] // tokens
    out = torch.empty((batch, heads, blocks, num_k_blocks), dtype=torch.float32, device=q.device)

    elements = CHUNK_ELEMENTS.get(q.device.type, CHUNK_ELEMENTS_ELSEWHERE)
    blocks_at_once = min(blocks, max(1, elements // (rows * num_k_blocks)))
    heads_at_once = min(heads, max(1, elements // (blocks_at_once * rows * num_k_blocks)))
    scratch = out.new_empty(2, heads_at_once * blocks_at_once * rows * num_k_blocks)
    maxima, scores = scratch.unbind()
    for sample in range(batch):
        for head in range(0, heads, heads_at_once):
            group = slice(head, head + heads_at_once)
            keys = k[sample, group].float().unflatten(1, (num_k_blocks, tokens))
            if mean is not None:
                keys = round_keys(keys, mean[sample, group])
            for block in range(0, blocks, blocks_at_once):
                last = min(block + blocks_at_once, blocks)
                queries = q[sample, group, block * rows : last * rows].float()
                if mean is not None:
                    queries = round_rows(queries)
                _score_chunk(
                    (queries * scale).unflatten(1, (last - block, rows)),
                    keys,
                    maxima,
                    scores,
                    out[sample, group, block:last],
                )
    return out


def block_importance(
    q: Tensor,
    k: Tensor,
    *,
    tokens_per_q_block: int,
    tokens_per_k_block: int,
    scale: float | None = None,
    twins: Twins | None = None,
) -> Tensor:
    """Share of each key block in what a query block's sampled rows attend to at their best.

    a(r, j) is row r's largest logit in key block j; importance(i, j) is the maximum over block
    i's rows of exp(a(r, j) - max_j' a(r, j')), and every row of importance sums to 1. A maximum
    statistic, not attention mass.

    Args:
        q: [B, H, M * tokens_per_q_block, D], sampled; k: [B, H, N * tokens_per_k_block, D];
            any float dtype and strides.
        scale: of the logits; 1 / sqrt(D) by default.
        twins: what a caller keeps of failures over its calls, on CUDA.

    Returns:
        fp32 [B, H, M, N]. Products and scores are fp32, whatever the inputs: ties in a narrower
        type favour early blocks. Scratch is bounded by a constant plus one query block's rows.

    Raises:
        ValueError: the shapes do not fit.

    Source: arXiv 2512.04025, block importance.
    """
    check_sampled(q, k, tokens_per_q_block, tokens_per_k_block)
    if scale is None:
        scale = q.shape[3] ** -0.5

    def wrong(found: Tensor) -> str | None:
        want = _importance(q[:1, :1], k[:1, :1], tokens_per_q_block, tokens_per_k_block, scale)
        return how_far(found[:1, :1], want)

    found = (twins or Twins(checks=False)).run(
        f"{__package__}.triton_importance",
        q,
        lambda twin: twin.refuses(q, k, tokens_per_q_block, scale),
        lambda twin: twin.importance(
            q,
            k,
            tokens_per_q_block=tokens_per_q_block,
            tokens_per_k_block=tokens_per_k_block,
            scale=scale,
        ),
        wrong,
        (q.shape[3], q.dtype, tokens_per_q_block, tokens_per_k_block),
    )
    if found is not None:
        return found
    return _importance(q, k, tokens_per_q_block, tokens_per_k_block, scale)


def token_importance(
    q: Tensor,
    k: Tensor,
    *,
    block_m: int,
    block_n: int,
    scale: float,
    queries: Sample = QUARTER,
    twins: Twins | None = None,
) -> Tensor:
    """block_importance of the sampled tokens of whole q and k, in 8 bits where those are fast.

    See `quantized.scores_in_8_bits`.

    Args:
        q, k: [B, H, N, D], any lengths, strides and float dtype.
        block_m, block_n: tokens per query block and key block, multiples of queries.stride, of 4.
        queries: which of q's tokens count.
        twins: as in block_importance.

    Returns:
        fp32 [B, H, ceil(q tokens / block_m), ceil(k tokens / block_n)].

    Raises:
        ValueError: q and k do not have the same batch, heads and head_dim.
    """
    check_heads(q, k)
    rows, tokens = queries.per_block(block_m), QUARTER.per_block(block_n)
    int8 = scores_in_8_bits(q.device)
    sample = {"queries": queries, "block_m": block_m, "block_n": block_n}

    def in_torch(q: Tensor, k: Tensor) -> Tensor:
        mean = QUARTER.mean(k) if int8 else None
        q, k = queries.tokens(q, block_m), QUARTER.tokens(k, block_n)
        return _importance(q, k, rows, tokens, scale, mean)

    # The twin reads q's sample where it is.
    found = (twins or Twins(checks=False)).run(
        f"{__package__}.triton_importance",
        q,
        lambda twin: twin.refuses(q, k, rows, scale, int8=int8),
        lambda twin: twin.sampled_importance(q, k, **sample, scale=scale, int8=int8),
        lambda found: how_far(found[:1, :1], in_torch(q[:1, :1], k[:1, :1])),
        (q.shape[3], q.dtype, *sample.values()),
    )
    return in_torch(q, k) if found is None else found
