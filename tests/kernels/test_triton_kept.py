"""What is pooled in one call serves the next where their keys are the same there."""

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.kernels.reference import reference_attention

# Keys of 5 blocks; the last of them, which is ragged, changes from call to call.
BLOCK, TOKENS, OWN = 32, 150, 128
SCRATCH_BYTES = "sparse_video_attention.kernels.triton_scratch:SCRATCH_BYTES"


def plan_of(levels, pool_rows=0):
    used = levels.unique().tolist()
    return BlockPlan.from_levels(
        levels,
        block_m=32,
        block_n=BLOCK,
        q_len=50,
        k_len=TOKENS,
        pooled_remainder=pool_rows > 0,
        pool_rows=pool_rows,
        allowed=used,
    )


def calls(count, *, batch=2, heads=2):
    """(keys, values, queries, plans): every plan pools some of the blocks that stay as they are."""
    generator = torch.Generator().manual_seed(3)

    def normal(tokens):
        return torch.randn(batch, heads, tokens, 64, generator=generator)

    k, v = normal(TOKENS), normal(TOKENS)
    keys, values, queries, plans = [], [], [], []
    for call in range(count):
        for x, where in ((k, keys), (v, values)):
            where.append(torch.cat([x[:, :, :OWN], normal(TOKENS - OWN)], dim=2))
        row = torch.tensor([1, 4, BLOCK, BLOCK], dtype=torch.int8).roll(call)
        levels = torch.cat([row, row.new_ones(1)]).expand(1, 1, 2, 5)
        queries.append(normal(50))
        plans.append(plan_of(levels))
    return keys, values, queries, plans


def run(interpreter, case, sharing, precision="native", moved=(), settings=None):
    outputs, fills = interpreter.call(
        "kept_pools:in_one_buffer", *case, precision, sharing, moved, settings=settings
    )
    for out, k, v, q, plan in zip(outputs, *case, strict=True):
        want = reference_attention(q, k, v, plan, scale=0.2)
        error = (out.double() - want.double()).norm() / want.double().norm()
        assert error < (1e-5 if precision == "native" else 3e-2)
    return fills


def test_calls_that_share_pool_once(interpreter):
    assert run(interpreter, calls(3), [0, 0, 0]) == 1


def test_calls_that_do_not_share_pool_each(interpreter):
    case = calls(3)
    for x in case[0][2], case[1][2]:
        x[:, :, :OWN] += 1.0  # the third call's keys are others everywhere
    assert run(interpreter, case, [0, 0, 1]) == 2


def test_keys_in_another_place_pool_anew(interpreter):
    assert run(interpreter, calls(3), [0, 0, 0], moved=(1,)) == 2


def test_other_levels_pool_anew(interpreter):
    case = calls(2)
    levels = case[3][1].to_levels()
    case[3][1] = plan_of(levels.masked_fill(levels == 4, 8))
    assert run(interpreter, case, [0, 0]) == 2


@pytest.mark.parametrize("weighted", [(0, 1, 2), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("pool_rows", [1, 2])
def test_means_weighted_for_a_calls_queries_serve_no_other_call(interpreter, weighted, pool_rows):
    """Nor does such a call take plain means, or put away those that others use."""
    case = calls(3)
    for call in weighted:
        case[3][call] = plan_of(case[3][call].to_levels(), pool_rows)
    plain = 3 - len(weighted)
    assert run(interpreter, case, [0, 0, 0]) == len(weighted) + min(1, plain)


def test_a_call_that_pools_nothing_leaves_what_is_there(interpreter):
    case = calls(3)
    case[3][1] = plan_of(torch.ones(1, 1, 2, 5, dtype=torch.int8))
    # Nothing is launched where nothing is pooled, but fill is asked.
    assert run(interpreter, case, [0, 0, 0]) == 2


def test_eight_bits_are_quantised_at_every_call(interpreter):
    assert run(interpreter, calls(2), [0, 0], precision="int8") == 2


def test_a_layer_in_groups_of_heads_pools_at_every_call(interpreter):
    assert run(interpreter, calls(2), [0, 0], settings={SCRATCH_BYTES: 1}) == 2 * 4


@pytest.mark.gpu
def test_pools_made_on_the_gpu_serve_the_next_calls():
    from .kept_pools import in_one_buffer

    case = calls(3)
    on_gpu = ([x.cuda().half() for x in part] for part in case[:3])
    plans = [plan.on_device(torch.device("cuda")) for plan in case[3]]
    outputs, fills = in_one_buffer(*on_gpu, plans, "native", [0, 0, 0])
    assert fills == 1
    for out, k, v, q, plan in zip(outputs, *case, strict=True):
        want = reference_attention(q, k, v, plan, scale=0.2)
        assert (out.cpu().double() - want.double()).norm() / want.double().norm() < 2e-3
