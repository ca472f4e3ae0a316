"""SetAttentionBackend in a real ComfyUI: who gets which call, in either order of the nodes."""

import json

import pytest
import torch
import torch.nn.functional as F
from sparse_video_attention.patching import run_history
from sparse_video_attention.third_party import DENSE_BACKENDS, Constraints, DenseBackend
from sparse_video_attention.third_party.backend import Loaded

pytestmark = pytest.mark.comfy

SITES = ("self_attn_1_type", "cross_attn_1_type", "cross_attn_2_type")
LAYERS, STEPS = 4, 4


@pytest.fixture(scope="module")
def patch(comfyui):
    from sparse_video_attention.nodes.backend import SetAttentionBackend

    return lambda model, **inputs: SetAttentionBackend.execute(model, **inputs).result[0]


@pytest.fixture(scope="module")
def models(load_model):
    loaded = {}
    return lambda name: loaded.setdefault(name, load_model(name))


@pytest.fixture
def fake(monkeypatch):
    """fake(name, **constraints): a backend that computes with torch and keeps its calls."""

    def add(name, attend=None, **constraints):
        calls = []

        def run(q, k, v, *, scale, mask):
            calls.append((q.shape, k.shape, mask))
            if attend is not None:
                return attend(q, k, v)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

        declared = Constraints(**({"device_types": None, "dtypes": None} | constraints))
        backend = DenseBackend(name=name, declared=declared, load=lambda: Loaded(run))
        monkeypatch.setitem(DENSE_BACKENDS, name, backend)
        return calls

    return add


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


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
def test_each_site_of_an_image_to_video_model_gets_its_own_backend(models, patch, sample, fake):
    calls = {site: fake(name) for site, name in zip(SITES, list(DENSE_BACKENDS)[1:4], strict=True)}
    names = dict(zip(SITES, list(DENSE_BACKENDS)[1:4], strict=True))
    run = clip_vision(sample)
    model = models("wan_i2v")
    out = run(patch(model, **names))
    assert relative_error(out, run(model)) < 1e-4
    assert {site: len(c) for site, c in calls.items()} == dict.fromkeys(SITES, LAYERS * STEPS)
    assert key_lengths(calls["self_attn_1_type"]) == {400}
    assert key_lengths(calls["cross_attn_1_type"]) == {40}
    assert key_lengths(calls["cross_attn_2_type"]) == {257}


@pytest.mark.parametrize("name", ["wan", "cogvideox", "cogvideox_1.5"])
def test_the_chosen_backend_computes_what_comfyui_would(models, patch, sample, name):
    model = models(name)
    patched = patch(model, **dict.fromkeys(SITES, "torch_sdpa"))
    assert relative_error(sample(patched), sample(model)) < 1e-4
    backends = run_history(patched).latest.backend_calls
    assert {ran for _, ran in backends} == {"torch_sdpa"}


@pytest.mark.core
@pytest.mark.parametrize("first", ["backend", "sparse"])
def test_it_runs_what_a_sparse_node_leaves_dense_in_either_order(
    models, patch, sample, fake, install_band, first
):
    calls = fake("flash_attn2")
    inputs = {"self_attn_1_type": "flash_attn2"}
    model = models("wan")
    if first == "backend":
        patched = install_band(patch(model, **inputs), dense_layers=(0, 3))
    else:
        patched = patch(install_band(model, dense_layers=(0, 3)), **inputs)
    out = sample(patched)
    record = run_history(patched).latest
    assert len(calls) == LAYERS + 3 * 2 == sum(record.dense_reasons().values())
    assert record.sparse().calls == 3 * 2
    assert {c.ran for c in record.calls if c.reason} == {"flash_attn2"}
    assert relative_error(out, sample(install_band(model, dense_layers=(0, 3)))) < 1e-4
    assert "dense backends: self_attn_1_type flash_attn2 x 10" in record.summary()


