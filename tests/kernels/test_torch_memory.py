"""What the torch kernel's ways read, write and take of memory: strides, skipped blocks, sizes."""

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, torch_gathered
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .torch_ways import ALL, EVERY_WAY_AND_PLAN, check, random_mask_plan, random_plan, random_qkv


def nhd_view(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def tokens_innermost(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def every_other_element(x):
    return x.repeat_interleave(2, dim=3)[..., ::2]


def inside_a_larger_buffer(x):
    room = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 5, x.shape[3]), float("nan"))
    room[:, 1:, 3:-2] = x
    return room[:, 1:, 3:-2]


def one_head_expanded(x):
    return x[:, :1].expand_as(x)


STRIDES = [nhd_view, tokens_innermost, every_other_element, inside_a_larger_buffer]
STRIDES += [one_head_expanded]


@ALL
@pytest.mark.parametrize("layout", STRIDES, ids=lambda f: f.__name__)
def test_any_strides_and_inputs_stay_as_they_are(attend, layout):
    qkv = [layout(x) for x in random_qkv(2, 2, 333, 64)]
    before = [x.clone() for x in qkv]
    check(attend, qkv, random_mask_plan(333, extents=(2,), block_n=64))
    for x, copy in zip(qkv, before, strict=True):
        assert torch.equal(x, copy)


@ALL
def test_slices_of_one_fused_projection(attend):
    fused = torch.randn(2, 333, 3, 2, 64, generator=torch.Generator().manual_seed(5))
    qkv = [fused[:, :, i].transpose(1, 2) for i in range(3)]
    check(attend, qkv, random_mask_plan(333, block_n=64))


@ALL
def test_output_memory_is_batch_tokens_heads_dim(attend):
    q, k, v = random_qkv(2, 3, 200, 64)
    out = attend(q, k, v, random_mask_plan(200))
    assert out.shape == (2, 3, 200, 64)
    merged = out.transpose(1, 2).flatten(2)
    assert merged.data_ptr() == out.data_ptr() and merged.is_contiguous()


@pytest.mark.parametrize(("attend", "choices"), EVERY_WAY_AND_PLAN)
def test_keys_of_skipped_blocks_are_never_read_into_the_output(attend, choices):
    levels = torch.tensor(choices)[torch.arange(8 * 16).reshape(8, 16) % len(choices)]
    levels[:, 1] = 1
    skipped = [0, 3, 9, 15]  # the ragged last block among them
    levels[:, skipped] = 0
    plan = BlockPlan.from_levels(
        levels.to(torch.int8), block_m=128, block_n=64, q_len=1000, k_len=1000
    )
    q, k, v = random_qkv(1, 2, 1000, 64)
    clean = attend(q, k, v, plan)
    for j in skipped:
        k[:, :, j * 64 : (j + 1) * 64] = float("nan")
        v[:, :, j * 64 : (j + 1) * 64] = float("inf")
    assert torch.equal(attend(q, k, v, plan), clean)


@ALL
def test_a_block_reaches_only_the_rows_that_keep_it(attend):
    mask = torch.rand(7, 14, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, 0], mask[0, 0], mask[:, 1] = False, True, True
    assert mask.sum(dim=1).unique().numel() > 2, "rows of several lengths"
    plan = BlockPlan.from_mask(mask, block_m=128, block_n=64, q_len=896, k_len=896)
    q, k, v = random_qkv(1, 2, 896, 64)
    clean = attend(q, k, v, plan)
    k[:, :, :64] = v[:, :, :64] = float("nan")
    poisoned = attend(q, k, v, plan)
    assert poisoned[:, :, :128].isnan().all()
    assert torch.equal(poisoned[:, :, 128:], clean[:, :, 128:])


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("attend", "choices"), EVERY_WAY_AND_PLAN)
@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_is_read_before_it_is_written(attend, choices):
    pooled = 8 in choices
    plan = random_plan(
        1000, 1000, extents=(2,), block_n=32, choices=choices, pooled_remainder=pooled
    )
    check(attend, random_qkv(1, 2, 1000, 64), plan)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any op returned."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return result


@pytest.fixture
def one_thread():
    """Everything in this thread, where a dispatch mode sees it."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.mark.parametrize(("attend", "choices"), EVERY_WAY_AND_PLAN)
@pytest.mark.usefixtures("one_thread")
def test_memory_does_not_grow_with_queries_times_keys(attend, choices, monkeypatch):
    monkeypatch.setattr(torch_gathered, "GATHER_BYTES", 2**20)
    tokens = 4096
    q, k, v = random_qkv(1, 1, tokens, 32)
    plan = random_plan(tokens, tokens, choices=choices)
    with LargestTensor() as largest:
        out = attend(q, k, v, plan)
    assert out.nbytes <= largest.nbytes <= 2 * 2**20 < tokens * tokens // 2
