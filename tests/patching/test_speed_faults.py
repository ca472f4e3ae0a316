"""What fails while ways are timed, and what goes on meanwhile."""

import threading
import time
import weakref

import pytest
import torch
from sparse_video_attention.kernels.fallback import KernelFallback, KernelRun
from sparse_video_attention.patching import speed, timed_once

from .timed_machine import INT8

NO_MEMORY = torch.OutOfMemoryError("no memory left")


def test_a_way_that_could_not_be_timed_is_not_judged(runs, machine):
    """Out of memory when its turn came: the others say nothing about it."""
    machine.has_kernel("native", "int8")
    machine.took |= {"native": [0.030, NO_MEMORY, 0.030], "int8": 0.050, "dense": 0.045}
    assert [runs.call() for _ in range(2)] == ["fast"] * 2


@pytest.mark.parametrize("what", ["native", "int8", "dense"])
def test_what_a_want_of_memory_leaves_out_is_tried_again(runs, machine, what):
    """In the first run, say, or beside another program."""
    machine.has_kernel("native", "int8")
    took = machine.took[what] = 0.001
    machine.took[what] = [NO_MEMORY] * (2 if what == "native" else 1) + [took]
    runs.call()
    assert runs.call() == {"native": "fast", "int8": "fast int8", "dense": "dense"}[what]
    runs.next_run()
    runs.call()
    assert "memory" not in runs.line()


def test_what_never_has_memory_is_left_out_in_the_end(runs, machine):
    machine.has_kernel("native", "int8")
    machine.took["dense"] = NO_MEMORY
    assert [runs.call() for _ in range(9)] == ["fast"] * 3 + ["fast int8"] * 6
    assert machine.ran.count("dense") == 4


@pytest.mark.parametrize("error", [NO_MEMORY, RuntimeError("broken")])
def test_8_bits_are_not_taken_where_there_is_nothing_to_hold_them_against(runs, machine, error):
    machine.has_kernel("native", name="exact", rank=8.0)
    machine.has_kernel("int8", "native")
    machine.took |= {"exact": error, "native": error, "int8": 0.030, "dense": 0.040}
    machine.has_kernel("int8", name="library", rank=5.0)
    machine.took["library"], machine.value["library"] = 0.001, INT8
    assert "library int8" not in [runs.call() for _ in range(6)]


def test_a_precision_that_fails_is_not_timed_as_another(runs, machine, caplog):
    machine.has_kernel("native", "int8")
    machine.took["int8"] = RuntimeError("broken")
    with caplog.at_level("INFO", logger="sparse_video_attention"):
        assert [runs.call() for _ in range(2)] == ["fast"] * 2
    assert "timed once: fast 30.0 ms, dense 40.0 ms" in caplog.text


def test_what_ran_out_of_memory_is_no_hint_in_later_runs(runs, machine):
    machine.has_kernel("native")
    machine.took |= {"native": [NO_MEMORY, 0.030], "dense": 0.010}
    assert runs.call() == "dense"
    runs.next_run()
    assert runs.call() == "dense" and "memory" not in runs.line()


def test_a_first_run_that_fails_is_not_the_last_word(runs, machine):
    """Sparse calls that fail twice in a row are not tried again; this one comes back."""
    machine.has_kernel("native", "int8")
    machine.took |= {"native": [ValueError("no luck"), 0.030]}
    machine.took["torch"] = [ValueError("no luck"), 0.030]
    runs.call()
    runs.router.kernels = KernelFallback()
    assert runs.call() == "fast int8"


def test_an_override_that_calls_attention_anew_is_answered(runs, machine):
    """It splits the batch, say; timed as dense attention it comes back into the comparison."""

    def halves(func, q, k, v, heads, **kwargs):
        if len(q) == 1:
            return func(q, k, v, heads, **kwargs)
        again = kwargs["transformer_options"]
        parts = [runs.router(func, x, x, x, heads, transformer_options=again) for x in q.split(1)]
        return torch.cat(parts)

    runs.router.previous = halves
    x = torch.randn(2, 64, 32)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(runs.call(x=x)), daemon=True)
    asking.start()
    asking.join(timeout=20)
    assert answers == ["torch"]


def test_no_output_is_held_while_the_next_one_is_made(runs, machine):
    """Each is as large as q: 738 MiB for 14B at 720p."""
    machine.has_kernel("native", "int8")
    alive, most = weakref.WeakSet(), []

    def made(x):
        most.append(len(alive))
        alive.add(x)
        return x

    machine.made = made
    assert runs.call() == "fast int8"
    assert len(most) > 9 and max(most) == 0


def test_another_kernel_in_its_place_is_not_what_was_timed(runs, machine, caplog):
    machine.has_kernel("native")
    machine.has_kernel("native", name="library", rank=7.0)
    machine.took |= {"library": RuntimeError("broken wheel"), "native": [0.030] * 4 + [0.001] * 9}
    with caplog.at_level("INFO", logger="sparse_video_attention"):
        assert runs.call() == "fast"
    assert "kernel library native was not timed: kernel library is set aside" in caplog.text
    assert "library" not in runs.line()


def test_nothing_of_the_comparison_ends_a_run(runs, machine, monkeypatch):
    machine.has_kernel("native", "int8")

    def broken(*args):
        raise RuntimeError("no luck")

    monkeypatch.setattr(speed, "_fastest", broken)
    assert [runs.call() for _ in range(2)] == ["fast"] * 2
    assert len(machine.ran) < 15, "it is not tried again"


def test_a_kernel_that_fails_is_no_rival(runs, machine):
    machine.has_kernel("native")
    machine.has_kernel("native", name="library", rank=7.0)
    machine.took["library"] = RuntimeError("broken wheel")
    assert [runs.call() for _ in range(2)] == ["fast"] * 2
    assert machine.ran.count("library") == 1 and "library" not in runs.line()


def test_two_threads_time_once():
    """Conditionings that MultiGPU CFG Split gives to two cards of one kind."""
    check, started, answers = speed.SpeedCheck(), threading.Barrier(2), []
    ran = []

    def sparse(way):
        ran.append(threading.get_ident())
        time.sleep(0.01)
        return KernelRun(torch.ones(1, 4, 8), "fast", "native", (), (("fast", "native"),))

    def ask():
        started.wait()
        dense = speed.Asked(sparse, lambda: torch.ones(1, 4, 8), 4, True, True)
        answers.append(check.compare("kind", dense, set()))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers[0] == answers[1] and answers[0].dense_reason and len(set(ran)) == 1


def test_not_more_than_so_many_kinds_are_remembered(runs, machine, monkeypatch):
    monkeypatch.setattr(timed_once, "MAX_SHAPES", 3)
    machine.has_kernel("native")
    for tokens in range(64, 64 * 6, 64):
        runs.call(tokens)
    assert len(runs.router.speed._once._found) <= 3


def test_a_sparse_call_that_fails_is_told_as_without_a_comparison(runs, machine):
    machine.took["torch"] = ValueError("no luck")
    assert runs.call() == "dense"
    assert "no luck" in runs.line()
