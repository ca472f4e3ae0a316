"""Files that config_file inputs name: an edited one is read again, though the name is linked."""

import pytest
import yaml

pytestmark = pytest.mark.comfy

OWN = {"Mine": {"default_attention": "own", "attention_configs": {"own": {"type": "dense"}}}}


@pytest.fixture
def presets(tmp_path):
    path = tmp_path / "elsewhere" / "presets.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(OWN))
    return path


def fingerprint(node):
    """What ComfyUI gets that asks with None, since the name comes from another node."""
    return node.fingerprint_inputs(config_file=None)


def test_a_file_elsewhere_counts_as_changed_when_it_is_edited_after_its_first_run(
    comfyui, presets, models
):
    from sparse_video_attention.nodes.psa import PatchPSA

    before = fingerprint(PatchPSA)
    PatchPSA.execute(models("wan"), preset="Mine/own", config_file=str(presets))
    assert fingerprint(PatchPSA) == before, "sampling once more for a file that is as it was"
    presets.write_text(yaml.safe_dump(OWN | {"Other": OWN["Mine"]}))
    edited = fingerprint(PatchPSA)
    assert edited != before
    PatchPSA.execute(models("wan"), preset="Mine/own", config_file=str(presets))
    assert fingerprint(PatchPSA) == edited
    presets.unlink()
    assert fingerprint(PatchPSA) not in (before, edited)


def test_two_dots_begin_a_name_and_lead_nowhere(comfyui, tmp_path, monkeypatch, models):
    import folder_paths
    from sparse_video_attention.nodes.psa import PatchPSA

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    folder = tmp_path / "psa" / "..mine"
    folder.mkdir(parents=True)
    for name in ("..presets.yaml", "..mine/presets.yaml"):
        (tmp_path / "psa" / name).write_text(yaml.safe_dump(OWN))
        PatchPSA.execute(models("wan"), preset="Mine/own", config_file=name)
    (tmp_path / "outside.yaml").write_text(yaml.safe_dump(OWN))
    for name in ("../outside.yaml", "..mine/../../outside.yaml"):
        with pytest.raises(ValueError, match="a name cannot lead out of"):
            PatchPSA.execute(models("wan"), preset="Mine/own", config_file=name)


def test_a_file_of_another_node_is_no_change(comfyui, presets, models):
    from sparse_video_attention.nodes.backend import SetAttentionBackend
    from sparse_video_attention.nodes.psa import PatchPSA

    before = fingerprint(SetAttentionBackend)
    PatchPSA.execute(models("wan"), preset="Mine/own", config_file=str(presets))
    presets.write_text(presets.read_text() + "\n")
    assert fingerprint(SetAttentionBackend) == before


def test_a_checkpoint_that_is_replaced_is_read_again(comfyui, tmp_path, monkeypatch):
    """Which one the file names is not known where the file's name comes from another node."""
    import folder_paths
    from sparse_video_attention.nodes.backend import SetAttentionBackend

    names = dict(folder_paths.folder_names_and_paths)
    names["sparge"] = ([str(tmp_path)], set())
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", names)
    checkpoint = tmp_path / "tuned.pt"
    checkpoint.write_bytes(b"one")
    before = fingerprint(SetAttentionBackend)
    assert fingerprint(SetAttentionBackend) == before
    checkpoint.write_bytes(b"another")
    assert fingerprint(SetAttentionBackend) != before
