"""Plans of drawn levels, packed or each row in its own stretch."""

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan

PACKED = pytest.mark.parametrize("packed", [True, False], ids=["packed", "strided"])


def random_levels(*shape, choices=(0, 1, 2, 4, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor(choices)[torch.randint(len(choices), shape, generator=generator)]
    levels[..., 0] = 1
    return levels.to(torch.int8)


def plan_of(levels, *, block=32, ragged=5, **options):
    rows, columns = levels.shape[-2:]
    return BlockPlan.from_levels(
        levels,
        block_m=block,
        block_n=block,
        q_len=rows * block - ragged,
        k_len=columns * block - ragged,
        **options,
    )
