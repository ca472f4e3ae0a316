"""The torch kernel's ways: panels and shared keys (CPUs; the latter for masks alone), and gathered
batches (other devices, but tested here). Random plans and inputs for them, and what is right.
"""

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.kernels.reference import reference_attention
from sparse_video_attention.kernels.registry import KernelCall
from sparse_video_attention.kernels.torch_gathered import attend_gathered
from sparse_video_attention.kernels.torch_panels import attend_in_panels
from sparse_video_attention.kernels.torch_shared import attend_shared

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Error of one query's output relative to its length: rounding of the output, and for the gathered
# way that of the probabilities, which torch's fused attention keeps in the inputs' dtype.
LIMITS = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def way(run):
    def attend(q, k, v, plan, scale=None):
        return run(KernelCall(q, k, v, plan, scale or q.shape[-1] ** -0.5))

    return attend


panels = way(attend_in_panels)
WAYS = {"panels": panels, "gathered": way(attend_gathered)}
BOTH = pytest.mark.parametrize("attend", WAYS.values(), ids=WAYS.keys())
MASK_WAYS = {**WAYS, "shared": way(attend_shared)}
ALL = pytest.mark.parametrize("attend", MASK_WAYS.values(), ids=MASK_WAYS.keys())


EVERY_WAY_AND_PLAN = [
    *[pytest.param(run, (0, 1), id=f"{name}-mask") for name, run in MASK_WAYS.items()],
    *[pytest.param(run, (0, 1, 2, 8), id=f"{name}-levels") for name, run in WAYS.items()],
]


def random_plan(
    q_len,
    k_len,
    *,
    extents=(),
    block_m=128,
    block_n=128,
    choices=(0, 1, 2, 4, 8),
    seed=0,
    **options,
):
    """Levels drawn from `choices`, in no order; every row keeps one block at level 1."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*extents, -(-q_len // block_m), -(-k_len // block_n))
    levels = torch.tensor(choices)[torch.randint(len(choices), shape, generator=generator)]
    kept = torch.randint(shape[-1], shape[:-1], generator=generator).unsqueeze(-1)
    levels.scatter_(-1, kept, 1)
    return BlockPlan.from_levels(
        levels.to(torch.int8), block_m=block_m, block_n=block_n, q_len=q_len, k_len=k_len, **options
    )


def random_mask_plan(q_len, k_len=None, **options):
    return random_plan(q_len, k_len or q_len, choices=(0, 1), **options)


def banded_mask(rows, columns, width):
    """Runs that neighbouring rows share, as in the masks of the methods, and a first column."""
    distance = torch.arange(rows)[:, None] * columns / rows - torch.arange(columns)
    mask = distance.abs() <= width
    mask[:, 0] = True
    return mask


def random_qkv(batch, heads, q_len, head_dim, *, k_len=None, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    # Logits of a spread of 2: attention is neither flat nor a single key.
    q = torch.randn(batch, heads, q_len, head_dim, generator=generator) * 2
    k, v = torch.randn(2, batch, heads, k_len or q_len, head_dim, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def worst_error(out, expected):
    """Largest error of a query's output relative to the expected one, both fp64."""
    error = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert not error.isnan().any()
    return error.max().item()


def check(attend, qkv, plan, **options):
    q, k, v = qkv
    out = attend(q, k, v, plan, **options)
    assert out.dtype == q.dtype
    assert worst_error(out, reference_attention(q, k, v, plan, **options)) < LIMITS[q.dtype]
    return out
