"""The caches of a patched model: built once, bounded, per device."""

from dataclasses import dataclass

import torch
from sparse_video_attention.kernels import BlockPlan, TokenLayout
from sparse_video_attention.patching.plans import MAX_GRIDS, PlanCache

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Everything:
    """Keeps every block; counts how often it is asked."""

    asked: list = None
    name = "everything"
    is_static = True

    def __hash__(self):
        return 0

    def order(self, layout):
        self.asked.append(("order", layout))
        return torch.arange(layout.num_tokens).roll(1)

    def static_plan(self, layout, device):
        self.asked.append(("plan", layout))
        blocks = -(-layout.num_tokens // 64)
        return BlockPlan.from_mask(
            torch.ones(blocks, blocks, dtype=torch.bool),
            block_m=64,
            block_n=64,
            q_len=layout.num_tokens,
            k_len=layout.num_tokens,
        )


def test_a_plan_and_an_order_are_built_once_per_grid():
    policy, cache = Everything([]), PlanCache()
    layouts = [TokenLayout(1, 8, 8), TokenLayout(2, 8, 8)]
    first = [cache.plan(policy, layout, CPU) for layout in layouts]
    again = [cache.plan(policy, layout, CPU) for layout in layouts]
    assert all(a is b for a, b in zip(first, again, strict=True))
    cache.order(policy, layouts[0], CPU)
    cache.order(policy, layouts[0], CPU)
    assert policy.asked == [("plan", layouts[0]), ("plan", layouts[1]), ("order", layouts[0])]


def test_changing_grids_do_not_fill_memory_and_the_latest_stay():
    policy, cache = Everything([]), PlanCache()
    layouts = [TokenLayout(frames, 8, 8) for frames in range(1, 3 * MAX_GRIDS)]
    for layout in layouts:
        cache.plan(policy, layout, CPU)
        cache.order(policy, layout, CPU)
    assert len(cache) == 2 * MAX_GRIDS
    policy.asked.clear()
    cache.plan(policy, layouts[-MAX_GRIDS], CPU)
    assert policy.asked == []
    cache.plan(policy, layouts[0], CPU)
    assert policy.asked == [("plan", layouts[0])]


@dataclass(frozen=True)
class InTurn(Everything):
    """Knows two orders."""

    def __hash__(self):
        return 1

    def orders(self, layout):
        self.asked.append(("orders", layout))
        tokens = torch.arange(layout.num_tokens)
        return tokens.roll(1), tokens.roll(2)


def test_steps_take_turns_with_the_orders_of_a_policy():
    policy, cache, layout = InTurn([]), PlanCache(), TokenLayout(2, 5, 7)
    orders = [cache.order(policy, layout, CPU, step) for step in range(4)]
    assert orders[0] is orders[2] and orders[1] is orders[3]
    assert policy.asked == [("orders", layout)]
    for step, shift in ((0, 1), (1, 2)):
        assert torch.equal(orders[step].forward, torch.arange(70).roll(shift))


def test_a_policy_that_knows_one_order_keeps_it():
    policy, cache = Everything([]), PlanCache()
    orders = {cache.order(policy, TokenLayout(2, 5, 7), CPU, step) for step in range(4)}
    assert len(orders) == 1


def test_an_order_undoes_itself():
    order = PlanCache().order(Everything([]), TokenLayout(2, 5, 7), CPU)
    tokens = torch.randn(70)
    assert torch.equal(tokens[order.forward][order.backward], tokens)
    assert not torch.equal(tokens[order.forward], tokens)
