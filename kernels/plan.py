"""BlockPlan: which key blocks every query block attends to, and at what resolution.

A policy makes a plan, a kernel consumes it; neither knows the other. Level 1 is full
resolution; level h replaces a key block by the means of its groups of h consecutive tokens,
each with bias ln(tokens in the group) (arXiv 2512.04025). The pooled remainder is the coarsest
level, one mean per skipped block; plain, or weighted for the queries of `pool_rows` query blocks
(weighted_means.py). A skipped block without it is not listed at all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .lists import filled_up, packed_lists, strided_lists

if TYPE_CHECKING:
    from PIL import Image

PYRAMID_LEVELS = (1, 2, 4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)
# A plan may have smaller ones, which only the torch kernel takes: miniatures are measured with
# blocks as small for their frames as these are for real ones (benchmarks/fine_blocks.py).
PLAN_BLOCK_SIZES = (4, 8, *BLOCK_SIZES)
MAX_ENTRIES = 2**31 - 1


def check_pairs(sequences: int, tokens: int, block_m: int, block_n: int) -> None:
    """Raise ValueError for more pairs of blocks than lists can have, before any is made.

    Args:
        sequences: samples times heads. tokens: of queries, and as many keys.
    """
    _check_pairs(sequences * -(-tokens // block_m) * -(-tokens // block_n))


def _check_pairs(pairs: int) -> None:
    if pairs > MAX_ENTRIES:
        raise ValueError(
            f"{pairs} block pairs exceed the limit of {MAX_ENTRIES}; use larger blocks"
        )


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Key-block lists per (batch or 1, head or 1, query block).

    Attributes:
        block_m, block_n: tokens per query block and per key block; the last ones may be ragged.
        q_len, k_len: tokens in q and in k and v.
        levels: the levels that may occur, ascending, e.g. (1,), (1, 2, 4, 8) or (1, 128).
        indices: int32 [entries], key-block numbers.
        bounds: int32 [B or 1, H or 1, M, len(levels) + 1]; the entries of row i at levels[l] are
            indices[bounds[b, h, i, l] : bounds[b, h, i, l + 1]], ascending.
        pool_rows: 0 if the pooled remainder's means are plain; else adjacent query blocks whose
            mean query weighs them.

    A batch or head extent of 1 is shared by all samples or heads. Every row has an entry.
    """

    block_m: int
    block_n: int
    q_len: int
    k_len: int
    levels: tuple[int, ...]
    indices: Tensor
    bounds: Tensor
    pool_rows: int = 0

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        *,
        block_m: int,
        block_n: int,
        q_len: int,
        k_len: int,
        pooled_remainder: bool = False,
        pool_rows: int = 0,
        packed: bool = True,
    ) -> BlockPlan:
        """Plan from a block mask.

        Args:
            mask: bool [M, N], [H, M, N] or [B, H, M, N] with M = ceil(q_len / block_m) and
                N = ceil(k_len / block_n); True keeps the block.
            pooled_remainder: attend to every skipped block through one mean key and value
                (level block_n) instead of dropping it.
            pool_rows: of the plan, with pooled_remainder.
            packed: True for memory proportional to the kept blocks and a check that no row is
                empty, at one device sync; False for plans made inside a sampling step.

        Raises:
            ValueError: the mask is not boolean, has another shape, or leaves a row empty.
        """
        if mask.dtype != torch.bool:
            raise ValueError(f"a block mask is boolean; got {mask.dtype}")
        return cls.from_levels(
            mask.view(torch.int8),
            block_m=block_m,
            block_n=block_n,
            q_len=q_len,
            k_len=k_len,
            pooled_remainder=pooled_remainder,
            pool_rows=pool_rows,
            packed=packed,
            allowed=(1,),
        )

    @classmethod
    def from_levels(
        cls,
        levels: Tensor,
        *,
        block_m: int,
        block_n: int,
        q_len: int,
        k_len: int,
        pooled_remainder: bool = False,
        pool_rows: int = 0,
        packed: bool = True,
        allowed: tuple[int, ...] = PYRAMID_LEVELS,
    ) -> BlockPlan:
        """Plan from block levels.

        Args:
            levels: integer [M, N], [H, M, N] or [B, H, M, N]; 0 skips a block.
            allowed: the levels that can occur besides 0, ascending, each a divisor of block_n.
                With packed=False this is taken on trust: a value outside it is skipped.
            pooled_remainder, pool_rows, packed: as in from_mask.

        Raises:
            ValueError: a shape or a level is wrong, or a row is empty.
        """
        if block_m not in PLAN_BLOCK_SIZES or block_n not in PLAN_BLOCK_SIZES:
            raise ValueError(
                f"block sizes are one of {PLAN_BLOCK_SIZES}; got block_m={block_m}, "
                f"block_n={block_n}"
            )
        if min(q_len, k_len) < 1:
            raise ValueError(f"a plan needs tokens; got q_len={q_len}, k_len={k_len}")
        if pool_rows and not (pooled_remainder and pool_rows > 0):
            raise ValueError(
                f"pool_rows is for a pooled remainder, and at least 1; got {pool_rows} with "
                f"pooled_remainder={pooled_remainder}"
            )
        rows, columns = -(-q_len // block_m), -(-k_len // block_n)
        if levels.ndim not in (2, 3, 4) or tuple(levels.shape[-2:]) != (rows, columns):
            raise ValueError(
                f"block levels for {q_len} queries and {k_len} keys at {block_m}x{block_n} have "
                f"shape [{rows}, {columns}], with [heads] or [batch, heads] before it; got "
                f"{list(levels.shape)}"
            )
        kept = tuple(sorted(set(allowed)))
        if any(level < 1 or block_n % level for level in kept):
            raise ValueError(f"levels must divide block_n={block_n}; got {kept}")
        if levels.dtype.is_floating_point or levels.dtype == torch.bool:
            raise ValueError(f"block levels are integers; got {levels.dtype}")
        levels = levels.reshape((1,) * (4 - levels.ndim) + tuple(levels.shape))
        if packed:
            present = set(levels.unique().tolist())
            if not present <= {0, *kept}:
                raise ValueError(
                    f"block levels are 0 or one of {kept}; got {sorted(present - {0, *kept})}"
                )
            kept = tuple(level for level in kept if level in present) or kept[:1]
        if pooled_remainder:
            kept = tuple(sorted({*kept, block_n}))
        _check_pairs(levels.numel())
        if packed:
            levels = filled_up(levels, block_n) if pooled_remainder else levels
            indices, bounds = packed_lists(levels, kept)
        else:
            indices, bounds = strided_lists(levels, kept, pooled_remainder)
        plan = cls(block_m, block_n, q_len, k_len, kept, indices, bounds, pool_rows)
        if packed and bool((plan.entries_per_row() == 0).any()):
            raise ValueError("a query block attends to no key block; every row needs at least one")
        return plan

    @classmethod
    def full(
        cls,
        q_len: int,
        k_len: int,
        *,
        device: torch.device | str,
        block_m: int = 128,
        block_n: int = 128,
    ) -> BlockPlan:
        """Every key block for every query block: dense attention. All rows share one list.

        No device sync.
        """
        if min(q_len, k_len) < 1:
            raise ValueError(f"a plan needs tokens; got q_len={q_len}, k_len={k_len}")
        rows, columns = -(-q_len // block_m), -(-k_len // block_n)
        indices = torch.arange(columns, dtype=torch.int32, device=device)
        ends = torch.arange(0, columns + 1, columns, dtype=torch.int32, device=device)
        bounds = ends.expand(1, 1, rows, 2)
        return cls(block_m, block_n, q_len, k_len, (1,), indices, bounds)

    @property
    def num_q_blocks(self) -> int:
        return -(-self.q_len // self.block_m)

    @property
    def num_k_blocks(self) -> int:
        return -(-self.k_len // self.block_n)

    @property
    def device(self) -> torch.device:
        return self.indices.device

    @property
    def nbytes(self) -> int:
        """Bytes held by the lists."""
        return self.indices.nbytes + self.bounds.nbytes

    def counts(self) -> Tensor:
        """int32 [B or 1, H or 1, M, len(levels)]: entries per row and level."""
        return self.bounds.diff(dim=-1)

    def entries_per_row(self) -> Tensor:
        """int32 [B or 1, H or 1, M]."""
        return self.bounds[..., -1] - self.bounds[..., 0]

    def density_tensor(self) -> Tensor:
        """Mean over block pairs of 1 / level (0 where skipped): fp32 scalar, no device sync."""
        # Added up level by level: a tensor of weights would have to be copied from the host.
        kept = self.counts().float().mean(dim=(0, 1, 2)).unbind(-1)
        shares = [1.0 / (level * self.num_k_blocks) for level in self.levels]
        density = kept[0] * shares[0]
        for count, share in zip(kept[1:], shares[1:], strict=True):
            density = torch.add(density, count, alpha=share)
        return density

    @functools.cached_property
    def _density(self) -> float:
        return float(self.density_tensor())

    def density(self) -> float:
        """Mean over block pairs of 1 / level; 1.0 is dense attention. Syncs once per plan."""
        return self._density

    def flops(self, head_dim: int, *, batch: int = 1, heads: int = 1) -> float:
        """Multiply-adds times two of both products over the listed blocks, whole blocks counted.

        Args:
            batch, heads: of the call; the plan's own where it is not shared.
        """
        pairs = self.density() * self.num_q_blocks * self.num_k_blocks * batch * heads
        return 4.0 * pairs * self.block_m * self.block_n * head_dim

    def to_levels(self) -> Tensor:
        """int16 [B or 1, H or 1, M, N]: the level of every block, 0 where skipped."""
        bounds = self.bounds.long()
        lengths = bounds.diff(dim=-1).flatten()
        segments = torch.arange(lengths.numel(), device=self.device).repeat_interleave(lengths)
        entry = torch.arange(segments.numel(), device=self.device)
        first = (lengths.cumsum(0) - lengths)[segments]
        entry = bounds[..., :-1].flatten()[segments] + entry - first
        out = torch.zeros(
            (*self.bounds.shape[:3], self.num_k_blocks), dtype=torch.int16, device=self.device
        )
        value = torch.tensor(self.levels, dtype=torch.int16, device=self.device)
        row = segments // len(self.levels)
        flat = row * self.num_k_blocks + self.indices[entry].long()
        out.view(-1)[flat] = value[segments % len(self.levels)]
        return out

    def on_device(self, device: torch.device | str) -> BlockPlan:
        """The same plan with its lists on another device."""
        if self.device == torch.device(device):
            return self
        return replace(self, indices=self.indices.to(device), bounds=self.bounds.to(device))

    def to_image(self, *, batch: int = 0, head: int | None = None, cell: int = 2) -> Image.Image:
        """Picture of the plan: a row per query block, white = full resolution, black = skipped.

        Args:
            batch: the sample; any one where samples share the plan.
            head: one head (any one where heads share the plan), or None for their mean.
            cell: pixels per block.
        """
        from PIL import Image

        levels = self.to_levels()
        levels = levels[batch if levels.shape[0] > 1 else 0].float()
        kept = torch.where(levels > 0, 1.0 / levels.clamp(min=1), torch.zeros_like(levels))
        shade = kept.mean(0) if head is None else kept[head if kept.shape[0] > 1 else 0]
        # The square root keeps coarse levels apart from skipped ones in the picture.
        pixels = shade.sqrt().mul(255).round().to(torch.uint8).cpu()
        pixels = pixels.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        return Image.fromarray(pixels.numpy())
