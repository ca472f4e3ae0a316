"""Which way of the torch kernel a call takes, and how rows of a mask share their keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_video_attention.kernels import block_sparse_attention, torch_kernel
from sparse_video_attention.kernels.reference import reference_attention
from sparse_video_attention.kernels.torch_shared import shared_parts

from .torch_ways import (
    DTYPES,
    LIMITS,
    banded_mask,
    random_mask_plan,
    random_plan,
    random_qkv,
    worst_error,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_shared_parts_cover_every_kept_block_of_every_row_once(data):
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    mask = torch.rand(rows, columns, generator=generator) < data.draw(st.floats(0, 1))
    k_len = columns * 128 - data.draw(st.integers(0, 127))
    covered = torch.zeros(rows, k_len, dtype=torch.int64)
    for part in shared_parts(mask, 0, 128, k_len):
        for start, end in part.runs:
            covered[part.first : part.last, start:end] += 1
    assert torch.equal(covered, mask.repeat_interleave(128, dim=1)[:, :k_len].long())


def test_blocks_that_all_rows_keep_are_one_part():
    mask = banded_mask(8, 32, 16.0)
    common = int(mask.all(dim=0).sum())
    assert common >= 4
    first = next(shared_parts(mask, 0, 128, 32 * 128))
    assert (first.first, first.last) == (0, 8)
    assert sum(end - start for start, end in first.runs) == common * 128


@pytest.mark.parametrize("fp16_units", [True, False], ids=["fp16-units", "none"])
def test_the_kernel_takes_the_way_that_fits_device_dtype_and_plan(monkeypatch, fp16_units):
    taken = []
    for name in ("attend_shared", "attend_in_panels", "attend_gathered"):
        monkeypatch.setattr(torch_kernel, name, lambda call, name=name: taken.append(name))
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"amx_fp16": fp16_units}, raising=False
    )
    mask, levels = random_mask_plan(200), random_plan(200, 200, choices=(0, 1, 2, 4, 8), seed=1)
    for plan, dtype in ((mask, "fp32"), (mask, "bf16"), (mask, "fp16"), (levels, "bf16")):
        qkv = random_qkv(1, 1, 200, 64, dtype=DTYPES[dtype])
        block_sparse_attention(*qkv, plan, kernel="torch")
    of_fp16 = "attend_shared" if fp16_units else "attend_in_panels"
    assert taken == ["attend_shared", "attend_shared", of_fp16, "attend_in_panels"]
    taken.clear()
    q, k, v = (x.to("meta") for x in random_qkv(1, 1, 200, 64))
    block_sparse_attention(q, k, v, mask.on_device("meta"), kernel="torch")
    assert taken == ["attend_gathered"]


def test_on_this_cpu_the_kernel_is_right_whatever_way_it_takes():
    for dtype in DTYPES.values():
        q, k, v = random_qkv(1, 2, 333, 64, dtype=dtype)
        plan = random_mask_plan(333)
        out = block_sparse_attention(q, k, v, plan, kernel="torch")
        assert worst_error(out, reference_attention(q, k, v, plan)) < LIMITS[dtype]
