"""PatchPSA in a real ComfyUI: presets by model, warm-up by steps, and dense where it must be."""

import pytest
import torch
from sparse_video_attention.patching import run_history

from .conftest import relative_error, sparse_calls

pytestmark = pytest.mark.comfy

EVERYTHING = """
{section}:
  default_attention: everything
  attention_configs:
    everything:
      type: psa
      use_rearrange: {rearrange}
      rearrange_method: Gilbert
      block_size: {{m: 128, n: 32, tile_n: 32}}
      mask_mode: topk
      mask_ratios: {{1: [0.0, 1.0]}}
      warmup_steps: 0
      verbose: {verbose}
"""


@pytest.fixture(scope="module")
def patch(comfyui):
    from sparse_video_attention.nodes.psa import PatchPSA

    def run(model, **inputs):
        return PatchPSA.execute(model, **({"min_tokens": 0} | inputs)).result[0]

    return run


@pytest.fixture
def preset_file(tmp_path):
    def write(section, rearrange="false", verbose="false"):
        path = tmp_path / "presets.yaml"
        path.write_text(EVERYTHING.format(section=section, rearrange=rearrange, verbose=verbose))
        return str(path)

    return write


@pytest.mark.core
@pytest.mark.parametrize("name", ["wan", "cogvideox", "cogvideox_1.5"])
def test_auto_picks_a_preset_for_the_model_says_why_and_acts(
    models, patch, sample, run_lines, name
):
    model = models(name)
    patched = patch(model, warmup_steps=1)
    said = next(line for line in run_lines() if line.startswith("PSA preset"))
    assert "/psa_balanced" in said and "nearest" in said
    assert ("CogVideo" in said) == name.startswith("cogvideox")
    out = sample(patched)
    assert 1e-6 < relative_error(out, sample(model)) < 1
    assert {call.step for call in sparse_calls(patched)} == {1, 2, 3}
    assert all(0 < call.density <= 1 for call in sparse_calls(patched))


@pytest.mark.core
@pytest.mark.parametrize(
    ("rearrange", "skipped"), [("false", "pool"), ("true", "pool"), ("true", "weighted")]
)
@pytest.mark.parametrize("name", ["wan", "cogvideox", "cogvideox_1.5"])
def test_everything_at_level_one_is_dense_in_any_order(
    models, patch, sample, preset_file, name, rearrange, skipped
):
    model = models(name)
    patched = patch(
        model,
        preset="Mine/everything",
        config_file=preset_file("Mine", rearrange=rearrange),
        skipped_blocks=skipped,
    )
    out = sample(patched)
    assert {call.density for call in sparse_calls(patched)} == {1.0}
    assert relative_error(out, sample(model)) < 1e-4


def test_a_users_file_that_auto_does_not_take_is_said(models, patch, preset_file, run_lines):
    patch(models("wan"), config_file=preset_file("Wan2.1_1.3B"))
    assert any("'Wan2.1_1.3b', which config_file does not have" in line for line in run_lines())


def test_a_users_file_changes_what_auto_picks(models, patch, sample, preset_file):
    patched = patch(models("wan"), config_file=preset_file("Wan2.1_1.3b"))
    sample(patched)
    assert {call.density for call in sparse_calls(patched)} == {1.0}


def test_warm_up_of_all_steps_is_the_unpatched_result(models, patch, sample):
    model = models("wan")
    patched = patch(model, warmup_steps=4)
    assert torch.equal(sample(patched), sample(model))
    assert not sparse_calls(patched)


@pytest.mark.core
def test_a_preset_warm_up_longer_than_the_run_is_scaled_and_said(models, patch, sample, run_lines):
    patched = patch(models("wan"), preset="Wan2.1_1.3b/psa_balanced")
    sample(patched)
    assert {call.step for call in sparse_calls(patched)} == {1, 2, 3}
    (said,) = run_history(patched).latest.notes
    assert said.startswith(
        "the preset asks for 15 dense steps, too many for a run of 4, so a quarter"
    )
    assert said.endswith("so a quarter of the steps is dense (1)") and said in run_lines()[-1]


