"""Index lists made by Triton are those made by torch, and those counted by hand."""

import contextlib

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, lists
from sparse_video_attention.kernels import triton_lists as triton_lists_module
from sparse_video_attention.kernels.lists import strided_lists
from sparse_video_attention.kernels.twins import Twins


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_lists(request):
    if request.param == "interpreted":
        interpreter = request.getfixturevalue("interpreter")

        def lists(levels, kept, remainder=False, **settings):
            name = "sparse_video_attention.kernels.triton_lists:strided_lists"
            module = "sparse_video_attention.kernels.triton_lists:"
            values = {module + key: value for key, value in settings.items()}
            return interpreter.call(name, levels, kept, remainder, settings=values)

        return lists

    def lists(levels, kept, remainder=False, **settings):
        from sparse_video_attention.kernels import triton_lists

        return tuple(x.cpu() for x in triton_lists.strided_lists(levels.cuda(), kept, remainder))

    return lists


def random_levels(*shape, values, dtype=torch.int8):
    generator = torch.Generator().manual_seed(len(values))
    return torch.tensor(values, dtype=dtype)[
        torch.randint(0, len(values), shape, generator=generator)
    ]


@pytest.mark.parametrize(
    "levels, kept",
    [
        pytest.param(
            random_levels(2, 2, 3, 37, values=(0, 1, 2, 4, 8)), (1, 2, 4, 8), id="pyramid"
        ),
        pytest.param(random_levels(1, 1, 5, 64, values=(0, 1)), (1,), id="mask"),
        pytest.param(
            random_levels(1, 2, 2, 5, values=(1, 128), dtype=torch.int16), (1, 128), id="remainder"
        ),
        pytest.param(
            random_levels(1, 1, 2, 9, values=(1, 256), dtype=torch.int16), (1, 256), id="level-256"
        ),
        pytest.param(random_levels(1, 1, 3, 20, values=(0, 1, 2, 4)), (2,), id="unlisted-levels"),
        pytest.param(torch.zeros(1, 1, 2, 3, dtype=torch.int8), (1, 8), id="empty-rows"),
        pytest.param(
            random_levels(2, 1, 4, 10, values=(0, 1)).mT.contiguous().mT, (1,), id="strided"
        ),
    ],
)
def test_equal_to_torch(triton_lists, levels, kept):
    indices, bounds = triton_lists(levels, kept)
    want_indices, want_bounds = strided_lists(levels, kept)
    assert torch.equal(bounds, want_bounds) and bounds.dtype == want_bounds.dtype
    assert torch.equal(indices, want_indices) and indices.dtype == want_indices.dtype


