"""The stand-in itself: whose result is where, what a GPU would refuse, and what is a wait."""

import pytest
import torch
import torch.nn.functional as F

from .waits import COPY_FROM_HOST, COPY_TO_HOST, ITEM, WAITS

pytestmark = pytest.mark.on_cards("sm_90", "sm_86")

FIRST, SECOND, HOST = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")


def on_card(*shape):
    return torch.arange(1.0, 1 + torch.Size(shape).numel(), device="cuda").view(shape)


@pytest.mark.parametrize(
    ("make", "device"),
    [
        (lambda: torch.zeros(2, device="cuda"), FIRST),
        (lambda: torch.zeros(2, device="cuda:1"), SECOND),
        (lambda: torch.zeros(2), HOST),
        (lambda: torch.ones(2).cuda(), FIRST),
        (lambda: torch.ones(2).to(SECOND, torch.half), SECOND),
        (lambda: torch.tensor([1.0, 2.0], device="cuda"), FIRST),
        (lambda: on_card(2) + 1, FIRST),
        (lambda: on_card(2) + torch.tensor(1.0), FIRST),
        (lambda: on_card(2, 3).T[1:].contiguous(), FIRST),
        (lambda: on_card(2).new_empty(3), FIRST),
        (lambda: torch.zeros_like(on_card(2), device="cpu"), HOST),
        (lambda: on_card(2).cpu(), HOST),
        (lambda: on_card(2).to(SECOND), SECOND),
        (lambda: F.scaled_dot_product_attention(*[on_card(1, 1, 4, 8)] * 3), FIRST),
        (lambda: torch.nn.Linear(2, 2, device="cuda")(on_card(2)), FIRST),
    ],
)
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
def test_a_result_is_where_its_inputs_are_or_where_it_was_asked_for(make, device, inference):
    with torch.inference_mode(inference):
        made = make()
    assert made.device == device and made.is_cuda == (device.type == "cuda")


def test_numbers_are_those_of_the_host():
    x = on_card(3, 4)
    want = torch.arange(1.0, 13).view(3, 4)
    x[1] *= 2
    want[1] *= 2
    torch.add(x, 1, out=x)
    assert torch.equal((x.T @ x).softmax(-1).cpu(), ((want + 1).T @ (want + 1)).softmax(-1))
    assert x[:, 1].tolist() == (want + 1)[:, 1].tolist()


def test_what_is_changed_in_place_stays_the_same_tensor():
    x = on_card(4)
    host = torch.zeros(4)
    assert x.add_(1) is x and x.copy_(host) is x and x[1:].fill_(3) is not x
    assert x.tolist() == [0, 3, 3, 3]
    assert host.copy_(x) is host and host.tolist() == [0, 3, 3, 3]


@pytest.mark.parametrize(
    "mix",
    [
        lambda: on_card(2) + torch.ones(2),
        lambda: torch.ones(2) * on_card(2),
        lambda: torch.cat([on_card(2), torch.ones(2)]),
        lambda: torch.where(on_card(2) > 1, torch.ones(2), on_card(2)),
        lambda: F.linear(torch.ones(2, 2), on_card(2, 2)),
        lambda: on_card(2).add_(torch.ones(2)),
        lambda: on_card(4).index_select(0, torch.tensor([1])),
        lambda: torch.ones(2)[on_card(2).long() - 1],
        lambda: on_card(2) + on_card(2).to("cuda:1"),
        lambda: torch.add(on_card(2), 1, out=torch.empty(2)),
        lambda: torch.ones(2) + on_card(2)[0],
    ],
)
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
def test_tensors_of_two_devices_are_refused(mix, inference):
    with torch.inference_mode(inference), pytest.raises(RuntimeError, match="device"):
        mix()


def test_what_has_no_address_on_the_host_is_refused():
    with pytest.raises((RuntimeError, TypeError), match="numpy"):
        on_card(2).numpy()


