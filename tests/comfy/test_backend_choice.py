"""SetAttentionBackend in a real ComfyUI: what a name, a file or the environment chooses."""

import itertools
import json
import re
from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.patching import run_history
from sparse_video_attention.third_party import DENSE_BACKENDS

from .conftest import SITES

pytestmark = pytest.mark.comfy


@pytest.fixture
def backend_node(comfyui):
    from sparse_video_attention.nodes.backend import SetAttentionBackend

    return SetAttentionBackend


ENVIRONMENT = "DIFFSYNTH_ATTENTION_IMPLEMENTATION"


@pytest.mark.parametrize("on_unavailable", ["fallback", "error"])
def test_a_library_the_environment_names_is_treated_as_an_input(
    models, set_backends, monkeypatch, run_lines, on_unavailable
):
    """And said to be the environment's: the inputs read auto."""
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "flash_attention_3")
    if on_unavailable == "error":
        said = rf"cross_attn_2_type \({ENVIRONMENT}\) 'flash_attn3' cannot run here"
        with pytest.raises(ValueError, match=said):
            set_backends(models("wan"), on_unavailable=on_unavailable)
    else:
        set_backends(models("wan"))
        (said,) = (s for s in run_lines() if "falls back to an earlier node's choice" in s)
        assert f"flash_attn3 for {', '.join(SITES)} ({ENVIRONMENT}) falls back" in said
        assert any(f"{ENVIRONMENT} chooses flash_attn3 for {SITES[0]}" in s for s in run_lines())


def test_what_a_file_names_is_said_to_be_the_files(models, set_backends, run_lines):
    model = models("wan")
    with pytest.raises(
        ValueError, match=r"cross_attn_2_type \(wan_i2v.json\) 'flash_attn3' cannot"
    ):
        set_backends(model, config_file="wan_i2v.json", on_unavailable="error")
    set_backends(model, config_file="wan_i2v.json", cross_attn_1_type="flash_attn3")
    lines = run_lines()
    assert any("flash_attn3 for cross_attn_1_type falls back" in line for line in lines)
    assert any("flash_attn3 for cross_attn_2_type (wan_i2v.json) falls" in line for line in lines)


@pytest.mark.core
@pytest.mark.parametrize("name", ["radial_attn", "psa", "sparge_attn"])
def test_a_sparse_name_installs_that_method_with_its_defaults(models, set_backends, name):
    from sparse_video_attention.nodes import psa, radial, sparge

    nodes = {"radial_attn": radial.PatchRadialAttention, "psa": psa.PatchPSA}
    node = nodes.get(name, sparge.PatchSpargeAttention)
    model = models("wan")
    assert _sparse(set_backends(model, self_attn_1_type=name)) == _sparse(*node.execute(model))
    assert _sparse(*node.execute(model)).min_tokens == 4096


def test_a_file_s_sparge_has_the_node_s_defaults(models, set_backends, tmp_path):
    from sparse_video_attention.nodes.sparge import PatchSpargeAttention

    path = tmp_path / "file.json"
    path.write_text('{"sparge": true}', encoding="utf-8")
    by_file = _sparse(set_backends(models("wan"), config_file=str(path)))
    assert by_file == _sparse(*PatchSpargeAttention.execute(models("wan")))
    policy, schedule = by_file.policy, by_file.schedule
    assert (policy.topk, policy.block_order, policy.skipped_blocks) == (0.2, "Gilbert", "weighted")
    assert (schedule.dense_timesteps, schedule.last_dense_timesteps) == (0, -1)
    assert schedule.dense_layers == {0}


def _sparse(patched):
    return patched.model_options["transformer_options"]["sparse_video_attention"].sparse


@pytest.mark.parametrize("site", SITES[1:])
@pytest.mark.parametrize("name", ["radial_attn", "psa", "sparge_attn", "sparge_ckpt"])
def test_a_sparse_name_on_a_cross_site_is_refused_with_the_reason(models, set_backends, site, name):
    with pytest.raises(ValueError, match="work in self-attention only"):
        set_backends(models("wan"), **{site: name})


def test_a_missing_library_falls_back_or_stops_as_asked(models, set_backends, sample, run_lines):
    model = models("wan")
    assert DENSE_BACKENDS["flash_attn3"].unavailable() is not None
    patched = set_backends(model, self_attn_1_type="flash_attn3")
    (warning,) = [s for s in run_lines() if "flash_attn3 for self_attn_1_type falls back to" in s]
    assert "flash_attn_3 is not installed; to install it: " in warning
    assert torch.equal(sample(patched), sample(model))
    (reason,) = run_history(patched).latest.notes
    # What no installing would change comes first.
    no_device = DENSE_BACKENDS["flash_attn3"].declared.machine_reason()
    assert reason.endswith(f": {no_device or 'flash_attn_3 is not installed'}")
    assert reason in run_lines()[-1]
    assert "to install it" not in reason
    with pytest.raises(ValueError, match="self_attn_1_type 'flash_attn3' cannot run here"):
        set_backends(model, self_attn_1_type="flash_attn3", on_unavailable="error")


def test_the_environment_variable_counts_where_nothing_is_chosen(
    models, set_backends, monkeypatch, fake_backend
):
    fake_backend("xformers")

    def chosen(**inputs):
        patched = set_backends(models("wan"), **inputs)
        options = patched.model_options["transformer_options"]
        return dict(options["sparse_video_attention"].dense.backends)

    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "xformers")
    assert {s.value: n for s, n in chosen().items()} == dict.fromkeys(SITES, "xformers")
    assert set(chosen(cross_attn_1_type="torch_sdpa").values()) == {"torch_sdpa"}
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "nope")
    with pytest.raises(ValueError, match="DIFFSYNTH_ATTENTION_IMPLEMENTATION"):
        chosen()