@pytest.mark.parametrize(
    ("name", "preset", "said"),
    [
        ("wan", "CogVideo_5b/psa_balanced", "published for cogvideox; this model is wan"),
        ("cogvideox", "Wan2.2_A14B/psa_balanced", "published for wan; this model is cogvideox"),
        ("wan", "Wan2.2_A14B/psa_balanced", None),
        ("wan", "CogVideo_5b/baseline", None),
    ],
)
def test_a_preset_of_the_other_family_is_said(models, patch, run_lines, name, preset, said):
    patch(models(name), preset=preset)
    lines = [line for line in run_lines() if "was published for" in line]
    assert [said in line for line in lines] == ([True] if said else [])


def test_a_baseline_preset_is_dense_and_says_so(models, patch, sample, run_lines):
    model = models("wan")
    assert torch.equal(sample(patch(model, preset="Wan2.1_14b/baseline")), sample(model))
    assert "preset Wan2.1_14b/baseline is dense attention" in run_lines()[-1]


def test_means_that_are_weighted_act(models, patch, sample):
    model, inputs = models("wan"), {"preset": "Wan2.1_1.3b/psa_topk", "warmup_steps": 1}
    dense = sample(model)
    dropped, pooled, weighted = (
        sample(patch(model, skipped_blocks=skipped, **inputs))
        for skipped in ("drop", "pool", "weighted")
    )
    assert bool(weighted.isfinite().all())
    assert 1e-6 < relative_error(weighted, dense) < relative_error(dropped, dense)
    assert relative_error(weighted, pooled) > 1e-6


@pytest.mark.parametrize("skipped", ["pool", "weighted"])
def test_batch_two_is_two_runs_of_batch_one(models, patch, sample, skipped):
    inputs = {"preset": "Wan2.1_1.3b/psa_topk", "skipped_blocks": skipped}
    patched = patch(models("wan"), warmup_steps=1, **(inputs if skipped == "weighted" else {}))
    noise = torch.randn(2, 16, 5, 16, 20, generator=torch.Generator().manual_seed(3))
    both = sample(patched, shape=(2, 16, 5, 16, 20), noise=noise)
    for i in range(2):
        assert relative_error(both[i : i + 1], sample(patched, noise=noise[i : i + 1])) < 1e-4


def test_a_repeated_run_gives_the_same_bits_and_draws_no_random_number(models, patch, sample):
    patched = patch(models("wan"), warmup_steps=1)
    first = sample(patched, sampler="euler_ancestral")
    assert torch.equal(sample(patched, sampler="euler_ancestral"), first)
    # A stochastic sampler sees the noise it would see without the node.
    all_dense = sample(patch(models("wan"), warmup_steps=4), sampler="euler_ancestral")
    assert torch.equal(all_dense, sample(models("wan"), sampler="euler_ancestral"))
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    sampled = sample(patched, noise=torch.zeros(1, 16, 5, 16, 20))
    assert bool(sampled.isfinite().all())
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.random.set_rng_state(state)


def test_verbose_logs_every_step_and_changes_nothing_else(
    models, patch, sample, preset_file, run_lines
):
    loud = patch(
        models("wan"), preset="Mine/everything", config_file=preset_file("Mine", verbose="true")
    )
    out = sample(loud)
    assert sum(line.startswith("step ") for line in run_lines()) == 4
    quiet = patch(models("wan"), preset="Mine/everything", config_file=preset_file("Mine"))
    count = len(run_lines())
    assert torch.equal(sample(quiet), out)
    assert not any(line.startswith("step ") for line in run_lines()[count:])


