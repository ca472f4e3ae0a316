"""Plans in the forms of the external block-sparse kernels: lists, masks, torch's BlockMask."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.third_party.flex import flex_block_mask
from sparse_video_attention.third_party.plan_blocks import block_lists, block_mask

from .conftest import over_tokens, random_plan


@given(
    tokens=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    blocks=st.sampled_from([(128, 128), (128, 64), (64, 128), (256, 128), (256, 256)]),
    parts=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2])),
    batch_heads=st.sampled_from([(1, 1), (2, 3)]),
    packed=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_a_converted_plan_attends_to_the_same_tokens(
    tokens, blocks, parts, batch_heads, packed, seed
):
    plan, truth = random_plan(tokens, blocks, *batch_heads, packed=packed, seed=seed)
    finer = tuple(size // part for size, part in zip(blocks, parts, strict=True))
    mask = block_mask(plan, *finer)
    assert mask.dtype == torch.int8 and mask.is_contiguous()
    assert mask.shape[2:] == tuple(-(-n // size) for n, size in zip(tokens, finer, strict=True))
    assert torch.equal(over_tokens(mask, finer, tokens), truth)
    if finer == blocks:
        assert torch.equal(mask.to(torch.int16), plan.to_levels())

    counts, indices = block_lists(plan, *finer)
    assert counts.dtype == indices.dtype == torch.int32 and indices.shape == mask.shape
    for row in range(counts.numel()):
        listed = indices.view(counts.numel(), -1)[row, : counts.flatten()[row]]
        attended = mask.view(counts.numel(), -1)[row].nonzero()[:, 0]
        assert torch.equal(listed.long(), attended)  # and ascending


@pytest.mark.parametrize("blocks", [(128, 128), (64, 32)], ids=str)
def test_rows_that_share_their_entries_all_have_them(blocks):
    """Of dense attention in blocks, whose rows are one list."""
    plan = BlockPlan.full(300, 333, device="cpu", block_m=128, block_n=128)
    mask = block_mask(plan, *blocks)
    assert mask.shape == (1, 1, -(-300 // blocks[0]), -(-333 // blocks[1])) and mask.all()
    counts, indices = block_lists(plan, *blocks)
    assert (counts == mask.shape[3]).all()
    assert torch.equal(indices.long(), torch.arange(mask.shape[3]).expand(indices.shape))


def test_lists_of_a_plan_that_has_them_are_not_copied():
    plan, _ = random_plan(packed=False)
    assert block_lists(plan, 128, 64)[1].data_ptr() == plan.indices.data_ptr()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "strided"])
@pytest.mark.parametrize("blocks", [(128, 128), (128, 64)], ids=str)
def test_flex_gets_the_plan_as_a_block_mask(blocks, packed):
    """Its compiled kernel reads these lists; BlockMask.to_dense is torch's own reading of them."""
    plan, _ = random_plan(blocks=blocks, packed=packed)
    mask = flex_block_mask(plan)
    assert mask.seq_lengths == (300, 333) and mask.BLOCK_SIZE == blocks
    assert torch.equal(mask.to_dense().to(torch.int16), plan.to_levels())


@pytest.mark.parametrize("convert", [block_lists, block_mask])
def test_a_plan_is_converted_once_and_what_is_made_goes_with_it(convert):
    plan, _ = random_plan(blocks=(128, 128))
    found = convert(plan, 128, 64)
    assert convert(plan, 128, 64) is found
    assert convert(plan, 64, 64) is not found
    # Another plan of the same size has its own.
    other, _ = random_plan(blocks=(128, 128), seed=1)
    assert convert(other, 128, 64) is not found
    gone = [weakref.ref(plan), *(weakref.ref(x) for x in found if isinstance(found, tuple))]
    del plan, found
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_a_flex_mask_is_made_once_and_goes_with_its_plan():
    plan, _ = random_plan()
    gone = weakref.ref(plan)
    assert flex_block_mask(plan) is flex_block_mask(plan)
    del plan
    gc.collect()
    assert gone() is None
