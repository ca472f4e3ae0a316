"""Tests that need a GPU, on a machine with two that are not there: those that the interpreter can
do in seconds. What they find out about a GPU they still have to, on one."""

import pytest

from . import processes

pytestmark = pytest.mark.slow

TESTS = (
    "tests/kernels/test_hopper.py::test_is_the_definition_on_a_gpu",
    "tests/kernels/test_hopper.py::test_pooled_levels_on_a_gpu",
    "tests/kernels/test_hopper.py::test_slices_of_one_projection_on_a_gpu",
    "tests/kernels/test_triton_gpu.py::test_on_a_gpu_that_is_not_the_current_one",
    "tests/kernels/test_triton_gpu.py::test_plans_made_per_call_do_not_sync",
    "tests/kernels/test_triton_kept.py::test_pools_made_on_the_gpu_serve_the_next_calls",
    "tests/kernels/test_triton_lists.py",
    "tests/patching/test_token_order.py",
    "tests/psa/test_twins.py::test_levels_of_long_rows_are_equal_to_torch_on_a_gpu",
    "tests/sparge/test_triton_group_scores.py::test_the_map_on_a_gpu_is_the_map_on_the_cpu",
    "tests/sparge/test_triton_map.py::test_equals_the_published_map_on_a_gpu",
)
# Their cases that take longest.
LEFT_OUT = "not (N2363 or N7000 or B2-D or 128x128 or dropped or 128-torch.bfloat16-pooled)"


@pytest.fixture(scope="module")
def outcomes():
    return processes.run_tests(["sm_90", "sm_90"], TESTS, "-m", "gpu", "-k", LEFT_OUT)


@pytest.mark.parametrize("test", TESTS)
def test_passes_on_the_stand_in(outcomes, test):
    found = {name: wrong for name, wrong in outcomes.items() if name.startswith(test)}
    assert found, "none of its cases ran"
    wrong = [f"{name}\n{said}" for name, said in found.items() if said]
    assert not wrong, "\n".join(wrong)
