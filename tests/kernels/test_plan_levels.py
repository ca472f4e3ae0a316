"""Which levels a plan has: those that are allowed, and of a packed one those that occur."""

import pytest
import torch

from .plans import PACKED, plan_of, random_levels


def test_packed_plans_list_only_the_levels_that_occur():
    assert plan_of(random_levels(4, 6, choices=(0, 1, 4))).levels == (1, 4)
    assert plan_of(torch.zeros(2, 2, dtype=torch.int8), pooled_remainder=True).levels == (1, 32)


@PACKED
def test_a_level_that_is_allowed_twice_is_one(packed):
    levels = random_levels(2, 4, 7, choices=(0, 1))
    assert plan_of(levels, packed=packed, allowed=(1, 1)).levels == (1,)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_levels_are_integers(dtype):
    with pytest.raises(ValueError, match="block levels are integers; got torch"):
        plan_of(random_levels(4, 6).to(dtype))