@pytest.mark.parametrize("remainder", [False, True])
@pytest.mark.parametrize("pairs", [1, 80, 111, 10**6])
def test_torch_lists_a_few_rows_at_a_time(storages, monkeypatch, pairs, remainder):
    """One, two, three and all of them; in rows that are counted by hand."""
    levels = random_levels(2, 2, 4, 37, values=(0, 1, 8))
    kept = (1, 8, 32) if remainder else (1, 8)
    monkeypatch.setattr(lists, "CHUNK_PAIRS", pairs)
    with storages() as made:
        indices, bounds = strided_lists(levels, kept, remainder)
    assert bounds.shape == (2, 2, 4, len(kept) + 1)
    for row, (its_levels, its_bounds) in enumerate(
        zip(levels.view(-1, 37).tolist(), bounds.flatten(0, 2).tolist(), strict=True)
    ):
        want = [[i for i, x in enumerate(its_levels) if (x or 32) == level] for level in kept]
        ends = [row * 37 + sum(map(len, want[:n])) for n in range(len(kept) + 1)]
        assert its_bounds == ends
        assert indices[ends[0] : ends[-1]].tolist() == sum(want, [])
    # Its own 4 bytes a pair, and a few rows' 8.
    at_once = max(37, min(pairs, levels.numel()) // 37 * 37)
    assert max(made.sizes.values()) <= max(4 * levels.numel(), 8 * at_once)


@pytest.mark.parametrize("remainder", [False, True])
def test_rows_longer_than_a_chunk(triton_lists, remainder):
    levels = random_levels(1, 1, 2, 40, values=(0, 1, 8))
    lists = triton_lists(levels, (1, 8), remainder, MAX_CHUNK=16)
    want = strided_lists(levels, (1, 8), remainder)
    assert all(torch.equal(x, y) for x, y in zip(lists, want, strict=True))


@pytest.mark.parametrize(
    ("values", "kept"),
    [((0, 1), (1, 32)), ((0, 1, 2, 8), (1, 2, 4, 8, 128)), ((0, 1, 3), (1, 256)), ((0,), (16,))],
    ids=str,
)
def test_a_remainder_is_the_blocks_of_no_level(triton_lists, values, kept):
    """Without a copy of the levels that names it; the last level need not be a number of theirs."""
    levels = random_levels(2, 2, 3, 37, values=values)
    named = levels.to(torch.int16).masked_fill_(levels == 0, kept[-1])
    want = strided_lists(named, kept)
    for made in (triton_lists(levels, kept, True), strided_lists(levels, kept, True)):
        assert all(torch.equal(x, y) for x, y in zip(made, want, strict=True))


def test_by_hand(triton_lists):
    levels = torch.tensor([[[[8, 1, 0, 2, 1]], [[0, 0, 0, 0, 2]]]], dtype=torch.int8)
    indices, bounds = triton_lists(levels, (1, 2, 8))
    assert bounds.tolist() == [[[[0, 2, 3, 4]], [[5, 5, 6, 6]]]]
    assert indices[:4].tolist() == [1, 4, 3, 0]
    assert indices[5:6].tolist() == [4]


@pytest.mark.gpu
def test_plans_made_on_the_gpu_are_those_made_on_the_cpu():
    levels = random_levels(2, 3, 9, 11, values=(0, 1, 2, 4, 8))
    sizes = {"block_m": 128, "block_n": 128, "q_len": 1100, "k_len": 1300}
    on_gpu = BlockPlan.from_levels(levels.cuda(), **sizes, packed=False, pooled_remainder=True)
    on_cpu = BlockPlan.from_levels(levels, **sizes, packed=False, pooled_remainder=True)
    assert torch.equal(on_gpu.to_levels().cpu(), on_cpu.to_levels())


class LooksLikeCuda(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("off", [(), (0, 5), (1, 7)], ids=["right", "an-entry", "a-bound"])
def test_first_lists_are_held_against_torch(monkeypatch, caplog, off):
    """Wrong entries would have the attention kernel read outside of k and v."""
    levels = random_levels(1, 2, 4, 6, values=(0, 1))
    truth = strided_lists(levels, (1,))

    def twin(levels, kept, remainder):
        indices, bounds = (
            part.clone() for part in strided_lists(levels.as_subclass(torch.Tensor), kept)
        )
        # What is not listed may be anything.
        indices[bounds[0, 0, 0, 1] :][: levels.shape[-1] - bounds[0, 0, 0, 1]] = 99
        if off:
            (indices, bounds)[off[0]].flatten()[0] += off[1]
        return indices, bounds

    monkeypatch.setattr(triton_lists_module, "strided_lists", twin)
    monkeypatch.setattr(lists, "_has_triton", lambda: True)
    monkeypatch.setattr(lists, "_TWINS", Twins())
    monkeypatch.setattr(f"{Twins.__module__}.architecture", lambda device: 80)
    monkeypatch.setattr(f"{Twins.__module__}._compiles_nothing", lambda device: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    indices, bounds = strided_lists(levels.as_subclass(LooksLikeCuda), (1,))
    assert torch.equal(bounds, truth[1])
    assert (bool(off)) == ("lists" in caplog.text and "wrong" in caplog.text), caplog.text
    assert (99 in indices.tolist()) == (not off)


def test_where_triton_cannot_compile_torch_makes_the_lists(monkeypatch):
    levels = random_levels(1, 2, 4, 6, values=(0, 1))
    tries = []

    def fail(levels, kept, remainder):
        tries.append(kept)
        raise RuntimeError("ptxas does not know this GPU")

    monkeypatch.setattr(triton_lists_module, "strided_lists", fail)
    monkeypatch.setattr(lists, "_has_triton", lambda: True)
    monkeypatch.setattr(lists, "_TWINS", Twins())
    monkeypatch.setattr(f"{Twins.__module__}.architecture", lambda device: 80)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for _ in range(3):
        made = strided_lists(levels.as_subclass(LooksLikeCuda), (1,))
    assert tries == [(1,)]
    for part, expected in zip(made, strided_lists(levels, (1,)), strict=True):
        assert torch.equal(part, expected)
