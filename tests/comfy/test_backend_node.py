"""SetAttentionBackend in a real ComfyUI: who gets which call, in either order of the nodes."""

import pytest
import torch
from sparse_video_attention.patching import run_history
from sparse_video_attention.third_party import DENSE_BACKENDS

from .conftest import SITES, relative_error

pytestmark = pytest.mark.comfy


LAYERS, STEPS = 4, 4


def key_lengths(calls):
    return {k[2] for _, k, _ in calls}


def clip_vision(sample):
    """A run of the I2V model with image features: its second cross-attention is called."""

    def run(model, **fields):
        features = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(1))

        def add_image(apply_model, arguments):
            batch = arguments["input"].shape[0]
            c = dict(arguments["c"], clip_fea=features.repeat(batch, 1, 1))
            return apply_model(arguments["input"], arguments["timestep"], **c)

        model = model.clone()
        model.set_model_unet_function_wrapper(add_image)
        return sample(model, **fields)

    return run


@pytest.mark.core
def test_each_site_of_an_image_to_video_model_gets_its_own_backend(
    models, set_backends, sample, fake_backend
):
    calls = {
        site: fake_backend(name)
        for site, name in zip(SITES, list(DENSE_BACKENDS)[1:4], strict=True)
    }
    names = dict(zip(SITES, list(DENSE_BACKENDS)[1:4], strict=True))
    run = clip_vision(sample)
    model = models("wan_i2v")
    out = run(set_backends(model, **names))
    assert relative_error(out, run(model)) < 1e-4
    assert {site: len(c) for site, c in calls.items()} == dict.fromkeys(SITES, LAYERS * STEPS)
    assert key_lengths(calls["self_attn_1_type"]) == {400}
    assert key_lengths(calls["cross_attn_1_type"]) == {40}
    assert key_lengths(calls["cross_attn_2_type"]) == {257}


@pytest.mark.parametrize("name", ["wan", "cogvideox", "cogvideox_1.5"])
def test_the_chosen_backend_computes_what_comfyui_would(models, set_backends, sample, name):
    model = models(name)
    patched = set_backends(model, **dict.fromkeys(SITES, "torch_sdpa"))
    assert relative_error(sample(patched), sample(model)) < 1e-4
    backends = run_history(patched).latest.backend_calls
    assert {ran for _, ran in backends} == {"torch_sdpa"}


@pytest.mark.core
@pytest.mark.parametrize("first", ["backend", "sparse"])
def test_it_runs_what_a_sparse_node_leaves_dense_in_either_order(
    models, set_backends, sample, fake_backend, install_band, first
):
    calls = fake_backend("flash_attn2")
    inputs = {"self_attn_1_type": "flash_attn2"}
    model = models("wan")
    if first == "backend":
        patched = install_band(set_backends(model, **inputs), dense_layers=(0, 3))
    else:
        patched = set_backends(install_band(model, dense_layers=(0, 3)), **inputs)
    out = sample(patched)
    record = run_history(patched).latest
    assert len(calls) == LAYERS + 3 * 2 == sum(record.dense_reasons().values())
    assert record.sparse().calls == 3 * 2
    assert {c.ran for c in record.calls if c.reason} == {"flash_attn2"}
    assert relative_error(out, sample(install_band(model, dense_layers=(0, 3)))) < 1e-4
    assert "dense backends: self_attn_1_type flash_attn2 x 10" in record.summary()


@pytest.mark.core
def test_a_second_node_keeps_what_the_first_chose_for_other_places(
    models, set_backends, sample, fake_backend
):
    first, second = fake_backend("sage_attn2"), fake_backend("flash_attn2")
    patched = set_backends(models("wan"), cross_attn_1_type="sage_attn2")
    sample(set_backends(patched, self_attn_1_type="flash_attn2"))
    assert len(first) == len(second) > 0
    del first[:], second[:]
    sample(set_backends(patched, cross_attn_1_type="flash_attn2"))
    assert second and not first


def test_a_call_it_cannot_take_goes_to_comfyui_and_is_named(
    models, set_backends, sample, fake_backend, run_lines
):
    calls = fake_backend("sage_attn2", head_dims=(64,))
    model = models("wan")
    out = sample(set_backends(model, self_attn_1_type="sage_attn2"))
    assert torch.equal(out, sample(model))
    assert not calls
    assert any("sage_attn2 is passed over: it takes head dim 64, not 128" in s for s in run_lines())
    assert "ComfyUI's choice" in run_lines()[-1]