@pytest.mark.parametrize(
    ("kind", "wait"),
    [
        (ITEM, lambda x: x[0].item()),
        (ITEM, lambda x: float(x[0])),
        (ITEM, lambda x: int(x[0])),
        (ITEM, lambda x: x[0] > 5 or None),
        (ITEM, lambda x: list(range(9))[x[0].long()]),
        (ITEM, lambda x: torch.zeros(9, device="cuda")[: x[0].long()]),
        (ITEM, lambda x: torch.add(x, 1, alpha=x[0])),
        (COPY_TO_HOST, lambda x: x.tolist()),
        (COPY_TO_HOST, lambda x: x.cpu()),
        (COPY_TO_HOST, lambda x: x.to("cpu", torch.half)),
        (COPY_TO_HOST, lambda x: torch.empty(2).copy_(x)),
        (COPY_FROM_HOST, lambda x: torch.ones(2).cuda()),
        (COPY_FROM_HOST, lambda x: torch.ones(2).to(x)),
        (COPY_FROM_HOST, lambda x: x.copy_(torch.ones(2))),
        (COPY_FROM_HOST, lambda x: torch.tensor([1], device="cuda")),
        (COPY_FROM_HOST, lambda x: torch.as_tensor(1.0, device="cuda")),
        (COPY_FROM_HOST, lambda x: x[torch.tensor([0])]),
        (COPY_FROM_HOST, lambda x: x[[0, 1]]),
        ("nonzero", lambda x: x.nonzero()),
        ("nonzero", lambda x: torch.where(x > 1)),
        ("masked_select", lambda x: x.masked_select(x > 1)),
        ("index by a mask", lambda x: x[x > 0]),
        ("index_put_ by a mask", lambda x: x.__setitem__(x > 0, x + 1)),
        ("_unique2", lambda x: x.unique()),
        ("equal", lambda x: torch.equal(x, x)),
        ("repeat_interleave", lambda x: x.repeat_interleave(x.long())),
        ("synchronize", lambda x: torch.cuda.synchronize()),
        ("event.synchronize", lambda x: torch.cuda.Event().synchronize()),
        ("stream.synchronize", lambda x: torch.cuda.current_stream().synchronize()),
    ],
)
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
def test_a_wait_is_kept_with_the_line_that_asked_for_it(kind, wait, inference):
    with torch.inference_mode(inference):
        x = on_card(2)
        with WAITS.kept() as waits:
            wait(x)
    assert kind in [wait.kind for wait in waits]
    assert {(x.file, x.line) for x in waits} == {
        ("tests/cuda_stand_in/test_tensors.py", wait.__code__.co_firstlineno)
    }


def test_what_a_gpu_does_on_its_own_is_no_wait():
    generator = torch.Generator("cuda").manual_seed(0)
    x, index = on_card(4, 4), torch.ones(2, dtype=torch.long, device="cuda")
    event = torch.cuda.Event(enable_timing=True)
    with WAITS.kept() as waits:
        x[0] = 3.0
        x[x > 4] = 0.0
        x.masked_fill_(x > 1, 2.0)
        (x @ x.half().float()).softmax(-1).topk(2)
        x[index] + x.index_select(0, index)
        x.to("cuda") + x.cuda()
        torch.full((2,), 1.0, device="cuda").normal_(generator=generator)
        index.repeat_interleave(index, output_size=2)
        torch.where(x > 1, x, 0.0) + torch.tensor(2.0)
        x.to("cuda:1")
        event.record()
        x.shape, len(x), x.is_contiguous(), x.data_ptr(), x.nbytes
    assert waits == []


@pytest.mark.parametrize("wait", [lambda x: x.item(), lambda x: x.cpu(), lambda x: bool(x)])
def test_waits_are_errors_where_pytorch_is_asked_to_make_them_such(wait):
    x = on_card(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            wait(x)
        torch.cuda.synchronize()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wait(x)


def test_a_generator_draws_on_its_own_device():
    drawn = [
        torch.randn(3, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        for _ in range(2)
    ]
    assert torch.equal(*drawn) and drawn[0].device == FIRST
    assert torch.Generator().device == HOST and torch.Generator("cuda").device.type == "cuda"


@pytest.mark.parametrize(
    ("device", "draw"),
    [
        ("cpu", lambda generator: torch.randn(3, device="cuda", generator=generator)),
        ("cpu", lambda generator: on_card(2).normal_(generator=generator)),
        ("cpu", lambda generator: torch.randperm(3, device="cuda", generator=generator)),
        ("cuda", lambda generator: torch.randn(3, generator=generator)),
        ("cuda", lambda generator: torch.ones(2).uniform_(generator=generator)),
    ],
)
def test_a_generator_of_another_device_is_refused(device, draw):
    with pytest.raises(RuntimeError, match="device type for generator"):
        draw(torch.Generator(device))


def test_the_current_device_is_that_of_the_block():
    with torch.cuda.device(1):
        assert torch.zeros(1, device="cuda").device == SECOND
        assert torch.cuda.get_device_name() == "NVIDIA GeForce RTX 3090"
    assert torch.zeros(1, device="cuda").device == FIRST
    assert torch.cuda.get_device_capability() == (9, 0)