@pytest.mark.core
def test_a_call_it_cannot_take_goes_to_comfyui_and_is_named(models, patch, sample, fake, run_lines):
    calls = fake("sage_attn2", head_dims=(64,))
    model = models("wan")
    out = sample(patch(model, self_attn_1_type="sage_attn2"))
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
    models, patch, sample, fake, run_lines, attend, said
):
    calls = fake("sage_attn3", attend)
    model = models("wan")
    assert torch.equal(sample(patch(model, self_attn_1_type="sage_attn3")), sample(model))
    assert len(calls) == 1
    assert sum(said in line and "passed over" in line for line in run_lines()) == 1


def test_low_precision_is_not_used_where_comfyui_forbids_it(models, patch, fake):
    from sparse_video_attention.patching.router import OVERRIDE_KEY

    calls = fake("sage_attn2", is_low_precision=True)
    options = patch(models("wan"), self_attn_1_type="sage_attn2").model_options[
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
def test_masks_reach_backends_that_take_them(models, patch, mask_shape):
    from sparse_video_attention.patching.router import OVERRIDE_KEY

    options = patch(models("wan"), self_attn_1_type="torch_sdpa").model_options[
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
    models, patch, fake
):
    from sparse_video_attention.patching.router import OVERRIDE_KEY

    calls, handed_on = fake("flash_attn2", supports_mask=False), []
    options = patch(models("wan"), self_attn_1_type="flash_attn2").model_options[
        "transformer_options"
    ]

    def func(q, k, v, heads, mask=None, **kwargs):
        handed_on.append(mask)
        return q

    q, mask = torch.randn(1, 16, 256), torch.ones(16, 16, dtype=torch.bool)
    options[OVERRIDE_KEY](func, q, q, q, 2, mask=mask, transformer_options=options)
    options[OVERRIDE_KEY](func, q, q, q, 2, transformer_options=options)
    assert len(calls) == 1 and len(handed_on) == 1 and handed_on[0] is mask


@pytest.mark.parametrize("on_unavailable", ["fallback", "error"])
def test_a_library_the_environment_names_is_treated_as_an_input(
    models, patch, monkeypatch, run_lines, on_unavailable
):
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "flash_attention_3")
    if on_unavailable == "error":
        with pytest.raises(ValueError, match="'flash_attn3' cannot run here"):
            patch(models("wan"), on_unavailable=on_unavailable)
    else:
        patch(models("wan"))
        assert sum("flash_attn3 falls back to ComfyUI's own choice" in s for s in run_lines()) == 3


def test_other_models_and_grouped_heads_are_served_without_the_forward_hook(models, patch, fake):
    """Models that are not video models have no tokens to read: lengths alone tell the sites."""
    from sparse_video_attention.patching.router import OVERRIDE_KEY

    calls = {
        site: fake(name, supports_grouped_heads=True)
        for site, name in (("self", "flash_attn2"), ("cross", "xformers"))
    }
    options = patch(
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


@pytest.mark.core
@pytest.mark.parametrize("name", ["radial_attn", "psa", "sparge_attn"])
def test_a_sparse_name_installs_that_method_with_its_defaults(models, patch, name):
    patched = patch(models("wan"), self_attn_1_type=name)
    sparse = patched.model_options["transformer_options"]["sparse_video_attention"].sparse
    assert sparse.policy.name == {"radial_attn": "radial", "sparge_attn": "sparge"}.get(name, name)
    assert sparse.min_tokens == 4096


@pytest.mark.parametrize("site", SITES[1:])
@pytest.mark.parametrize("name", ["radial_attn", "psa", "sparge_attn", "sparge_ckpt"])
def test_a_sparse_name_on_a_cross_site_is_refused_with_the_reason(models, patch, site, name):
    with pytest.raises(ValueError, match="work in self-attention only"):
        patch(models("wan"), **{site: name})


def test_a_missing_library_falls_back_or_stops_as_asked(models, patch, sample, run_lines):
    model = models("wan")
    assert DENSE_BACKENDS["flash_attn3"].unavailable() is not None
    patched = patch(model, self_attn_1_type="flash_attn3")
    assert any("flash_attn3 falls back to ComfyUI's own choice" in s for s in run_lines())
    assert torch.equal(sample(patched), sample(model))
    (reason,) = run_history(patched).latest.notes
    assert "flash_attn_3 is not installed; to install it, " in reason and reason in run_lines()[-1]
    with pytest.raises(ValueError, match="self_attn_1_type 'flash_attn3' cannot run here"):
        patch(model, self_attn_1_type="flash_attn3", on_unavailable="error")


def test_the_environment_variable_counts_where_nothing_is_chosen(models, patch, monkeypatch, fake):
    fake("xformers")

    def chosen(**inputs):
        patched = patch(models("wan"), **inputs)
        options = patched.model_options["transformer_options"]
        return dict(options["sparse_video_attention"].dense.backends)

    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "xformers")
    assert {s.value: n for s, n in chosen().items()} == dict.fromkeys(SITES, "xformers")
    assert set(chosen(cross_attn_1_type="torch_sdpa").values()) == {"torch_sdpa"}
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "nope")
    with pytest.raises(ValueError, match="DIFFSYNTH_ATTENTION_IMPLEMENTATION"):
        chosen()


