"""BlockPlan: the lists say what the mask or the levels said, in the order kernels rely on."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sparse_video_attention.kernels import BlockPlan, block_sparse_attention, lists
from sparse_video_attention.kernels import plan as plan_module
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from .plans import PACKED, plan_of, random_levels


def lists_of(plan):
    """{(batch, head, row, level): key blocks}, read the way the class docstring says."""
    out = {}
    batch, heads, rows, _ = plan.bounds.shape
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                bounds = plan.bounds[b, h, i].tolist()
                for position, level in enumerate(plan.levels):
                    first, last = bounds[position], bounds[position + 1]
                    out[b, h, i, level] = plan.indices[first:last].tolist()
    return out


class CountingMode(TorchDispatchMode):
    """Keeps the operations that are more than a view: each is a launch on a GPU."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(result.alias_info for result in func._schema.returns):
            self.operations.append(func)
        return func(*args, **(kwargs or {}))


@PACKED
@pytest.mark.parametrize("shape", [(4, 7), (3, 4, 7), (2, 3, 4, 7)], ids=["MN", "HMN", "BHMN"])
def test_lists_hold_the_blocks_of_each_level_ascending(shape, packed):
    levels = random_levels(*shape)
    found = lists_of(plan_of(levels, packed=packed))
    full = levels.reshape((1,) * (4 - levels.ndim) + tuple(shape))
    for (b, h, i, level), blocks in found.items():
        expected = [j for j in range(7) if full[b, h, i, j] == level]
        assert blocks == expected, f"row {i} of head {h}, sample {b}, level {level}"
    assert sum(map(len, found.values())) == int((levels > 0).sum())


@PACKED
def test_a_mask_is_level_one(packed):
    mask = random_levels(3, 5, 6, choices=(0, 1)).bool()
    plan = BlockPlan.from_mask(mask, block_m=64, block_n=32, q_len=300, k_len=190, packed=packed)
    assert plan.levels == (1,)
    assert torch.equal(plan.to_levels()[0] == 1, mask)


@PACKED
def test_pooled_remainder_lists_every_skipped_block_at_the_coarsest_level(packed):
    levels = random_levels(2, 4, 7)
    plan = plan_of(levels, packed=packed, pooled_remainder=True)
    assert plan.levels[-1] == 32
    expected = torch.where(levels == 0, 32, levels.to(torch.int16))
    assert torch.equal(plan.to_levels()[0], expected.to(torch.int16))


@PACKED
def test_to_levels_gives_back_what_the_plan_was_made_from(packed):
    levels = random_levels(2, 3, 5, 9, seed=3)
    plan = plan_of(levels, packed=packed)
    assert torch.equal(plan.to_levels(), levels.to(torch.int16))


@PACKED
def test_density_is_the_mean_of_one_over_level(packed):
    levels = random_levels(2, 3, 5, 9, seed=4)
    plan = plan_of(levels, packed=packed)
    exact = np.where(levels > 0, 1.0 / np.maximum(levels.numpy(), 1), 0.0).mean()
    assert plan.density() == pytest.approx(exact, rel=1e-6)
    assert float(plan.density_tensor()) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("levels", [(1,), (1, 2, 4, 8)], ids=str)
def test_density_takes_few_launches(levels):
    """It is asked for in every call of a dynamic policy."""
    plan = plan_of(random_levels(2, 3, 5, 9, choices=(0, *levels)))
    assert plan.levels == levels
    with CountingMode() as counted:
        plan.density_tensor()
    assert len(counted.operations) <= 3 + len(levels)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_mask_is_read_where_it_is(monkeypatch, pooled):
    given = []
    monkeypatch.setattr(lists, "_has_triton", lambda: False)
    monkeypatch.setattr(
        plan_module,
        "strided_lists",
        lambda *call: given.append(call[0]) or lists.strided_lists(*call),
    )
    mask = random_levels(2, 3, 5, 9, choices=(0, 1)).bool()
    before = mask.clone()
    sizes = {"block_m": 64, "block_n": 32, "q_len": 320, "k_len": 288}
    plan = BlockPlan.from_mask(mask, **sizes, packed=False, pooled_remainder=pooled)
    packed = BlockPlan.from_mask(mask, **sizes, pooled_remainder=pooled)
    assert torch.equal(plan.to_levels(), packed.to_levels())
    assert given[0].data_ptr() == mask.data_ptr()
    assert torch.equal(mask, before)


