"""The torch kernel and its ways: panels and shared keys (CPUs; the latter for masks alone), and
gathered batches (other devices, but tested here).
"""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_video_attention.kernels import (
    BlockPlan,
    block_sparse_attention,
    torch_gathered,
    torch_kernel,
)
from sparse_video_attention.kernels.reference import reference_attention
from sparse_video_attention.kernels.registry import KernelCall
from sparse_video_attention.kernels.torch_gathered import attend_gathered
from sparse_video_attention.kernels.torch_panels import attend_in_panels
from sparse_video_attention.kernels.torch_shared import attend_shared, shared_parts
from sparse_video_attention.kernels.torch_workers import for_each
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "psa_attention.npz")
CASES = json.loads(str(GOLDEN["cases"]))

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


@BOTH
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("head_dim", [64, 128], ids=lambda d: f"D{d}")
@pytest.mark.parametrize("batch", [1, 2], ids=lambda b: f"B{b}")
@pytest.mark.parametrize("tokens", [1, 63, 129, 333, 1000], ids=lambda n: f"N{n}")
def test_all_levels_in_one_softmax(attend, tokens, batch, head_dim, dtype):
    plan = random_plan(tokens, tokens, extents=(2,), block_n=64, pooled_remainder=tokens % 2 == 1)
    check(attend, random_qkv(batch, 2, tokens, head_dim, dtype=dtype), plan)


