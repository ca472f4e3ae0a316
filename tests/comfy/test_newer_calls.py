"""The calls of newer ComfyUIs, played by a small host written from their description.

There q, k and v may travel in containers, of which a plain override gets the tensors; a call may
name a `preferred_attention`; and `set_model_optimized_attention` puts a function of its own into
the override slot. Whatever of this reaches the pack is served or handed on as it came.
"""

import pytest
import torch
from sparse_video_attention.patching import run_history
from sparse_video_attention.patching.router import OVERRIDE_KEY

pytestmark = pytest.mark.comfy

LAYERS, STEPS = 4, 2


class Container:
    """One tensor on its way into attention, taken out once so that its memory can go early."""

    def __init__(self, tensor):
        self._tensor = tensor

    def take(self):
        tensor, self._tensor = self._tensor, None
        assert tensor is not None, "taken twice"
        return tensor


def plain(x):
    return x.take() if isinstance(x, Container) else x


class NewerHost:
    """On top of the slot: makes every call of the model again as a newer host would.

    pass_on(func, q, k, v, heads, rest): how the override beneath is called.
    """

    def __init__(self, beneath, pass_on):
        self.previous = beneath
        self.pass_on = pass_on
        self.computed = []

    def __deepcopy__(self, memo):
        return self

    def __call__(self, func, q, k, v, heads, mask=None, **rest):
        def attention(q, k, v, heads, mask=None, *, preferred_attention=None, **rest):
            self.computed.append(preferred_attention)
            return func(plain(q), plain(k), plain(v), heads, mask, **rest)

        return self.pass_on(self.previous, attention, (q, k, v), heads, {"mask": mask} | rest)


def by_position(override, func, qkv, heads, rest):
    return override(func, *qkv, heads, rest.pop("mask"), **rest)


def by_keyword(override, func, qkv, heads, rest):
    q, k, v = qkv
    return override(func, q=q, k=k, v=v, heads=heads, **rest)


def with_preference(override, func, qkv, heads, rest):
    return override(func, *qkv, heads, **rest, preferred_attention="sage")


def in_containers(override, func, qkv, heads, rest):
    return override(func, *map(Container, qkv), heads, **rest)


def in_keyword_containers(override, func, qkv, heads, rest):
    q, k, v = map(Container, qkv)
    return override(func, q=q, k=k, v=v, heads=heads, **rest)


def with_heads_of_each(override, func, qkv, heads, rest):
    """As nobody does yet: two numbers of heads, which only its own function understands."""

    def attention(q, k, v, heads, *args, **kwargs):
        return func(q, k, v, heads[0], *args, **kwargs)

    return override(attention, *qkv, (heads, heads), **rest)


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


@pytest.fixture(scope="module")
def run(sample):
    """run(model): the latent of two steps."""
    return lambda model: sample(model, steps=STEPS)


@pytest.fixture(scope="module")
def dense(model, run):
    return run(model)


@pytest.fixture(scope="module")
def banded(model, install_band, run):
    """(MODEL with band attention, its latent, how many of its self-attention calls are dense)."""
    patched = install_band(model)
    out = run(patched)
    return patched, out, sum(run_history(patched).latest.dense_reasons().values())


def under_newer_host(patched, pass_on):
    clone = patched.clone()
    options = clone.model_options["transformer_options"]
    host = options[OVERRIDE_KEY] = NewerHost(options[OVERRIDE_KEY], pass_on)
    return clone, host


@pytest.mark.parametrize("pass_on", [by_position, by_keyword, with_preference])
def test_tensors_are_served_and_every_keyword_is_handed_on(banded, run, pass_on):
    patched, expected, dense_calls = banded
    newer, host = under_newer_host(patched, pass_on)
    assert torch.equal(run(newer), expected)
    assert run_history(newer).latest.sparse().calls == (LAYERS - 1) * (STEPS - 1)
    preferred = "sage" if pass_on is with_preference else None
    assert host.computed == [preferred] * (dense_calls + LAYERS * STEPS)


@pytest.mark.parametrize("pass_on", [in_containers, in_keyword_containers, with_heads_of_each])
def test_a_call_it_cannot_read_is_computed_by_the_host_and_said_once(
    banded, dense, run, run_lines, pass_on
):
    newer, host = under_newer_host(banded[0], pass_on)
    assert torch.equal(run(newer), dense)
    assert len(host.computed) == 2 * LAYERS * STEPS
    assert sum("are left to ComfyUI" in line for line in run_lines()) == 1
    assert "ComfyUI calls attention in a way this pack does not know" in run_lines()[-1]


@pytest.mark.parametrize("pass_on", [by_keyword, with_preference, in_containers])
def test_a_dense_backend_serves_or_hands_on(model, dense, run, pass_on):
    from sparse_video_attention.nodes.backend import SetAttentionBackend

    chosen = SetAttentionBackend.execute(model, self_attn_1_type="torch_sdpa").result[0]
    newer, host = under_newer_host(chosen, pass_on)
    assert float((run(newer) - dense).norm()) < 1e-4 * float(dense.norm())
    served = 0 if pass_on is in_containers else LAYERS * STEPS
    assert len(host.computed) == 2 * LAYERS * STEPS - served


def set_model_optimized_attention(model, attention):
    """As the host does it: the slot is overwritten, whatever was there."""

    def override(func, *args, **kwargs):
        return attention(*args, **kwargs)

    model.model_options["transformer_options"][OVERRIDE_KEY] = override


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_models_own_attention_computes_what_stays_dense(
    model, banded, install_band, run, run_lines, order
):
    from comfy.ldm.modules.attention import attention_basic

    calls = []

    def attention(*args, **kwargs):
        calls.append(args[0].shape)
        return attention_basic(*args, **kwargs)

    if order == "before":
        chosen = model.clone()
        set_model_optimized_attention(chosen, attention)
        patched = install_band(chosen)
    else:
        patched = install_band(model)
        set_model_optimized_attention(patched, attention)
    out = run(patched)
    record = run_history(patched).latest
    assert record.sparse().calls == (LAYERS - 1) * (STEPS - 1)
    assert len(calls) == sum(record.dense_reasons().values()) + LAYERS * STEPS
    expected = banded[1]
    assert float((out - expected).norm()) < 1e-4 * float(expected.norm())
    assert any("had replaced this pack's" in line for line in run_lines()) == (order == "after")
