"""Sparge's dynamic block map: which key blocks each query block attends to.

Every block is stood for by its mean token. Where the tokens of a block are alike the mean says
enough to predict attention between blocks; where they are not, the block is kept
(arXiv 2502.18137; thu-ml/SpargeAttn).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.autocast import without_autocast
from ..kernels.twins import TORCH_ONLY, Twins, how_far
from .group_scores import TILE_GROUPS, GroupScores
from .statistics import block_statistics
from .thresholds import Counts, Threshold, check_threshold, on_device, per_head, topk_counts

# Scores looked at together: to rank them takes 100 to 180 MiB.
CHUNK_SCORES = 2**22


def block_map(
    q: Tensor,
    k: Tensor,
    *,
    block_q: int = 128,
    block_k: int = 64,
    simthreshd1: Threshold,
    cdfthreshd: Threshold | None = None,
    topk: Threshold | None = None,
    attention_sink: bool = False,
    scale: float | None = None,
    subtract_key_mean: bool = False,
    groups: tuple[int, int] | None = None,
    pooled: bool = False,
    twins: Twins | None = None,
) -> Tensor:
    """Block map of one attention call.

    A key block is kept for a query block if its score, as published the product of the mean tokens,
    is among the highest. Query and key blocks that are not self-similar (mean pairwise cosine at
    most simthreshd1, ragged, or not finite) keep their whole row or column, and such key blocks do
    not compete.

    Args:
        q: [B, H, N, D]; k: [B, H, N', D]; fp32, bf16 or fp16, any strides.
        block_q, block_k: tokens per block.
        simthreshd1: number, or one per head (list or tensor [H]). A head at infinity is dense.
        cdfthreshd: keep the highest scores while their softmax sums up to at most this.
        topk: keep this share of the key blocks. Exactly one of cdfthreshd and topk is given.
        attention_sink: keep the first key block for every query.
        scale: of the logits; 1 / sqrt(D) by default.
        subtract_key_mean: subtract the mean key of the sequence first, which leaves the softmax
            as it is and lets self-similarity see what tells keys apart. The published attention
            calls do so before they make their map; the published map on its own does not.
        groups: queries and keys of a group, to score by GroupScores in place of the product of
            the mean tokens.
        pooled: of GroupScores.
        twins: what a caller keeps of failures over its calls, on CUDA.

    Returns:
        bool [B, H, ceil(N / block_q), ceil(N' / block_k)].

    Raises:
        ValueError: q and k do not fit, a threshold is out of range or has another count than
            heads, or not exactly one of cdfthreshd and topk is given.
    """
    if q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q and k have the same samples, heads and head dim; got {list(q.shape)} and "
            f"{list(k.shape)}"
        )
    heads = q.shape[1]
    check_threshold("simthreshd1", simthreshd1, -math.inf, math.inf, heads)
    if (cdfthreshd is None) == (topk is None):
        raise ValueError(
            "give exactly one of cdfthreshd and topk; got "
            + ("neither" if topk is None else f"cdfthreshd={cdfthreshd} and topk={topk}")
        )
    for name, value in (("cdfthreshd", cdfthreshd), ("topk", topk)):
        if value is not None:
            check_threshold(name, value, 0.0, 1.0, heads)

    mean_key = None
    if subtract_key_mean and (groups is None or not _only_ragged_are_apart(simthreshd1)):
        mean_key = k.mean(dim=2, keepdim=True, dtype=torch.float32)
    twins = twins or Twins(checks=False)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    score: Callable[[int, int], Tensor]
    if groups is not None:
        of_groups = GroupScores(
            q, k, block_q=block_q, block_k=block_k, groups=groups, pooled=pooled, scale=scale,
            centered=subtract_key_mean, twins=twins,
        )  # fmt: skip
        score = of_groups.rows
        # As the similarity of the published scores: one that is NaN exceeds no threshold.
        q_finite, k_finite = of_groups.finite()
        q_alike = _alike(q, block_q, None, simthreshd1, twins) & q_finite
        k_alike = _alike(k, block_k, mean_key, simthreshd1, twins) & k_finite
    else:
        similar = per_head(simthreshd1, q.device)
        of_q = block_statistics(q, block_q, twins=twins)
        of_k = block_statistics(k, block_k, mean_key, twins)
        q_alike, k_alike = of_q.similarity > similar, of_k.similarity > similar
        q_mean, k_mean = of_q.mean.float() * scale, of_k.mean.float()
        score = functools.partial(_mean_scores, q_mean, k_mean)

    num_q_blocks, num_k_blocks = q_alike.shape[-1], k_alike.shape[-1]
    kept = torch.empty(*q_alike.shape, num_k_blocks, dtype=torch.bool, device=q.device)
    counts = None if topk is None else topk_counts(topk, num_k_blocks)
    limit = None if cdfthreshd is None else per_head(cdfthreshd, q.device)
    rows = max(1, CHUNK_SCORES // max(1, q.shape[0] * heads * num_k_blocks))
    if groups is not None:
        tile = max(1, TILE_GROUPS * groups[0] // block_q)
        rows = max(tile, rows - rows % tile)  # no tile of the twin's is half empty
    for first in range(0, num_q_blocks, rows):
        scores = score(first, min(first + rows, num_q_blocks))
        _keep_rows(kept, scores, q_alike, k_alike, first, counts, limit, attention_sink, twins)
    return kept


def _only_ragged_are_apart(simthreshd1: Threshold) -> bool:
    """The mean cosine over all pairs is the squared length of a mean: never below 0."""
    return isinstance(simthreshd1, int | float) and simthreshd1 < 0


def _alike(
    x: Tensor, block: int, center: Tensor | None, simthreshd1: Threshold, twins: Twins
) -> Tensor:
    """bool [B, H, blocks]: which blocks are self-similar, their tokens being finite."""
    if _only_ragged_are_apart(simthreshd1):
        batch, heads, tokens, _ = x.shape
        alike = torch.ones(batch, heads, -(-tokens // block), dtype=torch.bool, device=x.device)
        if tokens % block:
            alike[..., -1] = False
        return alike
    return block_statistics(x, block, center, twins).similarity > per_head(simthreshd1, x.device)


def _mean_scores(q_mean: Tensor, k_mean: Tensor, first: int, last: int) -> Tensor:
    """fp32 [B, H, last - first, N]: products of the mean tokens of query and key blocks."""
    # Hosts that run a model under autocast would have them rounded, which ranks blocks anew.
    with without_autocast(q_mean.device.type):
        return torch.matmul(q_mean[:, :, first:last], k_mean.transpose(-1, -2))


def _keep_rows(
    kept: Tensor,
    scores: Tensor,
    q_alike: Tensor,
    k_alike: Tensor,
    first: int,
    counts: Counts | None,
    limit: float | Tensor | None,
    attention_sink: bool,
    twins: Twins,
) -> None:
    """Fill the rows of `kept` [B, H, M, N] from `first` on that scores [B, H, rows, N] are for."""
    chunk = slice(first, first + scores.shape[2])

    def wrong(done: bool) -> str | None:
        """By what torch keeps of the first head."""
        count = counts if counts is None or isinstance(counts, int) else counts[:1]
        most = limit[:, :1] if isinstance(limit, Tensor) else limit
        want = torch.empty_like(kept[:1, :1])
        of_head = scores[:1, :1].clone(), q_alike[:1, :1], k_alike[:1, :1]
        _keep_rows(want, *of_head, first, count, most, attention_sink, TORCH_ONLY)
        return how_far(kept[:1, :1, chunk], want[:, :, chunk]) if done else None

    done = twins.run(
        f"{__package__}.triton_select",
        scores,
        lambda twin: twin.refuses(scores.shape[-1]),
        lambda twin: twin.select(
            scores,
            q_alike,
            k_alike,
            kept,
            first_row=first,
            counts=on_device(counts, scores.device),
            limit=limit,
            attention_sink=attention_sink,
        ),
        wrong,
        (scores.shape[-1], scores.dtype, counts is None),
    )
    if done:
        return
    k_apart = ~k_alike.unsqueeze(-2)  # [B, H, 1, N]
    scores.masked_fill_(k_apart, -torch.inf)
    if counts is not None:
        chosen = _highest_count(scores, counts)
    else:
        assert limit is not None
        chosen = _highest_mass(scores, limit)
    chosen |= k_apart
    kept[:, :, chunk] = chosen | ~q_alike[:, :, chunk, None]
    if attention_sink:
        kept[:, :, chunk, 0] = True


def _highest_count(scores: Tensor, counts: Counts) -> Tensor:
    """The `counts` highest scores of every row, of equal ones the first, as a mask.

    In fp32 alone: other numbers are not ranked, or not rightly, on every device.
    """
    # What is no number is kept, where checks of outputs find it.
    scores = scores.nan_to_num_(torch.inf, torch.inf, -torch.inf)
    count: int | Tensor
    if isinstance(counts, int):
        count = counts
        lowest = scores.topk(counts, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    else:
        most = scores.shape[-1] if isinstance(counts, Tensor) else max(counts)
        count = torch.as_tensor(counts).to(scores.device, non_blocking=True).view(-1, 1, 1)
        ranked = scores.topk(most, dim=-1).values
        lowest = ranked.gather(-1, (count - 1).expand(*scores.shape[:3], 1))
    chosen = scores > lowest
    room = count - chosen.sum(-1, keepdim=True, dtype=torch.int32)
    equal = scores == lowest
    return chosen.logical_or_(equal.logical_and_(equal.cumsum(-1, dtype=torch.int32) <= room))


def _highest_mass(scores: Tensor, limit: float | Tensor) -> Tensor:
    """The highest scores of every row whose softmax sums up to at most `limit`, as a mask."""
    mass, highest = scores.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    limit = limit.unsqueeze(-1) if isinstance(limit, Tensor) else limit
    # A sum of all may round to more than 1.
    within = mass.cumsum_(dim=-1).clamp_(max=1.0) <= limit
    within[..., 0] = True
    return torch.zeros_like(within).scatter_(-1, highest, within)
