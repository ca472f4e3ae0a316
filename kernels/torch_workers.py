"""Threads that each run single-threaded torch ops, for work made of many small products.

Torch splits one op over all cores and waits for the slowest; with products of well under a
millisecond the waiting costs more than the split gains, and far more on a busy machine. Here
every core works on rows of its own, and one op stays on one core.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


@functools.lru_cache(maxsize=1)
def _workers(count: int) -> ThreadPoolExecutor:
    """`count` started threads whose torch ops use one core each."""
    started = threading.Barrier(count + 1)

    def start() -> None:
        # Each thread has a number of its own, taken from the process's on first use: set that to
        # one for a moment, use it here, and let the caller put it back.
        torch.set_num_threads(1)
        torch.get_num_threads()
        started.wait()

    callers_count = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, thread_name_prefix="block-sparse", initializer=start)
    for _ in range(count):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(callers_count)
    return pool


def for_each(worker: Callable[[Callable[[], int | None]], None], count: int) -> None:
    """Run `worker` on as many threads as torch would use, sharing the tasks 0 .. count - 1.

    Args:
        worker: called once per thread with a function that returns the next task, or None when
            there are no more. Runs without autograd and autocast, in the caller's inference mode.

    Raises:
        Whatever a worker raised first.
    """
    tasks = itertools.count()  # next() on it is atomic

    def next_task() -> int | None:
        task = next(tasks)
        return task if task < count else None

    inference = torch.is_inference_mode_enabled()

    def run() -> None:
        with (
            torch.inference_mode(inference),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            worker(next_task)

    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        run()
        return
    pool = _workers(torch.get_num_threads())
    for done in [pool.submit(run) for _ in range(threads)]:
        done.result()
