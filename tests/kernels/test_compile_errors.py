"""What is said of a kernel that a Triton release cannot compile: what is wrong, not where."""

import os

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton compiles without TRITON_INTERPRET only",
)
import triton.language as tl  # noqa: E402
from sparse_video_attention.kernels.memory_errors import short_error  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402


@triton.jit
def _of_another_release(x):
    tl.store(x)


@triton.jit
def calls_it(X):
    _of_another_release(X)


@triton.jit
def says_so_itself(X):
    tl.static_assert(False, "this release is too old")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [(calls_it, "'value'"), (says_so_itself, "this release is too old")],
)
def test_an_error_about_a_kernel_s_source_says_what_is_wrong(kernel, said):
    source = triton.compiler.ASTSource(kernel, {"X": "*fp32"}, {})
    with pytest.raises(triton.CompilationError) as raised:
        triton.compile(source, target=GPUTarget("cuda", 80, 32))
    line = short_error(raised.value, 200)
    assert said in line and not line.endswith(":") and "\n" not in line


def test_other_errors_keep_their_first_line():
    assert short_error(ValueError("at least this\nand more"), 200) == "ValueError: at least this"
