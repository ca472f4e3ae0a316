"""Scores of key blocks from means of small groups of tokens: what a block's mean would miss.

A block that is not attended to in full is stood for by its mean, or left out. What that changes
depends on how unevenly a query's weights lie within the block, which block means cannot tell.
Means of GROUPS tokens can: attention between them is a small share of all attention, and says for
every block how far its groups' weights are from the one weight that the block's mean would get.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.autocast import without_autocast
from ..kernels.twins import MAX_ERROR, CannotTell, Twins

# Queries and keys of a group. In the order of Gilbert's curve 8 tokens mostly are 2 frames, rows
# and columns, 16 two such cells.
GROUPS = (16, 8)
# Groups of queries that a tile of the twin has, on most GPUs.
TILE_GROUPS = 128
# fp32 numbers held at once while means are made: 32 MiB.
MEANS_AT_ONCE = 2**23
# Logits held at once; there are a few buffers of their size. A CPU keeps them in its cache.
CHUNK_LOGITS = {"cpu": 2**18}
CHUNK_LOGITS_ELSEWHERE = 2**24
# A group's square is taken to be no less than this part of m's, which is what sums in fp32 can tell
# from 0: of blocks that their means stand for well those of more weight come first.
LEAST = 2.0**-18
# The lowest sum of squares that a score is taken of: the smallest normal fp32.
TINY = 2.0**-126


def group_means(x: Tensor, group: int, *, centered: bool = False) -> Tensor:
    """Mean of every `group` tokens; the last group may have fewer.

    Args:
        x: [B, H, N, D], any strides.
        centered: subtract from all what they are on average, before they are rounded to x's dtype.

    Returns:
        [B * H, ceil(N / group), D], contiguous, in x's dtype.
    """
    batch, heads, tokens, head_dim = x.shape
    whole = tokens // group
    out = x.new_empty(batch, heads, -(-tokens // group), head_dim)
    # A few heads at a time: their means are held in fp32, and where torch raises half precision
    # before it sums, so are their tokens.
    held = MEANS_AT_ONCE if x.is_cuda or x.dtype == torch.float32 else MEANS_AT_ONCE // group
    step = max(1, held // max(1, batch * out.shape[2] * head_dim))
    for head in range(0, heads, step):
        some = slice(head, head + step)
        means = x[:, some, : whole * group].unflatten(2, (whole, group))
        means = means.mean(dim=3, dtype=torch.float32)
        average = means.mean(dim=2, keepdim=True) if centered and whole else 0.0
        out[:, some, :whole] = means.sub_(average)
        if whole < out.shape[2]:
            rest = x[:, some, whole * group :].mean(dim=2, keepdim=True, dtype=torch.float32)
            out[:, some, whole:] = rest.sub_(average)
    return out.flatten(0, 1)


# Groups of queries whose sums of a first result are looked at, the last ones.
SUMS_CHECKED = 256


class GroupScores:
    """Scores of one call's block pairs, a few rows of query blocks at a time.

    With p(r, c) the softmax over all groups of keys of a group of queries r, and m(r, j) the same
    of the mean of block j's groups' logits, the score of query block i and key block j is

        ln sqrt( sum over r in i, c in j of (p(r, c) - m(r, j))^2 )

    which ranks blocks by how far their groups' weights are from what their mean stands for; the
    sum over c is no less than LEAST m(r, j)^2 for each group. Where nothing stands for a block that
    is left out, m is 0.

    Args:
        q: [B, H, N, D]; k: [B, H, N', D]; any strides.
        block_q, block_k: tokens per block, multiples of a group's.
        groups: queries and keys of a group.
        pooled: blocks that are left out are attended to through their mean.
        scale: of the logits.
        centered: take what keys have in common off them, which moves no score and keeps digits.
        twins: what a caller keeps of failures over its calls, on CUDA.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        *,
        block_q: int,
        block_k: int,
        groups: tuple[int, int],
        pooled: bool,
        scale: float,
        centered: bool,
        twins: Twins,
    ) -> None:
        self._sequences = q.shape[:2]
        self._queries = group_means(q, groups[0])
        self._keys = group_means(k, groups[1], centered=centered)
        self._per_q_block, self._per_k_block = block_q // groups[0], block_k // groups[1]
        self._num_k_blocks = -(-k.shape[2] // block_k)
        self._pooled, self._scale, self._twins = pooled, scale, twins
        queries, keys = self._queries, self._keys
        # fp32 [B * H, groups of queries], base 2; None where torch scores.
        self._log_sums: Tensor | None = twins.run(
            self._twin,
            q,
            lambda twin: twin.refuses(queries, self._per_q_block),
            lambda twin: twin.log_sums(queries, keys, scale=scale),
            lambda found: _sums_off(
                found[:1, -SUMS_CHECKED:],
                _log_sums(queries[:1, -SUMS_CHECKED:], keys[:1], scale),
            ),
            ("log_sums", q.shape[3], q.dtype),
        )

    _twin = f"{__package__}.triton_group_scores"

    def rows(self, first: int, last: int) -> Tensor:
        """fp32 [B, H, last - first, key blocks]: the scores of these query blocks."""
        found = None
        per_q, per_k, blocks = self._per_q_block, self._per_k_block, self._num_k_blocks
        log_sums = self._log_sums
        if log_sums is not None:
            sums = log_sums

            def wrong(found: Tensor) -> str | None:
                want = self._in_torch(first, last, 1)
                # Only a row's order matters, and its mean would hide how far that is off.
                return _off(*(x - x.mean(-1, keepdim=True) for x in (found[:1], want)))

            found = self._twins.run(
                self._twin,
                self._queries,
                lambda twin: None,
                lambda twin: twin.scores(
                    self._queries, self._keys, sums, scale=self._scale, first=first,
                    blocks=(last - first, blocks), per_block=(per_q, per_k), pooled=self._pooled,
                ),
                wrong,
                ("scores", self._keys.shape[2], self._keys.dtype, per_q, per_k, self._pooled),
            )  # fmt: skip
        if found is None:
            found = self._in_torch(first, last, self._queries.shape[0])
        return found.unflatten(0, self._sequences)

    def finite(self) -> tuple[Tensor, Tensor]:
        """bool [B, H, blocks], of query and of key blocks: those with no NaN and no infinity."""
        whole = []
        for means, per_block in (
            (self._queries, self._per_q_block),
            (self._keys, self._per_k_block),
        ):
            # A mean of what is not finite is not either, and the largest shows it.
            is_finite = torch.linalg.vector_norm(means, math.inf, dim=-1).isfinite()
            lacking = -means.shape[1] % per_block
            is_finite = torch.nn.functional.pad(is_finite, (0, lacking), value=True)
            is_finite = is_finite.unflatten(1, (-1, per_block)).all(-1)
            whole.append(is_finite.unflatten(0, self._sequences))
        return whole[0], whole[1]

    def _in_torch(self, first: int, last: int, sequences: int) -> Tensor:
        """fp32 [sequences, last - first, key blocks], of the first sequences."""
        keys = self._keys[:sequences].float()
        rows, num_keys = self._per_q_block, keys.shape[1]
        out = keys.new_empty(sequences, last - first, self._num_k_blocks)
        elements = CHUNK_LOGITS.get(keys.device.type, CHUNK_LOGITS_ELSEWHERE)
        blocks_at_once = max(1, elements // (rows * num_keys))
        at_once = max(1, elements // (min(blocks_at_once, last - first) * rows * num_keys))
        for sequence in range(0, sequences, at_once):
            some = slice(sequence, min(sequence + at_once, sequences))
            for block in range(first, last, blocks_at_once):
                end = min(block + blocks_at_once, last)
                queries = self._queries[some, block * rows : end * rows].float() * self._scale
                out[some, block - first : end - first] = self._score(queries, keys[some])
        return out

    def _score(self, queries: Tensor, keys: Tensor) -> Tensor:
        """fp32 [G, blocks, key blocks] of queries [G, groups, D], scaled, and keys [G, groups, D].

        An incomplete block is filled up with its last group.
        """
        with without_autocast(queries.device.type):
            logits = torch.bmm(queries, keys.transpose(1, 2))
        logits -= logits.logsumexp(-1, keepdim=True)
        missing = self._num_k_blocks * self._per_k_block - logits.shape[2]
        if missing:
            last = logits[..., -1:].expand(-1, -1, missing)
            logits = torch.cat([logits, last], dim=2)
        logits = logits.unflatten(2, (self._num_k_blocks, self._per_k_block))
        if self._pooled:
            of_mean = logits.mean(-1, keepdim=True).exp_()
            squares = logits.exp_().sub_(of_mean).square_().sum(-1)
            least = LEAST * self._per_k_block
            squares = torch.maximum(squares, of_mean.squeeze(-1).square_().mul_(least))
        else:
            squares = logits.exp_().square_().sum(-1)
        lacking = -squares.shape[1] % self._per_q_block
        if lacking:
            squares = torch.cat([squares, squares[:, -1:].expand(-1, lacking, -1)], dim=1)
        squares = squares.unflatten(1, (-1, self._per_q_block)).sum(2)
        return squares.clamp_(min=TINY).log_().mul_(0.5)


def _sums_off(found: Tensor, want: Tensor) -> str | None:
    """_off for sums given by their logarithms to base 2."""
    return _off(torch.exp2(found - want), torch.ones_like(want) + 0.0 * want)


def _off(found: Tensor, want: Tensor) -> str | None:
    """What is wrong with a twin's logarithms, or None. Syncs.

    Raises:
        CannotTell: torch's are not finite.
    """
    if not bool(want.isfinite().all()):
        raise CannotTell
    # Of rows that are all alike rounding is all there is.
    norm = want.norm().clamp(min=0.01 * want.numel() ** 0.5)
    error = float((found - want).norm() / norm)
    return None if error <= MAX_ERROR else f"its first result is off by {error:.2g}"


def _log_sums(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """fp32 [G, groups of queries], base 2: of the sums that their weights are shares of."""
    with without_autocast(queries.device.type):
        logits = torch.bmm(queries.float() * scale, keys.float().transpose(1, 2))
    return logits.logsumexp(-1) / math.log(2.0)