def test_the_last_sparse_node_of_the_pack_acts_and_says_so(
    models, patch, sample, run_lines, comfyui
):
    from sparse_video_attention.nodes.radial import PatchRadialAttention

    model = models("wan")
    radial_inputs = {"min_tokens": 0, "block_size": 64}

    def radial(model):
        return PatchRadialAttention.execute(model, **radial_inputs).result[0]

    psa_last = patch(radial(model), warmup_steps=1)
    assert any("psa" in line and "replaces radial" in line for line in run_lines())
    assert torch.equal(sample(psa_last), sample(patch(model, warmup_steps=1)))
    radial_last = radial(patch(model, warmup_steps=1))
    assert any("radial" in line.split("replaces")[0] for line in run_lines() if "replaces" in line)
    assert torch.equal(sample(radial_last), sample(radial(model)))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"preset": "Wan2.1_14b/psa_balancd"}, "did you mean 'Wan2.1_14b/psa_balanced'"),
        ({"preset": "nope"}, "preset 'nope' does not exist"),
        ({"config_file": "nowhere.yaml"}, "config_file 'nowhere.yaml': no such file"),
        ({"config_file": "C:\\mine\\no.yaml"}, "config_file 'C:\\mine\\no.yaml': no such file"),
        ({"warmup_steps": 101}, "warmup_steps 101: allowed are whole numbers from -1 to 100"),
        ({"warmup_steps": -3}, "warmup_steps -3: allowed are whole numbers from -1 to 100"),
        ({"warmup_steps": "x"}, "warmup_steps 'x': allowed are whole numbers from -1 to 100"),
        ({"dense_layers": "9"}, "layer 9 is outside this model"),
        (
            {"skipped_blocks": "mean"},
            "skipped_blocks must be one of drop, pool, weighted; got 'mean'",
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_bad_input_is_refused_with_one_sentence(models, patch, inputs, said):
    with pytest.raises(ValueError) as refusal:
        patch(models("wan"), **inputs)
    assert said in str(refusal.value)


def test_a_preset_file_with_an_error_is_refused_before_the_graph_runs(comfyui, tmp_path):
    from sparse_video_attention.nodes.psa import PatchPSA

    path = tmp_path / "wrong.yaml"
    path.write_text(
        "Wan2.1_14b:\n  attention_configs:\n    mine:\n      type: psa\n      mask_mod: topk\n"
    )
    said = PatchPSA.validate_inputs(preset="auto", config_file=str(path), dense_layers="")
    assert "wrong.yaml" in said and "line 5" in said and "mask_mode" in said
    assert PatchPSA.validate_inputs(preset="auto", config_file="", dense_layers="") is True


def test_a_preset_of_a_file_whose_name_is_linked_is_not_refused_before_the_run(comfyui):
    """ComfyUI asks with None where an input comes from another node."""
    from sparse_video_attention.nodes.psa import PatchPSA

    named = {"preset": "Mine/everything", "dense_layers": ""}
    assert PatchPSA.validate_inputs(**named, config_file=None) is True
    for alone in (named, named | {"config_file": ""}):
        assert "preset 'Mine/everything' does not exist" in PatchPSA.validate_inputs(**alone)


def test_an_edited_preset_file_is_read_again(comfyui, tmp_path):
    from sparse_video_attention.nodes.psa import PatchPSA

    path = tmp_path / "presets.yaml"
    path.write_text("a: 1")
    first = PatchPSA.fingerprint_inputs(config_file=str(path))
    path.write_text("a: 2")
    assert PatchPSA.fingerprint_inputs(config_file=str(path)) != first


def test_a_file_of_a_linked_name_is_read_again_when_it_is_edited(comfyui, tmp_path, monkeypatch):
    """ComfyUI asks with None where an input comes from another node."""
    import folder_paths
    from sparse_video_attention.nodes.backend import SetAttentionBackend
    from sparse_video_attention.nodes.psa import PatchPSA

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    for node, file in ((PatchPSA, "psa/a.yaml"), (SetAttentionBackend, "attention_configs/a.json")):
        assert node.fingerprint_inputs(config_file=None) is not None, "there is no folder yet"
        path = tmp_path / file
        path.parent.mkdir()
        path.write_text("{}")
        first = node.fingerprint_inputs(config_file=None)
        assert node.fingerprint_inputs(config_file=None) == first
        path.write_text('{"a": 1}')
        assert node.fingerprint_inputs(config_file=None) != first
