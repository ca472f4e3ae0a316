"""PyTorch's own attention: which of its kernels is asked for, and what where one fails."""

import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sparse_video_attention.third_party import DENSE_BACKENDS, torch_sdpa

from .conftest import close, exact


@pytest.mark.parametrize("memory", ["tokens", "heads"])
def test_torch_takes_everything(memory, qkv):
    backend = DENSE_BACKENDS["torch_sdpa"]
    q, k, v = qkv(memory, heads=4, head_dim=80)
    mask = torch.rand(130, 130, generator=torch.Generator().manual_seed(2)) > 0.5
    assert backend.unavailable() is None
    assert backend.refuses(q, k[:, :2], v[:, :2, :, :40], mask, 0.7, False) is None
    close(backend.run(q, k, v, scale=0.3, mask=mask), exact(q, k, v, 0.3, mask))
    grouped = exact(q, k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat_interleave(2, 1))
    close(backend.run(q, k[:, :2], v[:, :2]), grouped)


CUDNN_FIRST = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


@pytest.fixture
def capability(monkeypatch):
    """capability(major, minor): what every CUDA device has from then on."""
    torch_sdpa._order.cache_clear()
    yield lambda *found: monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: found
    )
    torch_sdpa._order.cache_clear()


def test_on_hopper_torch_is_asked_for_cudnn_first(capability):
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

    capability(9, 0)
    with torch_sdpa.kernel_order(*torch_sdpa._order(torch.device("cuda"))):
        order = _cur_sdpa_kernel_backends(with_priority=True)
    assert order[:4] == [getattr(SDPBackend, name) for name in CUDNN_FIRST]


@pytest.mark.parametrize("found", [(8, 0), (8, 6), (8, 9), (10, 0), (12, 0)], ids=str)
def test_elsewhere_the_order_is_torchs_own(capability, found):
    """Where nobody measured it here, and others found cuDNN slower on some."""
    capability(*found)
    before = torch._C._get_sdp_priority_order()
    for device in ("cuda", "cpu"):
        with torch_sdpa.kernel_order(*torch_sdpa._order(torch.device(device))):
            assert torch._C._get_sdp_priority_order() == before


class OnGpu(torch.Tensor):
    """A CPU tensor that is taken for a GPU's."""

    is_cuda = True


@pytest.mark.parametrize(
    ("error", "again"),
    [
        ("cuDNN Frontend error: No valid engine configs for Matmul_MUL_", True),
        ("CUDA out of memory", False),
    ],
)
def test_where_cudnn_has_no_engine_another_kernel_serves(monkeypatch, qkv, error, again):
    """It finds out when torch has chosen it, and torch goes on to no other."""
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

    monkeypatch.setattr(torch_sdpa, "_failed", set())
    want, real, orders = exact(*qkv()), F.scaled_dot_product_attention, []

    def attention(*args, **kwargs):
        orders.append(_cur_sdpa_kernel_backends())
        if len(orders) == 1:
            raise RuntimeError(error)
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    q, k, v = (x.as_subclass(OnGpu) for x in qkv())
    if not again:
        with pytest.raises(RuntimeError, match="out of memory"):
            torch_sdpa.attend(q, k, v, scale=None, mask=None)
        return
    close(torch_sdpa.attend(q, k, v, scale=None, mask=None), want)
    assert len(orders) == 2 and SDPBackend.CUDNN_ATTENTION not in orders[1]
    # From then on such calls go there at once; others are tried as ever.
    torch_sdpa.attend(q, k, v, scale=None, mask=None)
    assert len(orders) == 3 and SDPBackend.CUDNN_ATTENTION not in orders[2]
    torch_sdpa.attend(q[:, :1], k[:, :1], v[:, :1], scale=None, mask=None)
    assert SDPBackend.CUDNN_ATTENTION in orders[3]


@pytest.mark.parametrize("takes", [True, False])
def test_cudnn_runs_what_it_takes_and_comes_first(monkeypatch, qkv, takes):
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

    asked, orders = [], []

    def can_use(parameters):
        asked.append(parameters)
        return takes

    def attention(q, k, v, attn_mask, scale):
        orders.append(_cur_sdpa_kernel_backends(with_priority=True))
        return real(q, k, v, attn_mask=attn_mask, scale=scale)

    real = F.scaled_dot_product_attention
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", can_use)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    backend = replace(DENSE_BACKENDS["torch_cudnn"])
    q, k, v = qkv()
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="is switched off"):
        patched.setattr(torch.backends.cuda, "math_sdp_enabled", lambda: False)
        backend.run(q, k, v)
    if not takes:
        with pytest.raises(ValueError, match="cuDNN does not take this call"):
            backend.run(q, k, v)
        return
    close(backend.run(q, k, v, scale=0.3), exact(q, k, v, 0.3))
    assert asked[0].query is q or torch.equal(asked[0].query, q)
    assert orders[0][:4] == [getattr(SDPBackend, name) for name in CUDNN_FIRST]


def test_cudnn_is_for_nvidia_and_a_torch_that_can_be_asked(monkeypatch):
    from sparse_video_attention.third_party import torch_cudnn

    backend = DENSE_BACKENDS["torch_cudnn"]
    assert backend.constraints.check(*(torch.zeros(1, 1, 8, 64, dtype=torch.half),) * 3)
    assert torch.cuda.is_available() or "NVIDIA" in backend.unavailable()
    monkeypatch.setattr(torch_cudnn, "takes_priority", lambda: False)
    assert torch_cudnn._unfit() == "it needs PyTorch 2.6 or newer"


@pytest.mark.parametrize("kept", [["MATH"], ["EFFICIENT_ATTENTION", "MATH"], ["FLASH_ATTENTION"]])
def test_where_kernels_are_switched_off_all_stays_as_it_is(kept):
    from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

    before = torch._C._get_sdp_priority_order()
    backends = [getattr(SDPBackend, name) for name in kept]
    with sdpa_kernel(backends):
        with torch_sdpa.kernel_order(*CUDNN_FIRST):
            assert set(_cur_sdpa_kernel_backends()) == set(backends)
            assert torch._C._get_sdp_priority_order() == before
        assert set(_cur_sdpa_kernel_backends()) == set(backends)
    assert torch._C._get_sdp_priority_order() == before


def test_two_threads_do_not_take_each_others_order():
    """The order is torch's, for all threads: whoever leaves puts back what it found."""
    before = torch._C._get_sdp_priority_order()
    inside, leave = threading.Event(), threading.Event()
    orders = []

    def first():
        with torch_sdpa.kernel_order(*CUDNN_FIRST):
            inside.set()
            leave.wait(10)

    def second():
        with torch_sdpa.kernel_order(*CUDNN_FIRST):
            orders.append(torch._C._get_sdp_priority_order())

    one, other = threading.Thread(target=first), threading.Thread(target=second)
    one.start()
    assert inside.wait(10)
    other.start()
    other.join(0.2)
    assert not orders
    leave.set()
    one.join(10)
    other.join(10)
    assert len(orders) == 1 and orders[0] != before
    assert torch._C._get_sdp_priority_order() == before
