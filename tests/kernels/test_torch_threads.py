"""The torch kernel's ways among threads, and in the modes of whoever calls them."""

import threading

import pytest
import torch
from sparse_video_attention.kernels.registry import KernelCall
from sparse_video_attention.kernels.torch_panels import attend_in_panels
from sparse_video_attention.kernels.torch_shared import attend_shared
from sparse_video_attention.kernels.torch_workers import for_each

from .torch_ways import ALL, panels, random_mask_plan, random_plan, random_qkv


@pytest.mark.parametrize("run", [attend_in_panels, attend_shared], ids=["panels", "shared"])
def test_the_result_does_not_depend_on_threads(run):
    q, k, v = random_qkv(1, 2, 1000, 64)
    plan = random_mask_plan(1000, block_n=64)
    count = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(run(KernelCall(q, k, v, plan, 0.125)))
            assert torch.get_num_threads() == threads
            seen = []
            other = threading.Thread(target=lambda seen=seen: seen.append(torch.get_num_threads()))
            other.start()
            other.join()
            assert seen == [threads], "threads made later must not inherit the workers' setting"
    finally:
        torch.set_num_threads(count)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_workers_run_ops_on_one_core_each():
    seen = []

    def worker(next_task):
        while next_task() is not None:
            torch.ones(2**16).sum()  # the first parallel op settles a thread's number of cores
            seen.append(torch.get_num_threads())

    count = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for_each(worker, 100)
    finally:
        torch.set_num_threads(count)
    assert seen == [1] * 100


def test_calls_from_several_threads_at_once():
    plan = random_plan(333, 333, block_n=64)
    inputs = [random_qkv(1, 2, 333, 64, seed=seed) for seed in range(6)]
    expected = [panels(*qkv, plan) for qkv in inputs]
    outs = [None] * len(inputs)

    def call(i):
        outs[i] = panels(*inputs[i], plan)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(torch.equal(out, wanted) for out, wanted in zip(outs, expected, strict=True))


def test_a_failing_worker_is_heard():
    def worker(next_task):
        while (task := next_task()) is not None:
            if task == 3:
                raise ArithmeticError("task 3")

    with pytest.raises(ArithmeticError, match="task 3"):
        for_each(worker, 5)


@ALL
def test_modes_of_the_caller_do_not_change_the_result(attend):
    q, k, v = random_qkv(1, 2, 333, 64)
    plan = random_mask_plan(333, block_n=64)
    plain = attend(q, k, v, plan)
    with torch.inference_mode():
        assert torch.equal(attend(q.clone(), k, v, plan), plain)
    assert torch.equal(attend(q.requires_grad_(), k, v, plan), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(q, k, v, plan), plain)
