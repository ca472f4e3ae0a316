"""Kernels that fail: who serves the call then, what is said, and when the choice is made anew."""

from dataclasses import replace

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, registry
from sparse_video_attention.kernels.fallback import (
    KernelFallback,
    NoKernelServesError,
    choose_kernels,
)
from sparse_video_attention.kernels.registry import Kernel, KernelCall, register
from torch._subclasses import FakeTensorMode


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    torch_kernel = registry.kernels()["torch"]
    monkeypatch.setattr(registry, "_KERNELS", {"torch": torch_kernel})
    registry.unavailable_reason.cache_clear()
    yield
    registry.unavailable_reason.cache_clear()


class Fast:
    """A kernel ahead of torch that computes `value` or raises it, and counts its runs."""

    def __init__(self, value, *, name="fast", precisions=("native",), refuses=None, rank=9.0):
        self.value, self.ran = value, []
        self._precisions = precisions
        self._refuses = refuses
        register(
            Kernel(
                name=name,
                unavailable=lambda: None,
                refuses=self._reason,
                run=self._run,
                auto_precision=lambda call: precisions[0],
                rank=lambda call: rank,
            )
        )

    def _reason(self, call):
        if call.precision not in self._precisions:
            return f"no {call.precision}"
        return self._refuses(call) if self._refuses else None

    def _run(self, call):
        self.ran.append(call.precision)
        value = self.value[call.precision] if isinstance(self.value, dict) else self.value
        if isinstance(value, Exception):
            raise value
        return torch.full_like(call.q, value)


