"""External block-sparse kernels: plans in their form, the exact call, and what is refused."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_video_attention.kernels import BlockPlan, available, block_sparse_attention
from sparse_video_attention.kernels.registry import KernelCall
from sparse_video_attention.third_party.flex import flex_block_mask
from sparse_video_attention.third_party.plan_blocks import block_lists, block_mask
from sparse_video_attention.third_party.sparse_kernels import SPARSE_BACKENDS

from .conftest import exact

NAMES = ("flash_attn4", "spas_sage_attn", "sparse_sageattn", "flex")


def random_plan(tokens=(300, 333), blocks=(128, 64), batch=1, heads=2, packed=True, seed=0, **how):
    """A plan with about half of the blocks, and its mask over tokens [B, H, N, N']."""
    gen = torch.Generator().manual_seed(seed)
    rows, columns = (-(-n // size) for n, size in zip(tokens, blocks, strict=True))
    mask = torch.rand(batch, heads, rows, columns, generator=gen) > 0.5
    mask.scatter_(3, torch.randint(columns, (batch, heads, rows, 1), generator=gen), True)
    plan = BlockPlan.from_mask(
        mask,
        block_m=blocks[0],
        block_n=blocks[1],
        q_len=tokens[0],
        k_len=tokens[1],
        packed=packed,
        **how,
    )
    return plan, over_tokens(mask, blocks, tokens)


def over_tokens(mask, blocks, tokens):
    for dim, size, length in zip((2, 3), blocks, tokens, strict=True):
        mask = mask.repeat_interleave(size, dim).narrow(dim, 0, length)
    return mask.bool()


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


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None


def attend_lists(q, k, v, scale, counts, indices, size):
    """[B, N, H, D] attention over lists, row by row."""
    batch, tokens, heads, _ = q.shape
    mask = torch.zeros(batch, heads, *indices.shape[2:], dtype=torch.bool)
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape[:3])).tolist():
        shared = (min(b, counts.shape[0] - 1), min(h, counts.shape[1] - 1), row)
        mask[b, h, row, indices[shared][: counts[shared]].long()] = True
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    allowed = over_tokens(mask, size, (tokens, k.shape[2]))
    return exact(q, k, v, scale, allowed).to(q.dtype).transpose(1, 2).contiguous()


def flash4(stand_in, calls):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, block_sparse_tensors=None):
        given = block_sparse_tensors
        assert not causal and given.mask_block_cnt.sum() == 0
        calls.add(q, k, v, size=given.block_size)
        lists = given.full_block_cnt, given.full_block_idx
        return attend_lists(q, k, v, softmax_scale, *lists, given.block_size)

    stand_in("flash_attn.cute", flash_attn_func=flash_attn_func)
    stand_in("flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=BlockSparseTensorsTorch)


def attend_mask(q, k, v, scale, mask_id, size):
    """Heads-first attention over a full, contiguous int8 mask of exactly the expected shape."""
    tokens = (q.shape[2], k.shape[2])
    blocks = tuple(-(-n // side) for n, side in zip(tokens, size, strict=True))
    assert mask_id.dtype == torch.int8 and mask_id.is_contiguous()
    assert mask_id.shape == (*q.shape[:2], *blocks)
    return exact(q, k, v, scale, over_tokens(mask_id, size, tokens)).to(q.dtype)


def spas(stand_in, calls):
    def block_sparse_sage2_attn_cuda(
        q,
        k,
        v,
        mask_id=None,
        dropout_p=0.0,
        scale=None,
        smooth_k=True,
        pvthreshd=50,
        attention_sink=False,
        tensor_layout="HND",
        return_sparsity=False,
    ):
        size = (64, 128) if torch.cuda.get_device_capability() == (9, 0) else (128, 64)
        assert smooth_k and pvthreshd >= 20 and not attention_sink and not return_sparsity
        assert tensor_layout == "HND"
        calls.add(q, k, v, size=size)
        return attend_mask(q, k, v, scale, mask_id, size).contiguous()

    stand_in("spas_sage_attn", block_sparse_sage2_attn_cuda=block_sparse_sage2_attn_cuda)


def sparse_sage(stand_in, calls):
    def sparse_sageattn(q, k, v, mask_id=None, is_causal=False, tensor_layout="HND"):
        assert not is_causal
        calls.add(q, k, v, size=(128, 64), tensor_layout=tensor_layout)
        if tensor_layout == "HND":
            return attend_mask(q, k, v, None, mask_id, (128, 64))
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = attend_mask(*heads_first, None, mask_id, (128, 64))
        return out.transpose(1, 2).contiguous()

    stand_in("sparse_sageattn", sparse_sageattn=sparse_sageattn)


LIBRARIES = {"flash_attn4": flash4, "spas_sage_attn": spas, "sparse_sageattn": sparse_sage}
CAPABILITIES = {"hopper": (9, 0), "ada": (8, 9), "blackwell": (10, 0)}


def on_cpu(name):
    """A backend as in a new process, with constraints that let CPU tensors through."""
    backend = SPARSE_BACKENDS[name]
    return replace(backend, constraints=replace(backend.constraints, device_types=("cpu",)))


@pytest.fixture
def gpu(monkeypatch):
    """gpu("hopper"): what torch says the GPU is."""

    def pretend(name):
        capability = CAPABILITIES[name]
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


def a_call(qkv, plan, memory="tokens", precision="native", scale=None, head_dim=64, **how):
    batch, heads = how.pop("batch", 1), how.pop("heads", 2)
    q, k, v = qkv(memory, batch, heads, plan.q_len, plan.k_len, head_dim)
    return KernelCall(q, k, v, plan, scale or head_dim**-0.5, precision)


@pytest.mark.parametrize(
    ("name", "machine", "blocks", "size"),
    [
        ("flash_attn4", "hopper", (128, 128), (128, 128)),
        ("flash_attn4", "hopper", (256, 256), (128, 128)),
        ("flash_attn4", "blackwell", (256, 128), (256, 128)),
        ("spas_sage_attn", "hopper", (64, 128), (64, 128)),
        ("spas_sage_attn", "hopper", (128, 128), (64, 128)),
        ("spas_sage_attn", "ada", (128, 64), (128, 64)),
        ("spas_sage_attn", "ada", (128, 128), (128, 64)),
        ("sparse_sageattn", "ada", (128, 64), (128, 64)),
        ("sparse_sageattn", "ada", (128, 128), (128, 64)),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
@pytest.mark.parametrize("memory", ["tokens", "heads"])
@pytest.mark.parametrize("shared", [False, True], ids=["per-head", "shared"])
def test_the_call_attends_to_the_plan(
    name, machine, blocks, size, memory, shared, stand_in, calls, qkv, gpu
):
    LIBRARIES[name](stand_in, calls)
    gpu(machine)
    tokens = (320, 384) if name == "sparse_sageattn" else (300, 333)
    plan, allowed = random_plan(tokens, blocks, *((1, 1) if shared else (2, 3)))
    backend = on_cpu(name)
    scale = None if name == "sparse_sageattn" else 0.21
    call = a_call(qkv, plan, memory, backend.precision, scale, batch=2, heads=3)
    before = [x.clone() for x in (call.q, call.k, call.v)]
    assert backend.refuses(call) is None
    out = backend.run(call)
    torch.testing.assert_close(
        out.double(), exact(*before, call.scale, allowed), atol=2e-2, rtol=2e-2
    )
    assert calls.arguments[0]["size"] == size
    assert out.transpose(1, 2).is_contiguous() and out.dtype == call.q.dtype
    for got, x, was in zip(calls.tensors[0], (call.q, call.k, call.v), before, strict=True):
        assert got.data_ptr() == x.data_ptr() and torch.equal(x, was)


@pytest.mark.parametrize(
    ("name", "machine", "blocks"),
    [
        ("flash_attn4", "hopper", (128, 64)),
        ("flash_attn4", "hopper", (64, 128)),
        ("flash_attn4", "blackwell", (128, 128)),
        ("spas_sage_attn", "hopper", (128, 64)),
        ("spas_sage_attn", "ada", (64, 128)),
        ("sparse_sageattn", "ada", (64, 64)),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_a_plan_of_smaller_blocks_is_refused(name, machine, blocks, qkv, gpu):
    gpu(machine)
    plan, _ = random_plan((320, 384), blocks)
    backend = on_cpu(name)
    reason = backend.refuses(a_call(qkv, plan, precision=backend.precision))
    assert f"the plan's blocks of {blocks[0]}x{blocks[1]} do not split" in reason


@pytest.mark.parametrize("name", NAMES)
def test_pooled_blocks_and_other_precisions_are_refused(name, qkv, gpu):
    gpu("hopper")
    backend = on_cpu(name)
    pooled, _ = random_plan((256, 256), (128, 128), pooled_remainder=True)
    assert "pooled blocks" in backend.refuses(a_call(qkv, pooled, precision=backend.precision))
    levels = torch.tensor([[1, 2], [4, 1]], dtype=torch.int8)
    pyramid = BlockPlan.from_levels(levels, block_m=128, block_n=128, q_len=256, k_len=256)
    assert "pooled blocks" in backend.refuses(a_call(qkv, pyramid, precision=backend.precision))
    plain, _ = random_plan((256, 256), (128, 128))
    for precision in {"native", "int8", "fp8"} - {backend.precision}:
        assert "only, not in" in backend.refuses(a_call(qkv, plain, precision=precision))
    assert backend.refuses(a_call(qkv, plain, precision=backend.precision)) is None


@pytest.mark.parametrize(
    ("name", "tokens", "how", "reason"),
    [
        ("spas_sage_attn", (100, 256), {}, "at least 128 queries, not 100"),
        ("spas_sage_attn", (256, 256), {"head_dim": 96}, "head dim 64 or 128, not 96"),
        ("sparse_sageattn", (256, 333), {}, "a multiple of 64 keys only, not 333"),
        ("sparse_sageattn", (300, 256), {}, "a multiple of 64 queries only, not 300"),
        ("sparse_sageattn", (256, 256), {"scale": 0.3}, "1 / sqrt(head_dim) only"),
        ("flash_attn4", (256, 256), {"head_dim": 192}, "head dims up to 128"),
        ("flex", (256, 256), {"head_dim": 80}, "head dim 32 or 64 or 128, not 80"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_calls_a_library_gets_wrong_are_refused(name, tokens, how, reason, qkv, gpu):
    gpu("hopper")
    plan, _ = random_plan(tokens, (128, 128))
    backend = on_cpu(name)
    assert reason in backend.refuses(a_call(qkv, plan, precision=backend.precision, **how))


def test_gpus_on_which_flash_attn4_ignores_the_lists_are_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    constraints = SPARSE_BACKENDS["flash_attn4"].constraints
    for capability, runs in {(8, 0): 0, (8, 9): 0, (12, 0): 0, (9, 0): 1, (10, 0): 1}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None, c=capability: c)
        assert (constraints.machine_reason() is None) == bool(runs), capability


def test_an_old_flash_attn4_is_a_reason(stand_in):
    stand_in("flash_attn.cute", flash_attn_func=lambda q, k, v, softmax_scale=None: None)
    stand_in("flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=BlockSparseTensorsTorch)
    reason = replace(SPARSE_BACKENDS["flash_attn4"]).unavailable()
    assert "older than its block-sparse call" in reason


def test_flex_is_out_where_it_would_not_be_compiled(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert "torch.compile is switched off" in replace(SPARSE_BACKENDS["flex"]).unavailable()


@pytest.mark.parametrize("name", ["flash_attn4", "spas_sage_attn", "sparse_sageattn"])
@pytest.mark.parametrize("error", ["OSError", "ImportError", "RuntimeError"])
def test_a_broken_wheel_is_a_reason(name, error, broken_wheel):
    package = {"flash_attn4": "flash_attn.cute"}.get(name, name)
    broken_wheel(package, f"raise {error}('undefined symbol: cudaLaunch')")
    reason = replace(SPARSE_BACKENDS[name]).unavailable()
    assert f"{package} does not work: {error}: undefined symbol: cudaLaunch" in reason
    assert "to install it, " in reason


def test_they_are_kernels_and_say_why_they_do_not_run(qkv):
    listed = available()
    assert set(NAMES) <= set(listed)
    if torch.cuda.is_available():
        return
    plan, _ = random_plan((256, 256), (128, 128))
    call = a_call(qkv, plan)
    for name in NAMES:
        assert "which this machine does not have" in listed[name]
        with pytest.raises(ValueError, match=f"kernel '{name}' cannot serve this call"):
            block_sparse_attention(call.q, call.k, call.v, plan, kernel=name)