GUIDE_SPARGE = """{
  "self_attn_1_type": "flash_attn3",
  "cross_attn_1_type": "flash_attn3",
  "cross_attn_2_type": "flash_attn3"
  "sparge": true,
  "sparge_ckpt": "/path/to/sparge_wan2.1_t2v_1.3B.pt"
}
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GUIDE_SPARGE, "at line 5, column 3"),
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "is not an object"),
        ('"flash_attn3"', "is not an object"),
        ("{}", "names no attention"),
        ('{"steps": 4}', "names no attention"),
        ('{"self_attn_1_type": 3}', "self_attn_1_type 3 is not text"),
        ('{"self_attn_1_type": null}', "self_attn_1_type None is not text"),
        ('{"self_attn_1_type": "flash"}', "self_attn_1_type 'flash': allowed are auto"),
        ('{"cross_attn_1_type": "radial_attn"}', "work in self-attention only"),
        ('{"self_attn_type": "auto"}', "did you mean 'self_attn_1_type'"),
        ('{"self_attn_1_type": "auto", "self_attn_1_type": "auto"}', "is given twice"),
        ('{"sparge": "yes"}', "sparge 'yes' is not true or false"),
        ('{"sparge": true, "sparge_ckpt": 5}', "sparge_ckpt 5 is not the path of a file"),
        ('{"sparge": true, "self_attn_1_type": "psa"}', "'psa' and sparge are two sparse methods"),
        ('{"sparge": true, "sparge_ckpt": "gone.pt"}', "gone.pt"),
        ('{"sparge": true, "sparge_ckpt": "/gone.pt"}', "gone.pt"),
        ("[" * 100_000, "nested too deeply"),
        ("\xff\xfe", "config_file"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_broken_configuration_is_refused_with_one_sentence(models, patch, tmp_path, text, said):
    path = tmp_path / "attention.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as refusal:
        patch(models("wan"), config_file=str(path))
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.core
def test_the_guides_configurations_work_by_name(models, patch, run_lines):
    options = patch(models("wan"), config_file="wan_i2v.json").model_options["transformer_options"]
    assert options["sparse_video_attention"].sparse.policy.name == "radial"
    options = patch(models("wan"), config_file="wan_t2v_sparge.json").model_options[
        "transformer_options"
    ]
    assert options["sparse_video_attention"].sparse.policy.name == "sparge"
    assert any("cross_attn_1_type flash_attn3 falls back" in line for line in run_lines())


def test_inputs_win_over_the_file_and_other_keys_are_ignored_aloud(
    models, patch, tmp_path, run_lines
):
    path = tmp_path / "lightx2v.json"
    config = {
        "infer_steps": 40,
        "self_attn_1_type": "torch_sdpa",
        "cross_attn_1_type": "torch_sdpa",
    }
    path.write_text(json.dumps(config))
    patched = patch(models("wan"), config_file=str(path), cross_attn_1_type="auto")
    chosen = patched.model_options["transformer_options"]["sparse_video_attention"].dense.backends
    assert {site.value: name for site, name in chosen} == {
        "self_attn_1_type": "torch_sdpa",
        "cross_attn_1_type": "torch_sdpa",
    }
    assert any("infer_steps" in line and "ignored" in line for line in run_lines())
