"""The "hopper" kernel: on a model of the hardware, and on a GPU."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, available, block_sparse_attention
from sparse_video_attention.kernels.reference import reference_attention

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from sparse_video_attention.kernels import hopper_attention, hopper_forward  # noqa: E402

from .gpu_memory import needs_memory  # noqa: E402


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gluon, interpreter = _load("gluon_in_python"), _load("triton_interpreter")


def relative_error(got, want):
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


def random_inputs(batch, heads, q_len, k_len, head_dim, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, heads, tokens, head_dim, generator=generator).to(dtype)
        for tokens in (q_len, k_len, k_len)
    )


def random_plan(extents, q_len, k_len, block_m, block_n, *, density=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = *extents, -(-q_len // block_m), -(-k_len // block_n)
    mask = torch.rand(shape, generator=generator) < density
    mask[..., -1] |= ~mask.any(-1)
    return BlockPlan.from_mask(mask, block_m=block_m, block_n=block_n, q_len=q_len, k_len=k_len)


# batch, heads, q_len, k_len, head_dim, block_m, block_n, plan extents
CASES = {
    "one-token": (1, 1, 1, 1, 64, 128, 128, (1, 1)),
    "N63": (1, 1, 63, 63, 64, 128, 64, (1, 1)),
    "N129-block64": (1, 1, 129, 129, 64, 64, 64, (1, 1)),
    "B2-H2-own-plans": (2, 2, 130, 300, 64, 128, 64, (2, 2)),
    "B2-H3-shared-plan": (2, 3, 64, 260, 128, 64, 128, (1, 1)),
    "k1000-D128-block128": (1, 2, 130, 1000, 128, 128, 128, (1, 2)),
    "k1000-D128-block64": (1, 2, 65, 1000, 128, 64, 64, (1, 2)),
    "k2000-D64-block32": (1, 1, 128, 2000, 64, 128, 32, (1, 1)),
    "k1024-no-tail": (1, 1, 128, 1024, 64, 128, 64, (1, 1)),
}


def model_attention(q, k, v, plan, *, seed=0, programs=None, log_sums=None, **replaced):
    """The kernel's source on the model of the hardware, program by program, over NaN.

    programs: how many of each head's, counted in the order in which they begin; all by default.
    log_sums: written to, if there are any.
    """
    kernel = gluon.python_functions(hopper_attention, **replaced)["attention_kernel"]
    out = torch.full(q.shape, float("nan"), dtype=torch.float64)
    bounds = plan.bounds
    strides = [bounds.stride(i) if bounds.shape[i] > 1 else 0 for i in range(2)]
    constants = hopper_forward.constants(
        q.shape[3], plan.block_m, plan.block_n, log_sums=log_sums is not None
    )
    names = {p.name for p in hopper_attention.attention_kernel.params if p.is_constexpr}
    grid = plan.num_q_blocks, q.shape[0] * q.shape[1]
    for block in range(grid[0] if programs is None else programs):
        for head in range(grid[1]):
            gluon.run_program(
                kernel,
                (block, head),
                grid,
                (
                    *(gluon.machine.Descriptor(x) for x in (q, k, v, out)),
                    gluon.machine.Pointer(bounds if log_sums is None else log_sums),
                    gluon.machine.Pointer(plan.indices),
                    gluon.machine.Pointer(bounds),
                    *(*strides, bounds.stride(2), q.shape[1], plan.q_len, plan.k_len),
                    q.shape[3] ** -0.5 * math.log2(math.e),
                ),
                seed=seed,
                **{name: value for name, value in constants.items() if name in names},
            )
    return out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_algorithm_is_the_definition(case):
    q, k, v = random_inputs(*case[:5])
    plan = random_plan(case[7], case[2], case[3], *case[5:7])
    for seed in range(3):
        out = model_attention(q, k, v, plan, seed=seed)
        assert relative_error(out, reference_attention(q, k, v, plan)) < 1e-12


@pytest.mark.parametrize("block_m", [64, 128])
@pytest.mark.parametrize("tiles", range(1, 9))
def test_no_schedule_breaks_the_barriers(tiles, block_m):
    """Rings are entered at every phase and go round more than twice."""
    q, k, v = random_inputs(1, 1, block_m, tiles * 128 - 7, 64)
    mask = torch.ones(1, tiles, dtype=torch.bool)
    plan = BlockPlan.from_mask(
        mask, block_m=block_m, block_n=128, q_len=block_m, k_len=tiles * 128 - 7
    )
    want = reference_attention(q, k, v, plan)
    for seed in range(12):
        assert relative_error(model_attention(q, k, v, plan, seed=seed), want) < 1e-12


def test_the_last_query_block_goes_first():
    """Its list is often the longest; begun last it would run when all else has ended."""
    q, k, v = random_inputs(1, 2, 300, 300, 64)
    plan = random_plan((1, 1), 300, 300, 128, 64)
    want = reference_attention(q, k, v, plan)
    out = model_attention(q, k, v, plan, programs=1)
    assert out[:, :, :256].isnan().all()
    assert relative_error(out[:, :, 256:], want[:, :, 256:]) < 1e-12
    out = model_attention(q, k, v, plan, programs=2)
    assert out[:, :, 128:256].isnan().all()
    assert relative_error(out[:, :, :128], want[:, :, :128]) < 1e-12


def test_a_row_without_a_list_is_zero():
    q, k, v = random_inputs(1, 1, 256, 256, 64)
    mask = torch.tensor([[0, 0], [1, 1]], dtype=torch.bool)
    plan = BlockPlan.from_mask(mask, block_m=128, block_n=128, q_len=256, k_len=256, packed=False)
    out = model_attention(q, k, v, plan)
    assert out[:, :, :128].eq(0).all()
    assert relative_error(out[:, :, 128:], reference_attention(q, k, v, plan)[:, :, 128:]) < 1e-12


def test_level_1_of_a_pyramid_with_the_sums_to_go_on_from():
    """Rows whose blocks are all pooled have nothing of level 1."""
    q, k, v = random_inputs(2, 2, 200, 300, 64)
    levels = torch.randint(0, 3, (2, 2, 2, 5), generator=torch.Generator().manual_seed(0))
    levels[..., 0] = 1
    levels[1, 0, 1] = 2
    plan = BlockPlan.from_levels(
        levels.to(torch.int8), block_m=128, block_n=64, q_len=200, k_len=300, pooled_remainder=True
    )
    assert plan.levels == (1, 2, 64)
    kept = (levels == 1).repeat_interleave(128, 2)[:, :, :200].repeat_interleave(64, 3)[..., :300]
    logits = (q @ k.transpose(2, 3) * 64**-0.5).masked_fill(~kept, float("-inf"))
    for seed in range(3):
        log_sums = torch.full((4, 200), float("nan"), dtype=torch.float64)
        out = model_attention(q, k, v, plan, seed=seed, log_sums=log_sums)
        torch.testing.assert_close(out, logits.softmax(-1).nan_to_num() @ v)
        torch.testing.assert_close(log_sums.view(2, 2, 200), logits.logsumexp(-1) / math.log(2))
    assert log_sums[2, 128:].isneginf().all() and log_sums.isneginf().sum() == 72


def test_a_nan_in_the_inputs_is_one_in_the_output():
    q, k, v = random_inputs(1, 2, 128, 128, 64)
    q[0, 1, 3, 7] = float("nan")
    plan = BlockPlan.from_mask(
        torch.ones(1, 1, dtype=torch.bool), block_m=128, block_n=128, q_len=128, k_len=128
    )
    out = model_attention(q, k, v, plan)
    assert out[0, 1, 3].isnan().all() and out.isnan().sum() == 64


BROKEN = {
    "wrong-free-parity": {"_free_parity": lambda step, stages: (step // stages) & 1},
    "never-waits-for-a-free-slot": {"_free_parity": lambda step, stages: step // stages % 2 * 2},
    "wrong-ready-parity": {"_ready_parity": lambda step, stages: step & 1},
    "wrong-turn": {"_turn_parity": lambda step, warpgroup: (step - 1) & 1},
    "no-mask": {"_first_key": lambda indices, entry, last, k_len, block_n: indices.at(entry)},
}


@pytest.mark.parametrize("replaced", BROKEN.values(), ids=BROKEN)
def test_the_model_shows_broken_code(replaced):
    """Otherwise the tests above say nothing."""
    q, k, v = random_inputs(1, 1, 128, 1500, 64)
    mask = torch.ones(1, 12, dtype=torch.bool)
    plan = BlockPlan.from_mask(mask, block_m=128, block_n=128, q_len=128, k_len=1500)
    want = reference_attention(q, k, v, plan)
    seen = False
    for seed in range(8):
        try:
            out = model_attention(q, k, v, plan, seed=seed, **replaced)
            seen |= not relative_error(out, want) < 1e-12
        except AssertionError:
            seen = True
    assert seen


@pytest.fixture
def on_hopper(monkeypatch):
    """The kernel on the GPU, its output memory poisoned; skips where it cannot run."""
    if available()["hopper"] is not None:
        pytest.skip(available()["hopper"])
    interpreter.poison_new_tensors(monkeypatch.setattr)

    def attend(q, k, v, plan, **kwargs):
        return block_sparse_attention(
            q.cuda(), k.cuda(), v.cuda(), plan.on_device("cuda"), kernel="hopper", **kwargs
        ).cpu()

    return attend


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_the_definition_on_a_gpu(on_hopper, case, dtype):
    q, k, v = random_inputs(*case[:5], dtype=dtype)
    plan = random_plan(case[7], case[2], case[3], *case[5:7])
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for _ in range(5):
        out = on_hopper(q, k, v, plan)
        assert relative_error(out, reference_attention(q, k, v, plan)) < tolerance
        assert out.transpose(1, 2).is_contiguous()


POOLED = {
    "B2-D64-128x32": (2, 2, 300, 2000, 64, 128, 32, (2, 1)),
    "D64-64x64": (1, 1, 129, 129, 64, 64, 64, (1, 1)),
    "B2-D128-128x64": (2, 3, 300, 1000, 128, 128, 64, (1, 3)),
    "D128-128x128": (1, 2, 130, 1000, 128, 128, 128, (1, 2)),
    "D128-64x32": (1, 2, 100, 333, 128, 64, 32, (1, 1)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("levels_of", ["remainder", "weighted", "pyramid"])
@pytest.mark.parametrize("case", POOLED.values(), ids=POOLED)
def test_pooled_levels_on_a_gpu(on_hopper, case, levels_of):
    """Odd lengths, and a query block without an entry of level 1."""
    pyramid = levels_of == "pyramid"
    q, k, v = random_inputs(*case[:5], dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    shape = *case[7], -(-case[2] // case[5]), -(-case[3] // case[6])
    values = torch.tensor((0, 1, 2, 8) if pyramid else (0, 1), dtype=torch.int8)
    levels = values[torch.randint(0, len(values), shape, generator=generator)]
    levels[..., 0, 0], levels[..., 1, :] = 1, 0
    plan = BlockPlan.from_levels(
        levels, block_m=case[5], block_n=case[6], q_len=case[2], k_len=case[3],
        pooled_remainder=True, pool_rows=2 if levels_of == "weighted" else 0,
    )  # fmt: skip
    for _ in range(3):
        out = on_hopper(q, k, v, plan)
        assert relative_error(out, reference_attention(q, k, v, plan)) < 8e-3


@pytest.mark.gpu
def test_slices_of_one_projection_on_a_gpu(on_hopper):
    joined = torch.randn(2, 200, 3, 4, 64, generator=torch.Generator().manual_seed(0)).half()
    q, k, v = (joined.cuda()[:, :, i].transpose(1, 2) for i in range(3))
    plan = random_plan((2, 4), 200, 200, 128, 64)
    out = on_hopper(q, k, v, plan)
    want = reference_attention(q.cpu(), k.cpu(), v.cpu(), plan)
    assert relative_error(out, want) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
def test_160000_tokens_on_a_gpu(on_hopper, head_dim):
    """More than 2**31 elements in q, k, v and the output."""
    needs_memory(20)
    tokens, heads = 160_000, 2**31 // (160_000 * head_dim) + 2
    blocks = tokens // 128
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (
        torch.empty(1, tokens, heads, head_dim, dtype=torch.bfloat16, device="cuda")
        .normal_(generator=generator)
        .transpose(1, 2)
        for _ in range(3)
    )
    mask = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in range(blocks):
        mask[row, torch.tensor([0, row, blocks - 1, row * 7919 % blocks])] = True
    plan = BlockPlan.from_mask(mask, block_m=128, block_n=128, q_len=tokens, k_len=tokens)
    out = on_hopper(q, k, v, plan)
    for row in (0, blocks // 3, blocks - 1):
        rows = slice(row * 128, row * 128 + 128)
        keys = mask[row].repeat_interleave(128)
        some = (x[:, -1:].double().cpu() for x in (q[:, :, rows], k, v))
        q_some, k_some, v_some = some
        want = torch.nn.functional.scaled_dot_product_attention(
            q_some, k_some[:, :, keys], v_some[:, :, keys]
        )
        assert relative_error(out[:, -1:, rows], want) < 8e-3
