"""attention_forward: every layout, every name, and what is chosen when."""

import itertools
from dataclasses import replace

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_video_attention.third_party import (
    DENSE_BACKENDS,
    attention_forward,
    backend_from_environment,
    find_backend,
)
from sparse_video_attention.third_party.backend import Loaded
from sparse_video_attention.third_party.routing import ENVIRONMENT_VARIABLE, IMPLEMENTATIONS

from .conftest import exact

SIZES = {"b": 2, "n": 3, "s": 5, "d": 4}


@st.composite
def patterns(draw):
    """The four axes in any order, any run of them merged: "s (b n) d"."""
    axes = draw(st.permutations("bnsd"))
    cuts = sorted(draw(st.sets(st.integers(1, 3))))
    groups = [axes[i:j] for i, j in itertools.pairwise([0, *cuts, 4])]
    return " ".join(f"({' '.join(g)})" if len(g) > 1 else g[0] for g in groups)


@given(q=patterns(), k=patterns(), v=patterns(), out=patterns(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_layout_in_and_out(q, k, v, out, seed):
    gen = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(2, 3, 5, 4, generator=gen) for _ in range(3)]
    truth = rearrange(exact(*tensors), f"b n s d -> {out}")
    given_as = [rearrange(x, f"b n s d -> {to}") for x, to in zip(tensors, (q, k, v), strict=True)]
    found = attention_forward(
        *given_as,
        q_pattern=q,
        k_pattern=k,
        v_pattern=v,
        out_pattern=out,
        dims=SIZES,
        implementation="torch",
    )
    torch.testing.assert_close(found, truth.float())


def test_the_guides_call():
    """Tokens first with merged heads, cross-attention, dims for the heads alone."""
    gen = torch.Generator().manual_seed(1)
    q = torch.randn(1, 20, 12 * 8, generator=gen)
    k, v = (torch.randn(1, 7, 12 * 8, generator=gen) for _ in range(2))
    merged = "b s (n d)"
    out = attention_forward(q, k, v, merged, merged, merged, merged, dims={"n": 12})
    split = [x.unflatten(2, (12, 8)).transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(out, exact(*split).transpose(1, 2).flatten(2).float())


def test_mask_and_scale_reach_the_logits():
    gen = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 9, 8, generator=gen) for _ in range(3))
    mask = torch.rand(9, 9, generator=gen) > 0.4
    found = attention_forward(q, k, v, attn_mask=mask, scale=0.9)
    torch.testing.assert_close(found, exact(q, k, v, 0.9, mask).float())


@pytest.mark.parametrize(
    ("pattern", "dims"),
    [
        ("b s (n d)", None),  # heads not told
        ("b s (n d)", {"n": 5}),  # do not divide the channels
        ("b n s", None),  # an axis too few
        ("b n s d e", None),
        ("b n s d d", None),
        ("b n (s d", None),
    ],
    ids=str,
)
def test_a_pattern_that_does_not_fit_is_a_sentence(pattern, dims):
    x = torch.zeros(1, 4, 12)
    with pytest.raises(ValueError, match="q_pattern .* does not fit q of shape") as caught:
        attention_forward(x, x, x, pattern, pattern, pattern, dims=dims)
    assert repr(pattern) in str(caught.value) and "\n" not in str(caught.value)


def test_keys_without_values_are_refused():
    q, k = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match="k has 5 tokens and v 4"):
        attention_forward(q, k, q)


def test_an_output_pattern_that_does_not_fit_is_a_sentence():
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="out_pattern 'b s c' does not fit out"):
        attention_forward(x, x, x, out_pattern="b s c")


@pytest.fixture
def machine(monkeypatch):
    """machine("flash_attn3", ...): a machine where just these backends, and torch, are there.

    Each returns its number in the list of implementations, so that one sees who ran.
    """
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)

    def pretend(*names):
        for number, name in enumerate(DENSE_BACKENDS):
            backend = DENSE_BACKENDS[name]
            limits = replace(
                backend.declared,
                device_types=("cpu",),
                min_capability=None,
                max_capability=None,
                capabilities=None,
            )

            def attend(q, k, v, *, scale, mask, number=number):
                return torch.full_like(q, number)

            def load(attend=attend, there=name in names or name == "torch_sdpa"):
                if not there:
                    raise ModuleNotFoundError("gone", name="torch")
                return Loaded(attend)

            monkeypatch.setitem(DENSE_BACKENDS, name, replace(backend, declared=limits, load=load))

    return pretend