@BOTH
@pytest.mark.parametrize("level", [1, 2, 4, 8], ids=lambda h: f"level{h}")
@pytest.mark.parametrize("block_n", [16, 32, 128, 256], ids=lambda n: f"n{n}")
def test_each_level_alone_with_a_ragged_end(attend, level, block_n):
    # 333 = 2 * 166 + 1 = 8 * 41 + 5: the last group is short at every level.
    shape = (3, -(-333 // block_n))
    plan = BlockPlan.from_levels(
        torch.full(shape, level, dtype=torch.int8),
        block_m=128,
        block_n=block_n,
        q_len=333,
        k_len=333,
    )
    check(attend, random_qkv(1, 2, 333, 64), plan)


@BOTH
@pytest.mark.parametrize("tokens", [129, 333, 1000], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("choices", [(0, 1), (0, 0, 0, 1)], ids=["half", "quarter"])
def test_pooled_remainder_stands_for_every_skipped_block(attend, tokens, choices):
    plan = random_plan(tokens, tokens, block_n=32, choices=choices, pooled_remainder=True)
    assert plan.levels == (1, 32)
    check(attend, random_qkv(1, 2, tokens, 64), plan)


@BOTH
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "strided"])
@pytest.mark.parametrize(
    "extents", [(), (3,), (2, 1), (2, 3)], ids=["shared", "heads", "samples", "samples-heads"]
)
def test_plans_of_their_own_per_head_and_sample(attend, extents, packed):
    plan = random_plan(333, 333, extents=extents, block_m=64, block_n=64, packed=packed)
    check(attend, random_qkv(2, 3, 333, 64), plan)


@BOTH
@pytest.mark.parametrize(("q_len", "k_len"), [(333, 1000), (1000, 63)], ids=str)
def test_other_numbers_of_keys_than_queries(attend, q_len, k_len):
    check(attend, random_qkv(1, 2, q_len, 64, k_len=k_len), random_plan(q_len, k_len, block_n=64))


@ALL
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("width", [0.6, 4.0], ids=lambda w: f"width{w}")
@pytest.mark.parametrize("block_n", [32, 128], ids=lambda n: f"n{n}")
def test_bands_that_neighbouring_rows_share(attend, block_n, width, dtype):
    mask = banded_mask(-(-1300 // 128), -(-1300 // block_n), width)
    plan = BlockPlan.from_mask(mask, block_m=128, block_n=block_n, q_len=1300, k_len=1300)
    check(attend, random_qkv(1, 1, 1300, 32, dtype=dtype), plan)


@ALL
@pytest.mark.parametrize(
    "extents", [(), (3,), (2, 1), (2, 3)], ids=["shared", "heads", "samples", "samples-heads"]
)
def test_masks_of_their_own_per_head_and_sample(attend, extents):
    plan = random_mask_plan(333, extents=extents, block_m=64, block_n=64, packed=False)
    check(attend, random_qkv(2, 3, 333, 64), plan)


@ALL
def test_rows_with_a_single_block(attend):
    mask = torch.eye(8, dtype=torch.bool).roll(3, dims=1)
    plan = BlockPlan.from_mask(mask, block_m=128, block_n=128, q_len=1000, k_len=1000)
    check(attend, random_qkv(1, 2, 1000, 64), plan)


@ALL
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_everything_kept_is_dense_attention(attend, dtype):
    q, k, v = random_qkv(2, 2, 700, 64, dtype=dtype)
    mask = torch.ones(6, 11, dtype=torch.bool)
    plan = BlockPlan.from_mask(mask, block_m=128, block_n=64, q_len=700, k_len=700)
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert worst_error(attend(q, k, v, plan), dense) < LIMITS[dtype]


@ALL
def test_the_scale_is_the_one_asked_for(attend):
    check(attend, random_qkv(1, 1, 200, 64), random_mask_plan(200), scale=0.3)


@ALL
def test_logits_far_beyond_exp_stay_finite(attend):
    q, k, v = random_qkv(1, 1, 3000, 64)
    # The largest logits come last: every panel raises the running maximum.
    k = k * torch.linspace(1, 60, 3000)[:, None]
    plan = random_plan(3000, 3000, choices=(1,))
    out = attend(q, k, v, plan)
    expected = reference_attention(q, k, v, plan)
    assert ((out - expected).norm() / expected.norm()) < 1e-4


@BOTH
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: CASES[i]["mode"] + f"-{i}")
def test_psa_kernel_outputs_are_reproduced(attend, case):
    fields = CASES[case]
    q, k, v, published = (torch.from_numpy(GOLDEN[f"{x}_{case}"]) for x in ("q", "k", "v", "out"))
    plan = BlockPlan.from_levels(
        torch.from_numpy(GOLDEN[f"levels_{case}"]),
        block_m=fields["block_m"],
        block_n=fields["block_n"],
        q_len=fields["seq_len"],
        k_len=fields["seq_len"],
    )
    error = attend(q, k, v, plan).double() - published.double()
    assert error.norm() / published.double().norm() < 2e-3


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


@pytest.mark.parametrize("run", [attend_in_panels, attend_shared], ids=["panels", "shared"])
def test_the_result_does_not_depend_on_threads(run):
    q, k, v = random_qkv(1, 2, 1000, 64)
    plan = random_mask_plan(1000, block_n=64)
    count = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(run(KernelCall(q, k, v, plan, 0.125)))
            assert torch.get_num_threads() == threads
            seen = []
            other = threading.Thread(target=lambda seen=seen: seen.append(torch.get_num_threads()))
            other.start()
            other.join()
            assert seen == [threads], "threads made later must not inherit the workers' setting"
    finally:
        torch.set_num_threads(count)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_workers_run_ops_on_one_core_each():
    seen = []

    def worker(next_task):
        while next_task() is not None:
            torch.ones(2**16).sum()  # the first parallel op settles a thread's number of cores
            seen.append(torch.get_num_threads())

    count = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for_each(worker, 100)
    finally:
        torch.set_num_threads(count)
    assert seen == [1] * 100


def test_calls_from_several_threads_at_once():
    plan = random_plan(333, 333, block_n=64)
    inputs = [random_qkv(1, 2, 333, 64, seed=seed) for seed in range(6)]
    expected = [panels(*qkv, plan) for qkv in inputs]
    outs = [None] * len(inputs)

    def call(i):
        outs[i] = panels(*inputs[i], plan)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(torch.equal(out, wanted) for out, wanted in zip(outs, expected, strict=True))


def test_a_failing_worker_is_heard():
    def worker(next_task):
        while (task := next_task()) is not None:
            if task == 3:
                raise ArithmeticError("task 3")

    with pytest.raises(ArithmeticError, match="task 3"):
        for_each(worker, 5)


@ALL
def test_modes_of_the_caller_do_not_change_the_result(attend):
    q, k, v = random_qkv(1, 2, 333, 64)
    plan = random_mask_plan(333, block_n=64)
    plain = attend(q, k, v, plan)
    with torch.inference_mode():
        assert torch.equal(attend(q.clone(), k, v, plan), plain)
    assert torch.equal(attend(q.requires_grad_(), k, v, plan), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(q, k, v, plan), plain)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_plan_matches_the_definition(data):
    q_len, k_len = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    block_m = data.draw(st.sampled_from([16, 64, 128]))
    block_n = data.draw(st.sampled_from([16, 32, 64, 128]))
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    plan_batch = data.draw(st.sampled_from([1, batch]))
    plan_heads = data.draw(st.sampled_from([1, heads]))
    choices = data.draw(st.lists(st.sampled_from([0, 1, 2, 4, 8]), min_size=1, max_size=5))
    plan = random_plan(
        q_len,
        k_len,
        extents=(plan_batch, plan_heads),
        block_m=block_m,
        block_n=block_n,
        choices=tuple(choices),
        seed=data.draw(st.integers(0, 2**20)),
        pooled_remainder=data.draw(st.booleans()),
        packed=data.draw(st.booleans()),
    )
    qkv = random_qkv(batch, heads, q_len, 16, k_len=k_len, seed=data.draw(st.integers(0, 2**20)))
    for attend in (MASK_WAYS if plan.levels == (1,) else WAYS).values():
        check(attend, qkv, plan)


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
