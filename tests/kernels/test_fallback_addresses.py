"""Calls alike in shape whose tensors lie otherwise in memory: kernels are asked about each kind."""

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, registry
from sparse_video_attention.kernels.fallback import KernelFallback
from sparse_video_attention.kernels.registry import Kernel, register

TOKENS, HEAD_DIM = 70, 16
MASK = torch.ones(3, 3, dtype=torch.bool)
PLAN = BlockPlan.from_mask(MASK, block_m=32, block_n=32, q_len=TOKENS, k_len=TOKENS)


@pytest.fixture
def particular(monkeypatch):
    """A kernel ahead of torch that takes rows at multiples of 16 bytes only; its runs."""
    torch_kernel = registry.kernels()["torch"]
    monkeypatch.setattr(registry, "_KERNELS", {"torch": torch_kernel})
    registry.unavailable_reason.cache_clear()
    ran = []

    def refuses(call):
        tensors = call.q, call.k, call.v
        unaligned = any(x.data_ptr() % 16 or x.stride(1) < 1 or x.stride(2) % 4 for x in tensors)
        return "it takes aligned rows" if unaligned else None

    def run(call):
        assert refuses(call) is None
        ran.append(call)
        return torch_kernel.run(call)

    register(
        Kernel(
            name="particular",
            unavailable=lambda: None,
            refuses=refuses,
            run=run,
            auto_precision=lambda call: "native",
            rank=lambda call: 9.0,
        )
    )
    yield ran
    registry.unavailable_reason.cache_clear()


def placed(offset, row, expanded=False):
    """[1, 2, TOKENS, HEAD_DIM] `offset` values into memory, `row` values from token to token."""
    memory = torch.randn(2 * TOKENS * row + offset, generator=torch.Generator().manual_seed(0))
    head = 0 if expanded else TOKENS * row
    return memory[offset:].as_strided((1, 2, TOKENS, HEAD_DIM), (0, head, row, 1), offset)


@pytest.mark.parametrize(
    "other",
    [{"offset": 1}, {"row": HEAD_DIM + 1}, {"expanded": True}],
    ids=["address", "stride", "expanded"],
)
@pytest.mark.parametrize("first", ["aligned", "unaligned"])
def test_a_kernel_serves_the_calls_it_takes_whichever_comes_first(particular, other, first):
    aligned = {"offset": 0, "row": HEAD_DIM}
    runs = KernelFallback()
    for how in (aligned, aligned | other)[:: 1 if first == "aligned" else -1] * 2:
        x = placed(**how)
        run = runs.run(x, x, x, PLAN, scale=0.25)
        assert run.kernel == ("particular" if how == aligned else "torch")
    assert len(particular) == 2