def who_ran(tokens=256, head_dim=64, dtype=torch.float16, **arguments):
    x = torch.zeros(1, 2, tokens, head_dim, dtype=dtype)
    return list(DENSE_BACKENDS)[int(attention_forward(x, x, x, **arguments)[0, 0, 0, 0])]


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        (list(DENSE_BACKENDS), "flash_attn4"),
        (["sage_attn2", "flash_attn3", "flash_attn2"], "flash_attn3"),
        (["xformers", "sage_attn2", "flash_attn2"], "flash_attn2"),
        (["xformers", "sage_attn2"], "sage_attn2"),
        (["xformers"], "xformers"),
        (["comfy_kitchen_int8", "sage_attn3"], "torch_sdpa"),  # not in the guide's list
    ],
    ids=str,
)
def test_the_first_available_in_the_guides_order_runs(there, chosen, machine):
    machine(*there)
    assert who_ran() == chosen


def test_a_call_the_first_does_not_take_goes_to_the_next_that_does(machine):
    machine("flash_attn4", "flash_attn2", "xformers")
    assert who_ran(head_dim=256) == "flash_attn2"
    assert who_ran(dtype=torch.float32) == "xformers"
    assert who_ran(dtype=torch.float64) == "torch_sdpa"
    assert who_ran(attn_mask=torch.ones(256, 256)) == "torch_sdpa"


@pytest.mark.parametrize("name", [None, "xformers"], ids=["automatic", "named"])
def test_a_library_that_fails_on_a_call_is_passed_over_with_a_warning(name, machine, monkeypatch):
    def no_kernel(q, k, v, *, scale, mask):
        raise NotImplementedError("No operator found for\n this dtype")

    machine("xformers")
    broken = replace(DENSE_BACKENDS["xformers"], load=lambda: Loaded(no_kernel))
    monkeypatch.setitem(DENSE_BACKENDS, "xformers", broken)
    said = "passes over xformers, which failed: NotImplementedError: No operator found for this"
    with pytest.warns(RuntimeWarning, match=said):
        assert who_ran(implementation=name) == "torch_sdpa"


def test_a_library_that_runs_out_of_memory_is_not_passed_over(machine, monkeypatch):
    def full(q, k, v, *, scale, mask):
        raise torch.OutOfMemoryError("full")

    machine("xformers")
    broken = replace(DENSE_BACKENDS["xformers"], load=lambda: Loaded(full))
    monkeypatch.setitem(DENSE_BACKENDS, "xformers", broken)
    with pytest.raises(torch.OutOfMemoryError):
        who_ran()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_named_implementation_runs_and_torch_takes_what_it_does_not(name, machine):
    machine(*DENSE_BACKENDS)
    assert who_ran(implementation=name) == IMPLEMENTATIONS[name]
    assert who_ran(implementation=name, attn_mask=torch.ones(256, 256)) == "torch_sdpa"
    assert who_ran(implementation=name, dtype=torch.float64) == "torch_sdpa"


def test_backend_names_are_names_too(machine):
    machine(*DENSE_BACKENDS)
    assert who_ran(implementation="comfy_kitchen_int8") == "comfy_kitchen_int8"


def test_the_environment_variable_is_read_at_every_call(machine, monkeypatch):
    machine(*DENSE_BACKENDS)
    for value, chosen in (
        ("xformers", "xformers"),
        ("Flash_Attention_2", "flash_attn2"),
        ("torch", "torch_sdpa"),
        ("", "flash_attn4"),
    ):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, value)
        assert who_ran() == chosen
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "xformers")
    assert who_ran(implementation="sage_attention") == "sage_attn2"
    assert backend_from_environment().name == "xformers"
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert backend_from_environment() is None


def test_an_unknown_name_is_a_sentence_with_the_known_ones(machine, monkeypatch):
    machine()
    with pytest.raises(ValueError, match="implementation is one of flash_attention_4, .*'magic'"):
        who_ran(implementation="magic")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "magic")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE} is one of .*'magic'"):
        who_ran()


def test_a_named_implementation_that_is_missing_says_why_and_how(machine, monkeypatch):
    machine()
    with pytest.raises(ValueError, match="'sage_attention' cannot run .*sageattention.*pip"):
        who_ran(implementation="sage_attention")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "flash_attention_4")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE} 'flash_attention_4' cannot run"):
        who_ran()
    with pytest.raises(ValueError, match="to install it: "):
        find_backend("xformers")