def inputs(tokens=70, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = torch.randn(3, 1, 2, tokens, 16, generator=generator).to(dtype)
    blocks = -(-tokens // 32)
    mask = torch.ones(blocks, blocks, dtype=torch.bool)
    plan = BlockPlan.from_mask(mask, block_m=32, block_n=32, q_len=tokens, k_len=tokens)
    return q, k, v, plan


def dense(q, k, v, scale):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


def test_a_kernel_that_raises_is_tried_once_and_torch_serves():
    fast = Fast(RuntimeError("no luck\nand a page of text"))
    runs, (q, k, v, plan) = KernelFallback(), inputs()
    for _ in range(3):
        run = runs.run(q, k, v, plan, scale=0.25)
        torch.testing.assert_close(run.out, dense(q, k, v, 0.25))
        assert run.kernel == "torch"
        assert run.notes == ("kernel fast is set aside for this shape: RuntimeError: no luck",)
    assert fast.ran == ["native"]
    assert runs.run(*inputs(40), scale=0.25).kernel == "torch"
    assert fast.ran == ["native", "native"], "another shape is another try"


def test_a_first_nan_is_found_and_a_later_one_is_not_looked_for():
    fast = Fast(float("nan"))
    assert KernelFallback().run(*inputs(), scale=0.25).kernel == "torch"
    fast.value = 3.0
    runs = KernelFallback()
    assert runs.run(*inputs(), scale=0.25).kernel == "fast"
    fast.value = float("nan")
    assert runs.run(*inputs(), scale=0.25).kernel == "fast"


def test_infinities_are_not_taken_for_nan():
    Fast(0.0)
    both = torch.tensor([float("inf"), -float("inf")]).repeat(8)
    infinite = replace(registry.kernels()["fast"], run=lambda call: both.expand(call.q.shape))
    register(infinite)
    assert KernelFallback().run(*inputs(), scale=0.25).kernel == "fast"


def test_nan_in_the_inputs_is_nobodys_fault():
    fast = Fast(float("nan"))
    q, k, v, plan = inputs()
    v[0, 0, 3, 3] = float("nan")
    runs = KernelFallback()
    assert runs.run(q, k, v, plan, scale=0.25).kernel == "fast"
    assert runs.run(*inputs(), scale=0.25).kernel == "torch", "the check was only put off"
    assert len(fast.ran) == 2


@pytest.mark.parametrize("precision", ["int8", "auto"])
def test_a_kernel_that_fails_in_8_bits_may_still_serve_in_its_own_dtype(precision):
    fast = Fast({"int8": float("nan"), "native": 3.0}, precisions=("int8", "native"))
    runs = KernelFallback()
    for _ in range(2):
        run = runs.run(*inputs(), scale=0.25, precision=precision)
        assert (run.kernel, run.precision) == ("fast", "native")
        assert "kernel fast int8 is set aside" in run.notes[0]
    assert fast.ran == ["int8", "native", "native"]


def test_all_8_bit_kernels_come_before_any_other():
    named = Fast(1.0, name="named", precisions=("native",))
    other = Fast(2.0, name="other", precisions=("int8",), rank=0.5)
    run = KernelFallback().run(*inputs(), scale=0.25, kernel="named", precision="int8")
    assert (run.kernel, run.precision) == ("other", "int8")
    assert run.notes == ("kernel named is not used: no int8",)
    other.value = RuntimeError("broken")
    run = KernelFallback().run(*inputs(), scale=0.25, kernel="named", precision="int8")
    assert (run.kernel, run.precision) == ("named", "native")
    assert named.ran == ["native"]


def test_rivals_are_what_could_be_taken_in_its_place():
    Fast(1.0, precisions=("native", "int8", "fp8"))
    Fast(1.0, name="other", precisions=("int8",), rank=0.5)
    Fast(1.0, name="unranked", rank=0.0)
    runs = KernelFallback()

    def rivals(**how):
        return set(runs.run(*inputs(), scale=0.25, **how).rivals)

    assert rivals() == {("fast", "native"), ("fast", "int8"), ("other", "int8")}
    assert rivals(kernel="fast") == {("fast", "native"), ("fast", "int8")}
    assert rivals(precision="int8") == {("fast", "int8"), ("other", "int8")}
    assert rivals(precision="native") == {("fast", "native")}
    assert rivals(kernel="unranked") == {("unranked", "native")}


def test_a_named_kernel_without_the_precision_is_not_said_to_be_unused():
    run = KernelFallback().run(*inputs(), scale=0.25, kernel="torch", precision="int8")
    assert (run.kernel, run.precision) == ("torch", "native")
    assert run.notes == (
        "precision int8 is not to be had here (kernel torch: it computes in the inputs' dtype "
        "only, not in int8); native is used",
    )


@pytest.mark.parametrize("named", ["auto", "fast"])
def test_native_is_never_given_up_for_8_bits(named):
    fast = Fast({"int8": 1.0, "native": 2.0}, precisions=("int8", "native"))
    run = KernelFallback().run(*inputs(), scale=0.25, kernel=named, precision="native")
    assert (run.kernel, run.precision) == ("fast", "native")
    fast.value = RuntimeError("broken")
    run = KernelFallback().run(*inputs(), scale=0.25, kernel=named, precision="native")
    assert (run.kernel, run.precision) == ("torch", "native")
    assert fast.ran == ["native", "native"]


@pytest.mark.parametrize(
    ("device", "named", "said"),
    [
        ("cuda", "auto", True),
        ("xpu", "auto", True),
        ("cuda", "torch", False),
        ("cpu", "auto", False),
    ],
)
def test_a_gpu_without_triton_is_told_so(device, named, said):
    Fast(0.0, name="triton", refuses=lambda call: "triton is not installed: pip install triton")
    Fast(1.0, name="torch", rank=1.0)
    with FakeTensorMode():  # a GPU's tensors, without a GPU
        q, k, v = torch.empty(3, 1, 2, 64, 16, device=device)
    notes = choose_kernels(KernelCall(q, k, v, None, 0.25, "auto"), named).notes
    assert any("triton is not installed" in note for note in notes) == said


@pytest.mark.parametrize(
    "error",
    [
        lambda n: torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {n}.00 MiB."),
        # PyTorch's on a CPU: Windows, and elsewhere.
        lambda n: RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you "
            f"tried to allocate {n} bytes."
        ),
        lambda n: RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            f"memory: you tried to allocate {n} bytes. Error code 12 (Cannot allocate memory)"
        ),
        lambda n: RuntimeError(f"Triton Error [CUDA]: out of memory ({n})"),
        lambda n: RuntimeError(f"CUBLAS_STATUS_ALLOC_FAILED when calling {n}"),
    ],
)
def test_out_of_memory_passes_over_one_call_only(error):
    fast = Fast(error(0))
    runs = KernelFallback()
    said = set()
    for n in range(3):
        fast.value = error(n)
        run = runs.run(*inputs(), scale=0.25)
        assert run.kernel == "torch" and "fast ran out of memory" in run.notes[0]
        said.update(run.notes)
    assert len(said) == 1, "said once per run, so without numbers that change"
    fast.value = 3.0
    run = runs.run(*inputs(), scale=0.25)
    assert run.kernel == "fast" and not run.notes


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")


