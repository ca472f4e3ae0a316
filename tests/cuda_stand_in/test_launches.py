"""The stand-in's Triton: what is launched computes, what could not be launched is refused."""

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, block_sparse_attention

pytestmark = pytest.mark.on_cards("sm_90", "sm_86")

CUDA = torch.device("cuda", 0)


def launch_twice(x, out):
    from .small_kernels import twice_kernel

    with torch.cuda.device(x.device):
        twice_kernel[-(-x.numel() // 16),](x, out, x.numel(), BLOCK=16)
    return out


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str
)
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_launch_computes(dtype, device):
    from .triton_driver import LAUNCHES

    before = LAUNCHES["twice_kernel"]
    x = torch.arange(-7, 26, device=device).to(dtype)
    out = launch_twice(x, torch.empty_like(x))
    assert out.tolist() == [2 * i for i in range(-7, 26)]
    assert LAUNCHES["twice_kernel"] == before + 1


def test_a_launch_begins_where_the_tensor_does():
    """A pointer is to where a tensor begins, in memory that others may have parts of."""
    memory = torch.arange(6.0, device=CUDA)
    out = torch.zeros(6, device=CUDA)
    launch_twice(memory[2:][:3], out[1:][:3])
    assert out.tolist() == [0, 4, 6, 8, 0, 0]


def test_memory_that_nobody_wrote_shows():
    assert torch.empty(3, device=CUDA).isnan().all()
    assert torch.empty(3, dtype=torch.int32, device=CUDA).tolist() == [101] * 3


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_memory_of_another_device_is_refused(other):
    x = torch.ones(4, device=CUDA)
    with pytest.raises(ValueError, match="Pointer argument.*cannot be accessed"):
        launch_twice(x, torch.empty(4, device=other))


@pytest.mark.parametrize("wrong", [{"NO_SUCH": 1}, {"num_warps": 4, "STAGES": 2}])
def test_arguments_that_triton_does_not_know_are_refused(wrong):
    from .small_kernels import twice_kernel

    x = torch.ones(4, device=CUDA)
    with pytest.raises(KeyError, match="unrecognised"):
        twice_kernel[1,](x, x, 4, BLOCK=4, **wrong)


@pytest.mark.on_cards("sm_86", compiles=True)
def test_a_kernel_that_takes_too_much_shared_memory_is_refused():
    """It fits with fewer buffers. Kernels are compiled as well after others were interpreted."""
    from triton.runtime.errors import OutOfResources

    from .small_kernels import product_kernel
    from .triton_driver import COMPILED, LAUNCHES

    a, b = torch.ones(2, 2, 128, 128, dtype=torch.float16, device=CUDA)
    out = torch.empty(128, 128, device=CUDA)
    for _ in range(2):
        with pytest.raises(OutOfResources, match="shared memory"):
            product_kernel[1,](a, b, out, 2, SIZE=128, num_warps=8, num_stages=4)
        product_kernel[1,](a, b, out, 2, SIZE=128, num_warps=8, num_stages=2)
        assert (out == 256).all()
    assert COMPILED["product_kernel"] == 3 and LAUNCHES["product_kernel"] == 2


@pytest.mark.on_cards("sm_86", compiles=True)
@pytest.mark.parametrize("precision", ["native", "int8"])
def test_attention_compiles_for_the_card_as_it_is_launched(precision):
    """On a card with the least shared memory; test_triton_compile.py compiles for all others."""
    from .triton_driver import COMPILED, LAUNCHES

    before = COMPILED.copy()
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = torch.randn(3, 1, 300, 2, 128, device=CUDA, generator=generator).half()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    plan = BlockPlan.full(300, 300, device=CUDA, block_m=128, block_n=64)
    out = block_sparse_attention(q, k, v, plan, kernel="triton", precision=precision)
    want = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    error = (out.double() - want).norm() / want.norm()
    assert error < {"native": 1e-3, "int8": 0.02}[precision]
    assert COMPILED["attention_kernel"] == before["attention_kernel"] + 1
    assert set(COMPILED) == set(LAUNCHES)