@pytest.mark.parametrize(
    ("attend", "said"),
    [
        (lambda q, k, v: torch.full_like(q, float("nan")), "holds a NaN"),
        (lambda q, k, v: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["nan", "raises"],
)
def test_a_backend_that_fails_is_set_aside_and_the_run_goes_on(
    models, set_backends, sample, fake_backend, run_lines, attend, said
):
    calls = fake_backend("sage_attn3", attend)
    model = models("wan")
    assert torch.equal(sample(set_backends(model, self_attn_1_type="sage_attn3")), sample(model))
    assert len(calls) == 1
    assert sum(said in line and "passed over" in line for line in run_lines()) == 1


def test_low_precision_is_not_used_where_comfyui_forbids_it(models, set_backends, fake_backend):
    from sparse_video_attention.patching.router import OVERRIDE_KEY

    calls = fake_backend("sage_attn2", is_low_precision=True)
    options = set_backends(models("wan"), self_attn_1_type="sage_attn2").model_options[
        "transformer_options"
    ]
    q = torch.randn(1, 16, 256)

    def func(q, k, v, heads, **kwargs):
        return q

    for allowed, expected in ((False, 0), (None, 1)):
        extra = {} if allowed is None else {"low_precision_attention": allowed}
        options[OVERRIDE_KEY](func, q, q, q, heads=2, transformer_options=options, **extra)
        assert len(calls) == expected


@pytest.mark.parametrize("mask_shape", [(16, 16), (2, 16, 16), (2, 1, 16, 16)], ids=str)
def test_masks_reach_backends_that_take_them(models, set_backends, mask_shape):
    from sparse_video_attention.patching.router import OVERRIDE_KEY

    options = set_backends(models("wan"), self_attn_1_type="torch_sdpa").model_options[
        "transformer_options"
    ]
    q, k, v = (torch.randn(2, 16, 256) for _ in range(3))
    mask = torch.zeros(mask_shape).masked_fill(torch.rand(mask_shape) < 0.3, float("-inf"))
    mask[..., 0] = 0
    out = options[OVERRIDE_KEY](None, q, k, v, 2, mask=mask, transformer_options=options)
    heads = [x.view(2, 16, 2, 128).transpose(1, 2).double() for x in (q, k, v)]
    bias = mask.double() if mask.ndim != 3 else mask.double()[:, None]
    logits = heads[0] @ heads[1].transpose(-1, -2) / 128**0.5 + bias
    expected = (logits.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
    assert relative_error(out.double(), expected) < 1e-5


def test_a_masked_call_passes_over_a_backend_without_masks_and_the_next_call_does_not(
    models, set_backends, fake_backend
):
    from sparse_video_attention.patching.router import OVERRIDE_KEY

    calls, handed_on = fake_backend("flash_attn2", supports_mask=False), []
    options = set_backends(models("wan"), self_attn_1_type="flash_attn2").model_options[
        "transformer_options"
    ]

    def func(q, k, v, heads, mask=None, **kwargs):
        handed_on.append(mask)
        return q

    q, mask = torch.randn(1, 16, 256), torch.ones(16, 16, dtype=torch.bool)
    options[OVERRIDE_KEY](func, q, q, q, 2, mask=mask, transformer_options=options)
    options[OVERRIDE_KEY](func, q, q, q, 2, transformer_options=options)
    assert len(calls) == 1 and len(handed_on) == 1 and handed_on[0] is mask


def test_other_models_and_grouped_heads_are_served_without_the_forward_hook(
    models, set_backends, fake_backend
):
    """Models that are not video models have no tokens to read: lengths alone tell the sites."""
    from sparse_video_attention.patching.router import OVERRIDE_KEY

    calls = {
        site: fake_backend(name, supports_grouped_heads=True)
        for site, name in (("self", "flash_attn2"), ("cross", "xformers"))
    }
    options = set_backends(
        models("wan"), self_attn_1_type="flash_attn2", cross_attn_1_type="xformers"
    ).model_options["transformer_options"]
    run = options[OVERRIDE_KEY]
    q = torch.randn(1, 4, 24, 64)
    run(None, q, q, q, 4, skip_reshape=True, transformer_options=options)
    k = torch.randn(1, 4, 7, 64)
    run(None, q, k, k, 4, skip_reshape=True, transformer_options=options)
    assert (len(calls["self"]), len(calls["cross"])) == (1, 1)
    out = run(
        None, q, k, k, 4, skip_reshape=True, skip_output_reshape=True, transformer_options=options
    )
    assert out.shape == q.shape