def test_what_is_short_of_memory_again_and_again_is_tried_ever_less_often():
    fast = Fast({"int8": NO_MEMORY, "native": 2.0}, precisions=("int8", "native"))
    runs, tried = KernelFallback(), []
    for n in range(400):
        before = fast.ran.count("int8")
        run = runs.run(*inputs(), scale=0.25)
        assert (run.kernel, run.precision) == ("fast", "native") and bool((run.out == 2.0).all())
        assert run.notes == ("kernel fast int8 ran out of memory",)
        if fast.ran.count("int8") > before:
            tried.append(n)
    gaps = [after - before for before, after in zip(tried, tried[1:], strict=False)]
    assert gaps == [1, 2, 4, 8, 16, 32, *[64] * 5]
    # With memory again it serves, and a shortage later is a first one.
    fast.value["int8"] = 8.0
    served = [runs.run(*inputs(), scale=0.25).precision for _ in range(66)]
    assert served == sorted(served, reverse=True) and served[-1] == "int8"
    fast.value["int8"] = NO_MEMORY
    assert runs.run(*inputs(), scale=0.25).precision == "native"
    fast.value["int8"] = 8.0
    assert runs.run(*inputs(), scale=0.25).precision == "int8"


def test_nothing_is_left_to_plain_pytorch_for_want_of_memory():
    fast = Fast(NO_MEMORY)
    runs = KernelFallback()
    for n in range(12):
        assert runs.run(*inputs(), scale=0.25).kernel == "torch" and len(fast.ran) == n + 1


def test_shapes_are_short_of_memory_by_themselves():
    fast = Fast({"int8": NO_MEMORY, "native": 2.0}, precisions=("int8", "native"))
    runs = KernelFallback()
    for _ in range(4):
        runs.run(*inputs(), scale=0.25)
    fast.value["int8"] = 8.0
    assert runs.run(*inputs(71), scale=0.25).precision == "int8"


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_infinite_inputs_make_is_not_the_kernels_fault(bad, which):
    runs, (*qkv, plan) = KernelFallback(), inputs()
    overflown = [x.clone() for x in qkv]
    overflown[which][0, 0, 0, 0] = bad
    for _ in range(2):
        assert runs.run(*overflown, plan, scale=0.25).kernel == "torch"
        run = runs.run(*qkv, plan, scale=0.25)
        assert run.kernel == "torch" and not run.notes
        torch.testing.assert_close(run.out, dense(*qkv, 0.25))


def test_a_call_that_needs_gradients_is_no_other_calls_choice():
    fast = Fast(1.0, refuses=lambda call: "no backward" if call.needs_gradients else None)
    runs, (q, k, v, plan) = KernelFallback(), inputs()
    assert runs.run(q, k, v, plan, scale=0.25).kernel == "fast"
    with pytest.raises(NoKernelServesError, match="it has no backward pass"):
        runs.run(q, k, v.requires_grad_(), plan, scale=0.25)
    assert fast.ran == ["native"]


def test_a_plan_for_another_length_is_an_error_after_a_good_call_too():
    """Both plans have the same number of blocks; a kernel would read past the end of k."""
    runs, (q, k, v, plan) = KernelFallback(), inputs(70)
    runs.run(q, k, v, plan, scale=0.25)
    with pytest.raises(ValueError, match="the plan is for 71 queries and 71 keys; got 70"):
        runs.run(q, k, v, inputs(71)[3], scale=0.25)
    with pytest.raises(ValueError, match="must have one dtype"):
        runs.run(q, k.half(), v, plan, scale=0.25)


def test_a_scale_that_is_refused_after_a_good_call():
    fast = Fast(1.0, refuses=lambda call: None if call.scale > 0 else "a negative scale")
    runs = KernelFallback()
    assert runs.run(*inputs(), scale=0.25).kernel == "fast"
    q, k, v, plan = inputs()
    run = runs.run(q, k, v, plan, scale=-0.25)
    assert run.kernel == "torch" and fast.ran == ["native"]
    torch.testing.assert_close(run.out, dense(q, k, v, -0.25))
