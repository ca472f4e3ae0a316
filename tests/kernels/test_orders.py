"""Token orders: the published Hilbert curve, tiles, and how they sit in a whole sequence."""

import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_video_attention.kernels import TokenLayout, gilbert_order
from sparse_video_attention.kernels.orders import (
    mirrored_in_turn,
    mirrored_order,
    tile_order,
    video_order,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "gilbert_orders.npz")


def coordinates(order, width, height):
    """int64 [tokens, 3]: x, y, z of every position."""
    return torch.stack([order % width, order // width % height, order // (width * height)], dim=1)


@pytest.mark.parametrize("grid", GOLDEN.files)
def test_gilbert_equals_the_published_curve(grid):
    width, height, depth = map(int, re.findall(r"\d+", grid))
    order = gilbert_order(width, height, depth)
    assert order.dtype == torch.int64
    np.testing.assert_array_equal(order.numpy(), GOLDEN[grid])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(*[st.integers(1, 24)] * 3)
def test_gilbert_visits_every_point_once(width, height, depth):
    order = gilbert_order(width, height, depth)
    assert order[0] == 0
    assert torch.equal(order.sort().values, torch.arange(width * height * depth))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(*[st.integers(1, 12).map(lambda half: 2 * half)] * 3)
def test_gilbert_steps_to_a_neighbour_in_even_grids(width, height, depth):
    points = coordinates(gilbert_order(width, height, depth), width, height)
    assert (points.diff(dim=0).abs().sum(1) == 1).all()


@pytest.mark.parametrize("side", [2, 4, 8])
def test_gilbert_of_a_cube_fills_its_subcubes_one_by_one(side):
    # What makes it a Hilbert curve: aligned subcubes are contiguous stretches of it.
    points = coordinates(gilbert_order(16, 16, 16), 16, 16) // side
    assert (points.view(-1, side**3, 3) == points[:: side**3, None]).all()


@pytest.mark.parametrize(
    "grid", [(80, 45, 21), (52, 30, 21), (45, 30, 13)], ids=["720p", "480p", "cogvideox"]
)
def test_gilbert_makes_blocks_compact(grid):
    width, height, depth = grid

    def mean_spread(order):
        blocks = coordinates(order, width, height)[: order.numel() // 128 * 128].view(-1, 128, 3)
        return float((blocks.amax(1) - blocks.amin(1)).sum(1).float().mean())

    # A compact block of 128 is about 5 points a side; a raster block is more than a row.
    assert mean_spread(gilbert_order(*grid)) < 20
    assert mean_spread(torch.arange(width * height * depth)) > 45


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_gilbert_of_a_720p_video_takes_under_200_ms_of_one_core(one_thread):
    times = []
    for _ in range(5):
        start = time.thread_time()  # not the wall clock: other processes may hold the cores
        gilbert_order(80, 45, 21)
        times.append(time.thread_time() - start)
    assert min(times) < 0.2


def tiles_by_loops(extents, tile):
    frames, height, width = extents
    order = []
    for f0 in range(0, frames, tile[0]):
        for y0 in range(0, height, tile[1]):
            for x0 in range(0, width, tile[2]):
                order += [
                    x + width * (y + height * f)
                    for f in range(f0, min(f0 + tile[0], frames))
                    for y in range(y0, min(y0 + tile[1], height))
                    for x in range(x0, min(x0 + tile[2], width))
                ]
    return order


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.tuples(*[st.integers(1, 19)] * 3), st.tuples(*[st.integers(1, 9)] * 3))
def test_tiles_follow_each_other_whole(extents, tile):
    assert tile_order(*extents, tile).tolist() == tiles_by_loops(extents, tile)


def test_tiles_are_2_by_8_by_8_unless_said():
    assert tile_order(5, 17, 20).tolist() == tiles_by_loops((5, 17, 20), (2, 8, 8))


@pytest.mark.parametrize("method", ["Gilbert", "STA"])
@pytest.mark.parametrize(
    "layout",
    [
        TokenLayout(3, 5, 7),
        TokenLayout(3, 5, 7, prefix_tokens=226),
        TokenLayout(4, 9, 1, suffix_tokens=11),
        TokenLayout(5, 16, 10, prefix_tokens=3, suffix_tokens=2),
    ],
    ids=["video", "text-first", "text-last", "both"],
)
def test_text_keeps_its_place_and_video_moves(layout, method):
    order = video_order(layout, method, (2, 4, 4)).tolist()
    begin, end = layout.prefix_tokens, layout.prefix_tokens + layout.video_tokens
    if method == "STA":
        video = tiles_by_loops((layout.frames, layout.height, layout.width), (2, 4, 4))
    else:
        video = gilbert_order(layout.width, layout.height, layout.frames).tolist()
    assert order[:begin] == list(range(begin))
    assert order[begin:end] == [begin + token for token in video]
    assert order[end:] == list(range(end, layout.num_tokens))
    assert order != sorted(order)


def test_none_moves_nothing():
    assert video_order(TokenLayout(3, 5, 7), "none") is None


@pytest.mark.parametrize("method", ["Gilbert", "STA"])
@pytest.mark.parametrize(
    "layout",
    [TokenLayout(3, 5, 7), TokenLayout(4, 9, 1, 226), TokenLayout(5, 16, 10, 3, 2)],
    ids=["video", "text-first", "both"],
)
def test_the_mirrored_order_begins_at_the_opposite_corner(layout, method):
    order = video_order(layout, method, (2, 4, 4))
    mirrored = mirrored_order(order, layout)
    begin, end = layout.prefix_tokens, layout.prefix_tokens + layout.video_tokens
    outside = [*range(begin), *range(end, layout.num_tokens)]
    assert mirrored[outside].tolist() == outside
    grid = layout.width, layout.height
    there, back = (coordinates(found[begin:end] - begin, *grid) for found in (order, mirrored))
    ends = torch.tensor([layout.width - 1, layout.height - 1, layout.frames - 1])
    assert torch.equal(back, ends - there)
    assert torch.equal(mirrored_order(mirrored, layout), order)


def test_orders_take_turns_unless_there_is_one():
    layout = TokenLayout(3, 5, 7)
    order = video_order(layout, "Gilbert")
    turns = mirrored_in_turn(order, layout, True)
    assert len(turns) == 2 and turns[0] is order
    assert torch.equal(turns[1], mirrored_order(order, layout))
    assert mirrored_in_turn(order, layout, False) == (order,)
    assert mirrored_in_turn(None, layout, True) == (None,)


@pytest.mark.parametrize("grid", [(52, 30, 21), (45, 30, 13)], ids=["480p", "cogvideox"])
def test_mirrored_blocks_hold_other_tokens_together(grid):
    layout = TokenLayout(*reversed(grid))
    order = video_order(layout, "Gilbert")
    last = layout.num_tokens // 128 * 128

    def blocks(found):
        return {frozenset(block) for block in found[:last].view(-1, 128).tolist()}

    ours, mirrored = blocks(order), blocks(mirrored_order(order, layout))
    assert len(ours & mirrored) < 0.02 * len(ours)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: gilbert_order(4, 0, 2),
            "width, height and depth must be at least 1; got 4, 0, 2",
        ),
        (
            lambda: tile_order(0, 3, 3),
            "a token grid needs at least one token each way; got 0x3x3",
        ),
        (
            lambda: tile_order(2, 3, 3, (2, 0, 8)),
            "tile_size is three numbers of at least 1; got [2, 0, 8]",
        ),
        (
            lambda: video_order(TokenLayout(2, 3, 3), "hilbert"),
            "a token order is one of Gilbert, STA, none; got 'hilbert'",
        ),
    ],
    ids=["gilbert", "grid", "tile", "method"],
)
def test_bad_arguments_are_named(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == sentence