def test_counts_are_per_row_and_level():
    levels = torch.tensor([[1, 2, 0, 2], [1, 1, 1, 8]], dtype=torch.int8)
    plan = plan_of(levels)
    assert plan.levels == (1, 2, 8)
    assert plan.counts()[0, 0].tolist() == [[1, 2, 0], [3, 0, 1]]
    assert plan.entries_per_row()[0, 0].tolist() == [3, 4]


def test_flops_count_whole_blocks_of_both_products():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    plan = BlockPlan.from_mask(mask, block_m=128, block_n=64, q_len=200, k_len=190)
    per_block = 2 * (2 * 128 * 64 * 80)  # q.k and p.v, two operations per multiply-add
    assert plan.flops(80, batch=2, heads=3) == pytest.approx(5 * per_block * 6)


def test_memory_of_a_packed_plan_follows_the_kept_blocks():
    diagonal = BlockPlan.from_mask(
        torch.eye(512, dtype=torch.bool), block_m=128, block_n=128, q_len=65536, k_len=65536
    )
    full = BlockPlan.from_mask(
        torch.ones(512, 512, dtype=torch.bool), block_m=128, block_n=128, q_len=65536, k_len=65536
    )
    bounds = 512 * 2 * 4
    assert diagonal.nbytes == 512 * 4 + bounds
    assert full.nbytes == 512 * 512 * 4 + bounds


def test_strided_plans_are_made_without_reading_the_levels_back():
    # A fake tensor has no values: whatever would wait for the device raises.
    with FakeTensorMode():
        levels = torch.ones(2, 3, 8, 8, dtype=torch.int8)
        plan_of(levels, packed=False, pooled_remainder=True).density_tensor()
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            plan_of(levels, packed=True)


def test_on_device_keeps_or_moves_the_lists():
    plan = plan_of(random_levels(4, 6))
    assert plan.on_device("cpu") is plan
    assert plan.on_device("meta").device.type == "meta"
    assert plan.on_device("meta").levels == plan.levels


LEVELS_IN_THE_PICTURE = torch.tensor([[1, 0, 4], [1, 2, 8]], dtype=torch.int8)


def gray(level):
    return round(255 * level**-0.5) if level else 0


