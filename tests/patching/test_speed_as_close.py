"""Plans of another policy that is as close to full attention serve where they are faster."""

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan

from .timed_machine import FIXED, INT8, a_policy

NO_MEMORY = torch.OutOfMemoryError("no memory left")


def in_halves(runs, fails=None, **has):
    """A policy in blocks of 64 that has one in blocks of 32, whose plans cover all.

    fails: raised instead of a plan; or a list of what is to be raised, one by one, None for none.
    """

    def plan(q, k, layout, **kwargs):
        failure = (fails.pop(0) if fails else None) if isinstance(fails, list) else fails
        if failure is not None:
            raise failure
        tokens = layout.num_tokens
        mask = torch.ones(tokens // 32, tokens // 32, dtype=torch.bool)
        return BlockPlan.from_mask(mask, block_m=32, block_n=32, q_len=tokens, k_len=tokens)

    other = a_policy(plan=staticmethod(plan), **has)
    return a_policy(as_close=staticmethod(lambda layout: (other, "blocks of 32")), **has)


def sparse_calls(machine, monkeypatch):
    """Which blocks each run of the kernel had."""
    seen = []
    tick = machine._tick
    monkeypatch.setattr(machine, "_tick", lambda which: (seen.append(which), tick(which)))
    return seen


@pytest.mark.parametrize(("took", "serves"), [(0.0271, "native 32"), (0.0274, "native")])
def test_it_has_to_be_a_tenth_faster(runs, machine, monkeypatch, took, serves, caplog):
    machine.has_kernel("native")
    machine.took["native 32"] = took
    seen = sparse_calls(machine, monkeypatch)
    policy = in_halves(runs)
    with caplog.at_level("INFO", logger="sparse_video_attention"):
        assert [runs.call(policy=policy) for _ in range(3)] == ["fast"] * 3
    assert seen[-3:] == [serves] * 3
    used = ", used" if serves == "native 32" else ""
    told = f"timed once: fast 30.0 ms; blocks of 32, which is as close: fast {1000 * took:.1f} ms"
    assert f"{told}{used}" in runs.line() and (", used" in runs.line()) == bool(used)
    assert caplog.text.count("timed once") == 1 and "WARNING" not in caplog.text
    timed = len(seen)
    runs.next_run()
    assert runs.call(policy=policy) == "fast" and seen[timed:] == [serves]
    assert told in runs.line()


@pytest.mark.parametrize(
    ("dense", "serves"), [(0.0305, "native 32"), (0.0290, "native 32"), (0.0285, "dense")]
)
def test_where_what_was_chosen_gains_nothing_it_need_not_be_a_tenth_faster(
    runs, machine, monkeypatch, dense, serves
):
    """Than that; than dense attention it has to be faster like any."""
    machine.has_kernel("native")
    machine.took |= {"native 32": 0.0275, "dense": dense}
    seen = sparse_calls(machine, monkeypatch)
    policy = in_halves(runs, density_is_fixed=True)
    assert runs.call(policy=policy) == ("dense" if serves == "dense" else "fast")
    assert seen[-1] == serves


def test_each_is_held_against_the_other_in_its_best_precision(runs, machine, monkeypatch):
    machine.has_kernel("native", "int8")
    machine.took |= {"native 32": 0.020, "int8 32": 0.0112}
    seen = sparse_calls(machine, monkeypatch)
    assert runs.call(policy=in_halves(runs)) == "fast int8" and seen[-1] == "int8"
    machine.took["int8 32"] = 0.0108
    assert runs.call(policy=in_halves(runs)) == "fast int8" and seen[-1] == "int8 32"
    # In 8 bits neither is near.
    machine.value["int8"] = INT8 + 0.02
    assert runs.call(policy=in_halves(runs)) == "fast" and seen[-1] == "native 32"


def test_dense_attention_is_held_against_the_faster_one(runs, machine):
    machine.has_kernel("native")
    machine.took |= {"native 32": 0.020, "dense": 0.025}
    assert runs.call(policy=in_halves(runs, density_is_fixed=True)) == "fast"
    machine.took["dense"] = 0.015
    policy = in_halves(runs, density_is_fixed=True)
    runs.next_run()
    assert runs.call(policy=policy) == "dense"
    assert "as close: fast 20.0 ms" in runs.line() and "used" not in runs.line()
    assert "dense attention is faster here: 15.0 ms a call, 20.0 ms sparse by fast" in runs.line()


@pytest.mark.parametrize("fails", [NO_MEMORY, ValueError("no such plan")])
def test_one_that_makes_no_plan_loses_and_is_not_tried_again(runs, machine, monkeypatch, fails):
    machine.has_kernel("native", "int8")
    seen = sparse_calls(machine, monkeypatch)
    policy = in_halves(runs, fails)
    assert [runs.call(policy=policy) for _ in range(3)] == ["fast int8"] * 3
    assert seen[-2:] == ["int8"] * 2 and "blocks of 32" not in runs.line()


@pytest.mark.parametrize("fails", [NO_MEMORY, RuntimeError("broken")])
def test_one_whose_kernel_fails_loses(runs, machine, monkeypatch, fails):
    machine.has_kernel("native", "int8")
    machine.took |= {"native 32": fails, "int8 32": fails}
    seen = sparse_calls(machine, monkeypatch)
    policy = in_halves(runs)
    assert [runs.call(policy=policy) for _ in range(2)] == ["fast int8"] * 2
    assert seen[-1] == "int8" and "broken" not in runs.line()


@pytest.mark.parametrize(
    ("fails", "why"),
    [(NO_MEMORY, "ran out of memory"), (ValueError("no such plan"), "ValueError: no such plan")],
    ids=["memory", "fault"],
)
def test_what_was_chosen_serves_where_the_other_fails_later(runs, machine, monkeypatch, fails, why):
    """At once, and from then on, int8 too, if that was the fastest."""
    machine.has_kernel("native", "int8")
    machine.took |= {"native 32": 0.005, "int8 32": 0.004}
    # The first run of a way, and three times both.
    policy = in_halves(runs, fails=[None] * 8 + [fails])
    seen = sparse_calls(machine, monkeypatch)
    assert runs.call(policy=policy) == "fast int8" and seen[-1] == "int8 32"
    assert runs.call(policy=policy) == "fast int8" and seen[-1] == "int8"
    runs.next_run()
    assert runs.call(policy=policy) == "fast int8" and seen[-1] == "int8"
    line = runs.line()
    assert f"the other blocks are given up: {why}" in line and "used" not in line
    assert "timed once: fast 30.0 ms, fast int8 12.0 ms" in line


def test_where_dense_attention_is_faster_than_what_was_chosen_it_serves_then(runs, machine):
    machine.has_kernel("native")
    machine.took |= {"native 32": 0.005, "dense": 0.020}
    policy = in_halves(runs, fails=[None] * 5 + [NO_MEMORY], density_is_fixed=True)
    # The call that failed was to be sparse.
    assert [runs.call(policy=policy) for _ in range(4)] == ["fast", "fast", "dense", "dense"]
    assert "dense attention is faster here: 20.0 ms a call, 30.0 ms sparse" in runs.line()


def test_other_blocks_that_only_plain_pytorch_can_run_any_more_are_given_up(
    runs, machine, monkeypatch
):
    machine.has_kernel("native")
    machine.took["native 32"] = [0.005] * 5 + [NO_MEMORY]
    seen = sparse_calls(machine, monkeypatch)
    policy = in_halves(runs)
    assert [runs.call(policy=policy) for _ in range(3)] == ["fast"] * 3
    # The first call, the one that lacked memory, and what that fell back to.
    assert seen[-5:] == ["native 32", "native 32", "torch", "native", "native"]
    assert "given up: kernel fast ran out of memory" in runs.line()


def test_what_only_plain_pytorch_could_run_is_not_timed(runs, machine, monkeypatch):
    """Neither where it runs the policy chosen, nor where it would run the other."""
    machine.took["torch 32"] = 0.001
    seen = sparse_calls(machine, monkeypatch)
    assert runs.call(policy=in_halves(runs)) == "torch"
    assert "torch" in seen and "blocks of 32" not in runs.line()
    machine.has_kernel("native")
    machine.took["native 32"] = RuntimeError("broken")
    assert runs.call(128, policy=in_halves(runs)) == "fast" and seen[-1] == "native"
    # To know who would run it, it ran once.
    assert seen.count("torch 32") == 1 and "blocks of 32" not in runs.line()


def test_another_policy_that_cannot_be_asked_for_is_none(runs, machine, caplog):
    machine.has_kernel("native", "int8")

    def as_close(layout):
        raise KeyError("layout")

    policy = a_policy(as_close=staticmethod(as_close))
    assert runs.call(policy=policy) == "fast int8"
    assert "another policy was not timed: KeyError" in caplog.text


def test_beside_a_static_plan_nothing_else_is_tried(runs, machine, monkeypatch):
    machine.has_kernel("native")
    machine.took["native 32"] = 0.001
    monkeypatch.setattr(FIXED, "as_close", in_halves(runs).as_close, raising=False)
    assert runs.call() == "fast" and "blocks of 32" not in runs.line()


def test_beside_a_kernel_by_name_nothing_else_is_tried(runs, machine):
    machine.has_kernel("native")
    machine.took["native 32"] = 0.001
    asked = []
    policy = in_halves(runs)
    as_close = policy.as_close
    policy.as_close = staticmethod(lambda layout: asked.append(layout) or as_close(layout))
    assert runs.call(policy=policy, kernel="fast") == "fast" and not asked
    assert runs.call(policy=policy, kernel="torch") == "torch" and not asked
    assert "blocks of 32" not in runs.line()


def test_a_precision_by_name_is_kept(runs, machine, monkeypatch):
    machine.has_kernel("native", "int8")
    machine.took |= {"native 32": 0.020, "int8 32": 0.001}
    seen = sparse_calls(machine, monkeypatch)
    assert runs.call(policy=in_halves(runs), precision="native") == "fast"
    assert seen[-1] == "native 32" and not any("int8" in which for which in seen)
