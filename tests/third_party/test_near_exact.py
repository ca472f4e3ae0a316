"""A library of few bits whose first output is not attention is passed over, not only one of NaN."""

import pytest
import torch
import torch.nn.functional as F
from sparse_video_attention.patching.attention_call import read_call
from sparse_video_attention.patching.dense_calls import DENSE_BACKENDS, DenseCalls
from sparse_video_attention.third_party import near_exact as module
from sparse_video_attention.third_party.near_exact import IN_4_BITS, IN_8_BITS, near_exact

OFF = "its first output for this shape is off by"


def quantised(x, bits):
    """Rounded to as many bits, per token."""
    scale = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / scale).round() * scale


@pytest.fixture
def qkv():
    """[2, 4, 700, 64] with two heads of keys, whose channels and tokens differ in size."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 700, 64, generator=generator) * 2
    k, v = torch.randn(2, 2, 2, 900, 64, generator=generator).unbind(0)
    return q, k * torch.linspace(0.1, 3, 64), v + 1


def attention(q, k, v, scale=None):
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)


@pytest.mark.parametrize(("bits", "allowed"), [(8, IN_8_BITS), (4, IN_4_BITS)])
@pytest.mark.parametrize("scale", [None, 0.02])
def test_what_rounding_costs_is_allowed(qkv, bits, allowed, scale):
    q, k, v = qkv
    out = attention(quantised(q, bits), quantised(k, bits), quantised(v, bits), scale)
    assert near_exact(allowed)(q, k, v, scale, out)


@pytest.mark.parametrize("allowed", [IN_8_BITS, IN_4_BITS])
def test_what_is_no_attention_is_not(qkv, allowed):
    q, k, v = qkv
    right = attention(q, k, v)
    wrong = {
        "grey": torch.zeros_like(right),
        "noise": torch.randn(right.shape, generator=torch.Generator().manual_seed(1)) + 1,
        "the mean": right + 2 * right.std() * torch.sign(torch.randn(right.shape)),
        "another head's": right.roll(1, 1) * -1,
    }
    for what, out in wrong.items():
        with pytest.raises(ArithmeticError, match=OFF):
            near_exact(allowed)(q, k, v, None, out)
            pytest.fail(what)


def test_rows_all_through_a_head_are_looked_at(qkv):
    q, k, v = qkv
    out = attention(q, k, v)
    out[:, :, 350:] = 0
    with pytest.raises(ArithmeticError, match=OFF):
        near_exact(IN_8_BITS)(q, k, v, None, out)


def test_nan_is_found_wherever_it_is(qkv):
    q, k, v = qkv
    out = attention(q, k, v)
    out[0, 1, 3, 5] = torch.nan
    with pytest.raises(ArithmeticError, match="holds a NaN"):
        near_exact(IN_8_BITS)(q, k, v, None, out)


def test_what_fails_otherwise_is_not_asked_again(qkv, monkeypatch):
    q, k, v = qkv

    def broken(*_):
        raise NotImplementedError("no such operation on this device")

    monkeypatch.setattr(module, "_error", broken)
    assert near_exact(IN_8_BITS)(q, k, v, None, attention(q, k, v))


def test_only_the_last_head_of_the_last_sample_being_wrong_is_seen(qkv):
    q, k, v = qkv
    out = attention(q, k, v)
    out[-1, -1] = 0
    with pytest.raises(ArithmeticError, match=OFF):
        near_exact(IN_8_BITS)(q, k, v, None, out)


def test_what_cannot_be_told_is_left_for_later(qkv, monkeypatch):
    q, k, v = qkv
    out = attention(q, k, v)
    check = near_exact(IN_8_BITS)
    assert not check(q, k * torch.inf, v, None, out), "no finite answer"
    assert check(q, k, v, None, out)

    def no_memory(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(module, "_error", no_memory)
    assert not check(q, k, v, None, out)


def test_with_a_mask_only_nan_is_looked_for(qkv, monkeypatch):
    """What is right under the mask is not attention to all keys."""
    monkeypatch.setitem(
        DENSE_BACKENDS,
        "masked",
        type(
            "Backend",
            (),
            {
                "unavailable": lambda self: None,
                "refuses": lambda self, *call: None,
                "run": lambda self, q, k, v, *, scale, mask: v.mean(2, keepdim=True).expand_as(q),
                "is_sound": staticmethod(near_exact(IN_8_BITS)),
            },
        )(),
    )
    q = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0)) * 5
    mask = torch.zeros(64, 64)
    assert isinstance(DenseCalls().run("masked", read_call((q, q, q, 2, mask), {})), torch.Tensor)
    assert OFF in DenseCalls().run("masked", read_call((q, q, q, 2), {}))


@pytest.mark.parametrize("name", ["sage_attn2", "sage_attn3", "comfy_kitchen_int8"])
def test_libraries_of_few_bits_are_held_against_exact_attention(name, qkv):
    q, k, v = qkv
    with pytest.raises(ArithmeticError, match=OFF):
        DENSE_BACKENDS[name].is_sound(q, k, v, None, torch.zeros_like(q))
