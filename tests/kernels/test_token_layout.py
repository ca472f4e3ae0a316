"""Token layouts: what is in a grid, what is not, and what does not fit."""

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.kernels.orders import mirrored_order, video_order

# A video, two behind it, and tokens on either side that are in none of them.
SEVERAL = TokenLayout(3, 5, 7, 11, suffix_tokens=60 + 16 + 9, suffix_grids=((3, 4, 5), (1, 4, 4)))


def test_grids_lie_one_behind_the_other():
    assert SEVERAL.grids() == [(11, (3, 5, 7)), (116, (3, 4, 5)), (176, (1, 4, 4))]
    assert SEVERAL.kept_suffix_tokens == 9 and SEVERAL.num_tokens == 201
    assert SEVERAL.video_tokens == 105, "the video alone"


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (TokenLayout(3, 5, 7), "3x5x7"),
        (TokenLayout(3, 5, 7, 2, 4), "3x5x7 (2 before, 4 after)"),
        (SEVERAL, "3x5x7 (11 before, 3x4x5 + 1x4x4 + 9 after)"),
        (TokenLayout(3, 5, 7, 0, 60, ((3, 4, 5),)), "3x5x7 (3x4x5 after)"),
    ],
    ids=str,
)
def test_what_the_log_says(layout, said):
    assert str(layout) == said


@pytest.mark.parametrize("grids", [((3, 4, 5), (2, 1, 1)), ((3, 4, 0),)], ids=str)
def test_grids_that_do_not_fit_the_suffix_are_refused(grids):
    with pytest.raises(ValueError, match=r"suffix_grids=.* do not fit in 61 suffix_tokens"):
        TokenLayout(3, 5, 7, suffix_tokens=61, suffix_grids=grids)


def test_a_layout_is_a_key_whatever_its_grids_came_in():
    listed = TokenLayout(3, 5, 7, suffix_tokens=60, suffix_grids=[[3, 4, 5]])
    same = TokenLayout(3, 5, 7, suffix_tokens=60, suffix_grids=((3, 4, 5),))
    assert listed == same and hash(listed) == hash(same)


def test_any_order_can_be_mirrored():
    order = torch.randperm(SEVERAL.num_tokens, generator=torch.Generator().manual_seed(0))
    mirrored = mirrored_order(order, SEVERAL)
    assert mirrored.sort().values.tolist() == list(range(SEVERAL.num_tokens))
    assert torch.equal(mirrored_order(mirrored, SEVERAL), order)


@pytest.mark.parametrize("method", ["Gilbert", "STA"])
def test_every_grid_has_the_order_that_it_has_alone(method):
    order = video_order(SEVERAL, method, (2, 2, 2))
    mirrored = mirrored_order(order, SEVERAL)
    at = list(range(11))
    assert order[:11].tolist() == mirrored[:11].tolist() == at
    for first, grid in ((11, (3, 5, 7)), (116, (3, 4, 5)), (176, (1, 4, 4))):
        alone = TokenLayout(*grid)
        part = slice(first, first + alone.num_tokens)
        its_order = video_order(alone, method, (2, 2, 2))
        assert torch.equal(order[part] - first, its_order)
        assert torch.equal(mirrored[part] - first, mirrored_order(its_order, alone))
    assert order[192:].tolist() == mirrored[192:].tolist() == list(range(192, 201))