def test_the_picture_shows_every_block_in_its_cell():
    picture = np.asarray(plan_of(LEVELS_IN_THE_PICTURE).to_image(cell=3))
    assert picture.shape == (6, 9)
    for y in range(6):
        for x in range(9):
            level = int(LEVELS_IN_THE_PICTURE[y // 3, x // 3])
            assert picture[y, x] == gray(level), f"pixel {x}, {y}"
    assert gray(1) == 255 and gray(8) > 80 and gray(0) == 0


def test_the_picture_of_one_head_or_of_their_mean():
    heads = torch.stack([LEVELS_IN_THE_PICTURE, torch.ones_like(LEVELS_IN_THE_PICTURE)])
    plan = plan_of(heads)
    first, second = (np.asarray(plan.to_image(head=head, cell=1)) for head in (0, 1))
    assert first.tolist() == [[gray(1), 0, gray(4)], [gray(1), gray(2), gray(8)]]
    assert (second == 255).all()
    mean = np.asarray(plan.to_image(cell=1))
    assert mean[0, 1] == round(255 * 0.5**0.5)
    assert mean[0, 2] == round(255 * ((1 + 1 / 4) / 2) ** 0.5)


def test_the_picture_of_a_shared_plan_is_that_of_any_sample_and_head():
    plan = plan_of(LEVELS_IN_THE_PICTURE)
    shown = np.asarray(plan.to_image(batch=1, head=5))
    np.testing.assert_array_equal(shown, np.asarray(plan.to_image(head=0)))


def test_a_mask_must_be_boolean():
    with pytest.raises(ValueError, match=r"boolean; got torch\.int8"):
        BlockPlan.from_mask(
            torch.ones(1, 1, dtype=torch.int8), block_m=64, block_n=64, q_len=9, k_len=9
        )


@pytest.mark.parametrize("sizes", [(96, 64), (64, 48), (512, 128)], ids=str)
def test_block_sizes_are_checked(sizes):
    block_m, block_n = sizes
    with pytest.raises(ValueError, match=f"block_m={block_m}, block_n={block_n}"):
        BlockPlan.from_mask(
            torch.ones(1, 1, dtype=torch.bool),
            block_m=block_m,
            block_n=block_n,
            q_len=9,
            k_len=9,
        )


@pytest.mark.parametrize("shape", [(4, 6), (5, 5), (5,), (1, 1, 1, 5, 6)], ids=str)
def test_the_shape_must_fit_the_lengths(shape):
    with pytest.raises(ValueError, match=r"300 queries and 340 keys at 64x64 have shape \[5, 6\]"):
        BlockPlan.from_mask(
            torch.ones(shape, dtype=torch.bool), block_m=64, block_n=64, q_len=300, k_len=340
        )


@pytest.mark.parametrize("lengths", [(0, 64), (64, 0), (-5, 64)], ids=str)
def test_there_must_be_tokens(lengths):
    q_len, k_len = lengths
    with pytest.raises(ValueError, match=f"q_len={q_len}, k_len={k_len}"):
        BlockPlan.from_mask(
            torch.ones(1, 1, dtype=torch.bool), block_m=64, block_n=64, q_len=q_len, k_len=k_len
        )


def test_unknown_levels_are_named():
    levels = torch.tensor([[1, 3], [1, -1]], dtype=torch.int8)
    with pytest.raises(ValueError, match=r"one of \(1, 2, 4, 8\); got \[-1, 3\]"):
        plan_of(levels)


def test_levels_must_divide_the_block():
    with pytest.raises(ValueError, match=r"divide block_n=32; got \(1, 3\)"):
        plan_of(torch.ones(1, 1, dtype=torch.int8), allowed=(1, 3))


def test_every_row_must_keep_something():
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, 2] = False
    sizes = {"block_m": 32, "block_n": 32, "q_len": 96, "k_len": 128}
    with pytest.raises(ValueError, match="attends to no key block"):
        BlockPlan.from_mask(mask, **sizes)
    BlockPlan.from_mask(mask, **sizes, pooled_remainder=True)


def test_a_plan_that_needs_more_entries_than_an_int32_is_refused():
    levels = torch.ones(1, dtype=torch.int8).expand(2, 16, 8192, 8192)
    with pytest.raises(ValueError, match="use larger blocks"):
        plan_of(levels, packed=False, ragged=0)


@pytest.mark.parametrize("lengths", [(1, 1), (300, 333), (64, 1000)], ids=str)
@pytest.mark.parametrize("blocks", [(128, 128), (64, 32)], ids=str)
def test_a_full_plan_is_that_of_a_mask_that_keeps_everything(lengths, blocks):
    sizes = dict(zip(("q_len", "k_len", "block_m", "block_n"), (*lengths, *blocks), strict=True))
    plan = BlockPlan.full(**sizes, device="cpu")
    rows, columns = (-(-n // size) for n, size in zip(lengths, blocks, strict=True))
    same = BlockPlan.from_mask(torch.ones(rows, columns, dtype=torch.bool), **sizes)
    assert torch.equal(plan.to_levels(), same.to_levels()) and plan.density() == 1.0
    q, k, v = (torch.randn(1, 2, n, 64) for n in (lengths[0], lengths[1], lengths[1]))
    out = block_sparse_attention(q, k, v, plan, kernel="torch")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_a_full_plan_has_one_list_for_all_rows():
    plan = BlockPlan.full(75600, 75600, device="cpu")
    assert plan.indices.numel() == 591 and plan.bounds.untyped_storage().nbytes() == 8
    with pytest.raises(ValueError, match="needs tokens; got q_len=0"):
        BlockPlan.full(0, 5, device="cpu")
