"""AttentionReport in a real ComfyUI: of the run that was, and of none."""

import pytest
import torch
from sparse_video_attention.patching import run_history

pytestmark = [pytest.mark.comfy, pytest.mark.core]


@pytest.fixture
def report(comfyui, tmp_path, monkeypatch):
    """report(model, samples): what the node gives, its preview in a folder of its own."""
    import folder_paths
    from sparse_video_attention.nodes.report import AttentionReport

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))

    def run(model, samples=None):
        out = AttentionReport.execute(model, {"samples": None} if samples is None else samples)
        (shown,) = out.ui["images"]
        assert (tmp_path / shown["subfolder"] / shown["filename"]).is_file()
        assert out.ui["text"] == (out.result[2],)
        return out.result

    return run


@pytest.fixture
def model(models):
    return models("wan")


def test_the_report_is_of_the_run_and_the_samples_stay_as_they_are(
    model, install_band, sample, report
):
    patched = install_band(model)
    given = {"samples": sample(patched, steps=4), "noise_mask": None}
    samples, picture, text = report(patched, given)
    assert samples is given
    assert picture.dtype == torch.float32 and picture.shape[0] == 1 and picture.shape[3] == 3
    assert 0 <= float(picture.min()) < float(picture.max()) <= 1
    record = run_history(patched).latest
    lines = text.splitlines()
    assert lines[0] == record.summary() and len(lines) == 1 + 4
    assert "first 1 of 4 steps" in lines[0]


def test_of_two_runs_of_a_model_each_latent_has_its_own_report(model, install_band, sample, report):
    patched = install_band(model)
    # ComfyUI answers the second queue of the same seed from its cache: the model has run since.
    latents = {steps: sample(patched.clone(), steps=steps) for steps in (2, 3)}
    for steps, latent in latents.items():
        assert f"of {steps} steps" in report(patched, {"samples": latent})[2].splitlines()[0]
    said = report(patched, {"samples": latents[2] * 2})[2].splitlines()
    assert said[0].startswith("These samples match no known run of this model")
    assert "of 3 steps" in said[1]


def test_samples_from_before_the_sampler_are_of_no_run(model, install_band, sample, report):
    """Nor are those of a sampler without a step to run, or on the unpatched model."""
    patched = install_band(model)
    empty = {"samples": torch.zeros(1, 16, 3, 12, 16)}
    assert "or it had no step to run" in report(patched, empty)[2]
    sample(patched, steps=2)
    for others in (empty, {"samples": sample(model, steps=2)}):
        first, line, *_ = report(patched, others)[2].splitlines()
        assert "uses this patched model and has a step to run" in first
        assert "so its latest run is shown" in first and "of 2 steps" in line


def test_the_latest_run_may_have_been_cut_short(model, install_band, sample, report):
    patched = install_band(model)
    sample(patched, steps=2)

    def stop(step, *_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(patched, steps=4, callback=stop)
    assert "the run ended early" in report(patched)[2].splitlines()[1]


def test_a_node_further_up_the_chain_knows_the_run_too(
    model, install_band, set_backends, sample, report
):
    patched = install_band(model)
    latent = sample(set_backends(patched, cross_attn_1_type="torch_sdpa"))
    text = report(patched, {"samples": latent})[2]
    assert text.startswith("band (reach 1)")


def test_dense_backends_alone_have_a_report(model, set_backends, sample, report, fake_backend):
    fake_backend("xformers")
    patched = set_backends(model, self_attn_1_type="xformers")
    samples = {"samples": sample(patched, steps=2)}
    text = report(patched, samples)[2]
    assert text.startswith("dense attention on WanModel: self_attn_1_type xformers")


def test_a_model_without_patch_or_run_is_no_error(model, install_band, report):
    assert "has patched this model" in report(model)[2]
    assert "has patched this model" in report(object())[2]
    assert "No run of this model is known" in report(install_band(model))[2]


def test_a_picture_that_cannot_be_drawn_or_shown_costs_no_samples(
    model, install_band, sample, comfyui, monkeypatch, tmp_path, caplog
):
    import folder_paths
    from PIL import ImageFont
    from sparse_video_attention.nodes.report import AttentionReport
    from sparse_video_attention.patching import page

    patched = install_band(model)
    given = {"samples": sample(patched, steps=2)}
    no_folder = tmp_path / "file"
    no_folder.write_text("")
    monkeypatch.setattr(folder_paths, "temp_directory", str(no_folder))
    monkeypatch.setattr(ImageFont, "load_default", lambda: None)
    page._font.cache_clear()
    samples, picture, text = AttentionReport.execute(patched, given).result
    page._font.cache_clear()
    assert samples is given and picture.shape == (1, 64, 64, 3) and "of 2 steps" in text
    assert any("Pillow 10.1 or newer is needed" in said for said in caplog.messages)
    assert any("could not be saved" in said for said in caplog.messages)