@pytest.mark.core
def test_fastest_is_comfyuis_own_where_nothing_is_timed(models, set_backends, sample, run_lines):
    model = models("wan")
    patched = set_backends(model, **dict.fromkeys(SITES, "fastest"), on_unavailable="error")
    assert torch.equal(sample(patched), sample(model))
    line = run_lines()[-1]
    assert line.count("ComfyUI's choice (nothing is timed on this device)") == 2, line
    assert "falls back" not in line, line


@pytest.mark.core
@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_fastest_runs_what_was_timed_fastest(
    models, set_backends, sample, run_lines, monkeypatch, fake_backend, family
):
    """In a real run, by a clock on which every call takes a second, and xformers' half of one."""
    from sparse_video_attention.patching import router, timed_ways

    calls, seconds = fake_backend("xformers"), itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: next(seconds) - len(calls) / 2)
    monkeypatch.setattr(router, "can_be_timed", lambda device: True)
    monkeypatch.setattr(timed_ways, "time", clock)
    patched = set_backends(models(family), self_attn_1_type="fastest")
    first = sample(patched)
    line = run_lines()[-1]
    timed = "ComfyUI's own 1000.0 ms, torch_sdpa 1000.0 ms, xformers 500.0 ms"
    assert f"tokens were timed once: {timed}" in line, line
    ran = int(re.search(r"self_attn_1_type xformers \(the fastest here\) x (\d+);", line)[1])
    assert len(calls) == 3 + ran
    assert torch.equal(sample(patched), first)
    assert len(calls) == 3 + 2 * ran, "what was found is kept"
    whole = sample(models(family))
    assert (first - whole).norm() < 1e-4 * whole.norm()


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
def test_a_broken_configuration_is_refused_with_one_sentence(
    models, set_backends, backend_node, tmp_path, text, said
):
    path = tmp_path / "attention.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as refusal:
        set_backends(models("wan"), config_file=str(path))
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
    if "gone.pt" not in said:
        assert path.name in str(refusal.value)
    # What the file alone tells is said when the graph is queued, where the person sees it.
    if not said.startswith(("gone.pt", "'psa' and sparge")):
        assert said in backend_node.validate_inputs(config_file=str(path))


@pytest.mark.parametrize("quote", ['"{}"', " '{}' ", "{}"])
def test_a_checkpoints_path_is_taken_as_people_paste_it(
    models, set_backends, backend_node, tmp_path, monkeypatch, quote
):
    for home in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(home, str(tmp_path))
    path = tmp_path / "attention.json"
    path.write_text(json.dumps({"sparge": True, "sparge_ckpt": quote.format("~/gone.pt")}))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "gone.pt"))):
        set_backends(models("wan"), config_file=str(path))
    before = backend_node.fingerprint_inputs(config_file=str(path))
    (tmp_path / "gone.pt").write_bytes(b"x")
    assert backend_node.fingerprint_inputs(config_file=str(path)) != before


def test_a_checkpoint_that_nothing_asks_for_is_said(models, set_backends, tmp_path, run_lines):
    path = tmp_path / "attention.json"
    path.write_text('{"self_attn_1_type": "torch_sdpa", "sparge_ckpt": "/gone.pt"}')
    set_backends(models("wan"), config_file=str(path))
    assert any("attention.json: sparge_ckpt is not used" in line for line in run_lines())


@pytest.mark.parametrize("inputs", [{}, {"self_attn_1_type": "torch_sdpa"}])
def test_sparge_of_a_file_that_the_node_overrules_is_said(
    models, set_backends, tmp_path, run_lines, inputs
):
    path = tmp_path / "attention.json"
    path.write_text('{"sparge": true}')
    patched = set_backends(models("wan"), config_file=str(path), **inputs)
    options = patched.model_options["transformer_options"]
    assert (options["sparse_video_attention"].sparse is None) == bool(inputs)
    said = "attention.json: sparge true is not used, since self_attn_1_type is 'torch_sdpa'"
    said += "; set that to auto or sparge_attn to use it"
    assert sum(said in line for line in run_lines()) == bool(inputs)


@pytest.mark.core
def test_the_guides_configurations_work_by_name(models, set_backends, run_lines):
    options = set_backends(models("wan"), config_file="wan_i2v.json").model_options[
        "transformer_options"
    ]
    assert options["sparse_video_attention"].sparse.policy.name == "radial"
    options = set_backends(models("wan"), config_file="wan_t2v_sparge.json").model_options[
        "transformer_options"
    ]
    assert options["sparse_video_attention"].sparse.policy.name == "sparge"
    assert any(
        f"flash_attn3 for {', '.join(SITES)} (wan_t2v_sparge.json) falls back" in line
        for line in run_lines()
    )


def test_inputs_win_over_the_file_and_other_keys_are_ignored_aloud(
    models, set_backends, tmp_path, run_lines
):
    path = tmp_path / "lightx2v.json"
    config = {
        "infer_steps": 40,
        "self_attn_1_type": "torch_sdpa",
        "cross_attn_1_type": "torch_sdpa",
    }
    path.write_text(json.dumps(config))
    patched = set_backends(models("wan"), config_file=str(path), cross_attn_1_type="auto")
    chosen = patched.model_options["transformer_options"]["sparse_video_attention"].dense.backends
    assert {site.value: name for site, name in chosen} == {
        "self_attn_1_type": "torch_sdpa",
        "cross_attn_1_type": "torch_sdpa",
    }
    assert any("infer_steps" in line and "ignored" in line for line in run_lines())
