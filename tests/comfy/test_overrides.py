"""Other attention patches before and after ours, and hosts that call in other ways."""

import pytest
import torch
from sparse_video_attention.patching import run_history
from sparse_video_attention.patching.router import OVERRIDE_KEY, AttentionRouter, find_router

pytestmark = pytest.mark.comfy


class Counting:
    """An override of another pack: it counts its calls and hands them on."""

    def __init__(self, previous=None):
        self.previous = previous
        self.calls = 0

    def __deepcopy__(self, memo):
        """Older hosts copy what clones of a MODEL share now; the counter has to stay one."""
        return self

    def __call__(self, func, *args, **kwargs):
        self.calls += 1
        if self.previous is not None:
            return self.previous(func, *args, **kwargs)
        return func(*args, **kwargs)


def put(model, override):
    clone = model.clone()
    clone.model_options["transformer_options"][OVERRIDE_KEY] = override
    return clone


@pytest.fixture(scope="module")
def model(load_model):
    return load_model("wan")


def dense_calls(model):
    return sum(run_history(model).latest.dense_reasons().values())


@pytest.mark.core
def test_an_earlier_override_gets_every_call_that_is_not_taken(model, install_band, sample):
    alone = sample(install_band(model))
    earlier = Counting()
    patched = install_band(put(model, earlier))
    assert torch.equal(sample(patched), alone)
    cross = 4 * 4
    assert earlier.calls == dense_calls(patched) + cross


@pytest.mark.core
def test_a_later_override_that_chains_stays_on_top(model, install_band, sample, run_lines):
    patched = install_band(model)
    later = Counting(patched.model_options["transformer_options"][OVERRIDE_KEY])
    assert torch.equal(sample(put(patched, later)), sample(patched))
    assert later.calls == 2 * 4 * 4
    assert not any("had replaced" in line for line in run_lines())


@pytest.mark.core
def test_a_later_override_that_replaces_ours_is_put_beneath_once(
    model, install_band, sample, run_lines
):
    patched = install_band(model)
    expected = sample(patched)
    later = Counting()
    overwritten = put(patched, later)
    assert torch.equal(sample(overwritten), expected)
    assert later.calls == dense_calls(patched) + 4 * 4
    said = [line for line in run_lines() if "had replaced" in line]
    assert len(said) == 1 and "Counting" in said[0]
    # The MODEL itself is as the other node left it.
    assert overwritten.model_options["transformer_options"][OVERRIDE_KEY] is later


def test_an_override_that_takes_over_again_in_mid_run_is_let_be(model, install_band, sample):
    patched = install_band(model, dense_timesteps=0)
    later = Counting()

    def take_over(patcher, timestep, model_options):
        model_options["transformer_options"][OVERRIDE_KEY] = later

    fought = put(patched, later)
    fought.add_callback("on_prepare_state", take_over)
    sample(fought)
    record = run_history(fought).latest
    assert later.calls >= 3 * 4 * 2
    assert "no self-attention call reached" in record.summary() or len(record.calls) <= 4
    assert "Counting of" in record.summary() and "took the place again" in record.summary()


def test_an_override_that_takes_everything_is_named_as_the_reason(
    model, install_band, sample, run_lines
):
    patched = install_band(model)
    top = Counting(patched.model_options["transformer_options"][OVERRIDE_KEY])
    top.__class__ = type(
        "Greedy", (Counting,), {"__call__": lambda self, func, *a, **k: func(*a, **k)}
    )
    assert torch.equal(sample(put(patched, top)), sample(model))
    assert "no self-attention call reached this pack" in run_lines()[-1]


@pytest.mark.core
def test_two_nodes_of_the_pack_leave_one_router(model, install_band):
    earlier = Counting()
    patched = install_band(install_band(put(model, earlier)))
    router = patched.model_options["transformer_options"][OVERRIDE_KEY]
    assert isinstance(router, AttentionRouter) and router.previous is earlier
    assert len(patched.wrappers["diffusion_model"]["sparse_video_attention"]) == 1
    assert len(patched.wrappers["outer_sample"]["sparse_video_attention"]) == 1
    assert len(patched.callbacks["on_prepare_state"]["sparse_video_attention"]) == 1


def test_a_router_beneath_another_pack_and_ours_again_acts_once(model, install_band, sample):
    first = install_band(model, reach=2)
    between = Counting(first.model_options["transformer_options"][OVERRIDE_KEY])
    patched = install_band(put(first, between), reach=1)
    assert torch.equal(sample(patched), sample(install_band(model, reach=1)))
    router = patched.model_options["transformer_options"][OVERRIDE_KEY]
    assert find_router(router) is router
    assert between.calls == dense_calls(patched) + 4 * 4


@pytest.mark.core
def test_keywords_this_pack_does_not_know_are_passed_on(model, install_band):
    router = install_band(model).model_options["transformer_options"][OVERRIDE_KEY]
    q = torch.randn(1, 8, 256)
    seen = {}

    def func(*args, **kwargs):
        seen.update(kwargs, args=args)
        return q

    router(func, q, q, q, 2, None, unheard_of=5, _inside_attn_wrapper=True, skip_reshape=False)
    assert seen.pop("args")[3] == 2
    assert seen == {"unheard_of": 5, "_inside_attn_wrapper": True, "skip_reshape": False}


@pytest.mark.core
def test_the_run_options_are_clean_after_the_run(model, install_band, sample):
    patched = install_band(model)
    sample(patched)
    keys = set(patched.model_options["transformer_options"])
    assert keys == {OVERRIDE_KEY, "sparse_video_attention"}


@pytest.mark.core
def test_an_order_of_tokens_is_undone_in_the_output(model, install_band, sample):
    """Attention does not care about token order, so a full plan in any order is dense."""
    patched = install_band(model, reach=10**6, reverse=True, dense_layers=())
    out, dense = sample(patched), sample(model)
    assert float((out - dense).norm() / dense.norm()) < 1e-4
    assert run_history(patched).latest.sparse().calls == 3 * 4
    # And a band in reversed order is the band: it is symmetric.
    assert run_history(patched).latest.sparse().density == 1.0


def test_a_call_with_a_mask_of_somebody_elses_is_dense_under_that_mask(model, install_band, sample):
    def masked(below):
        def override(func, q, k, v, heads, **kwargs):
            if q.shape[1] == k.shape[1] == 400:
                kwargs["mask"] = torch.zeros(400, 400).index_fill_(1, torch.arange(200), -9.0)
            return (below or func)(*((func,) if below else ()), q, k, v, heads, **kwargs)

        override.previous = below
        return override

    patched, plain = install_band(model, dense_layers=()), model.clone()
    for each in (patched, plain):
        options = each.model_options["transformer_options"]
        options[OVERRIDE_KEY] = masked(options.get(OVERRIDE_KEY))
    assert torch.equal(sample(patched), sample(plain))
    record = run_history(patched).latest
    assert record.sparse().calls == 0
    assert "the call has an attention mask" in record.dense_reasons()
    assert not torch.equal(sample(plain), sample(model))
