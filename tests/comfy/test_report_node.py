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
        out = AttentionReport.execute(model, {"samples": 0} if samples is None else samples)
        (shown,) = out.ui["images"]
        assert (tmp_path / shown["subfolder"] / shown["filename"]).is_file()
        assert out.ui["text"] == (out.result[2],)
        return out.result

    return run


@pytest.fixture
def model(models):
    return models("wan")


def test_the_report_is_of_the_run_and_the_samples_stay_as_they_are(
    model, install_band, sample, report, caplog
):
    patched = install_band(model)
    sample(patched, steps=4)
    given = {"samples": torch.zeros(1), "noise_mask": None}
    samples, picture, text = report(patched, given)
    assert samples is given
    assert picture.dtype == torch.float32 and picture.shape[0] == 1 and picture.shape[3] == 3
    assert 0 <= float(picture.min()) < float(picture.max()) <= 1
    record = run_history(patched).latest
    lines = text.splitlines()
    assert lines[0] == record.summary() and len(lines) == 1 + 4
    assert "first 1 of 4 steps" in lines[0]


def test_what_is_cloned_from_the_patched_model_has_the_same_report(
    model, install_band, sample, report
):
    patched = install_band(model)
    clone = patched.clone()
    sample(clone, steps=2)
    assert report(patched)[2] == report(clone)[2]
    assert "of 2 steps" in report(patched)[2]


def test_the_latest_run_is_shown_also_where_it_was_cut_short(model, install_band, sample, report):
    patched = install_band(model)
    sample(patched, steps=2)

    def stop(step, *_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(patched, steps=4, callback=stop)
    assert "the run ended early" in report(patched)[2].splitlines()[0]


def test_dense_backends_alone_have_a_report(model, set_backends, sample, report, fake_backend):
    fake_backend("xformers")
    patched = set_backends(model, self_attn_1_type="xformers")
    sample(patched, steps=2)
    assert "dense attention on WanModel: self_attn_1_type xformers" in report(patched)[2]


def test_a_model_without_patch_or_run_is_no_error(model, install_band, report):
    assert "has patched this model" in report(model)[2]
    assert "has not been sampled yet" in report(install_band(model))[2]
