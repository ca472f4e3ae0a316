"""The pack as ComfyUI's own loader and validation take it, on this version and on older ones."""

import asyncio
import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.core]

REPOSITORY = Path(__file__).resolve().parents[2]
NODES = (
    "PatchRadialAttention",
    "PatchPSA",
    "PatchSpargeAttention",
    "SetAttentionBackend",
    "PreviewAttentionMask",
    "AttentionReport",
    "MeasureAttentionError",
)


@pytest.fixture(scope="module")
def host(comfyui):
    """ComfyUI's table of nodes."""
    import nodes

    return nodes


@pytest.fixture
def load(host, monkeypatch):
    """load(): whether ComfyUI loads the pack, into a table of its own."""
    monkeypatch.setattr(host, "NODE_CLASS_MAPPINGS", {})
    return lambda: asyncio.run(host.load_custom_node(str(REPOSITORY)))


def test_every_node_is_there_with_all_its_inputs(host, load):
    import folder_paths

    assert load()
    assert tuple(host.NODE_CLASS_MAPPINGS) >= NODES
    for name in NODES:
        node = host.NODE_CLASS_MAPPINGS[name]
        listed = node.INPUT_TYPES()
        inputs = listed["required"] | listed.get("optional", {})
        assert list(inputs) == [given.id for given in node.GET_SCHEMA().inputs]
        assert all(options["tooltip"] for _, options in inputs.values())
    assert [Path(path).name for path in folder_paths.get_folder_paths("sparge")] == ["sparge"]


@pytest.mark.parametrize(
    ("name", "is_said"),
    [("sparse-video-attention-main", False), ("sva (1)", True), ("稀疏", True), ("a%20b", True)],
)
def test_a_folder_that_comfyui_does_not_serve_from_is_named(
    host, load, tmp_path, caplog, name, is_said
):
    folder = tmp_path / name
    folder.symlink_to(REPOSITORY, target_is_directory=True)
    assert asyncio.run(host.load_custom_node(str(folder)))
    said = [message for message in caplog.messages if f'from the folder "{name}"' in message]
    assert len(said) == is_said


def test_two_copies_of_the_pack_are_noticed(host, load, tmp_path, caplog):
    from sparse_video_attention.patching.log import PREFIX

    def own():
        return [message for message in caplog.messages if message.startswith(PREFIX)]

    assert load() and load()  # a pack that is loaded again is no second copy
    assert not own()
    copy = tmp_path / "second_copy"
    copy.symlink_to(REPOSITORY, target_is_directory=True)
    assert asyncio.run(host.load_custom_node(str(copy)))
    (said,) = own()
    assert f"{', '.join(NODES)} are already there from custom_nodes.{REPOSITORY.name}" in said
    assert "remove one" in said


def test_a_node_that_comfyui_has_itself_is_told(host, monkeypatch, caplog):
    class Own:
        pass

    monkeypatch.setattr(host, "NODE_CLASS_MAPPINGS", {"PatchPSA": Own})
    # ComfyUI names its own nodes for packs to leave alone.
    assert asyncio.run(host.load_custom_node(str(REPOSITORY), {"PatchPSA"}))
    assert host.NODE_CLASS_MAPPINGS["PatchPSA"] is Own
    said = f"PatchPSA is already there from {Own.__module__}, and ComfyUI keeps its own"
    assert any(said in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("node", "inputs", "said"),
    [
        ("PatchRadialAttention", {"dense_layers": "0-2, -1", "block_size": 128}, None),
        ("PatchRadialAttention", {"dense_layers": "a,b"}, "'a' is not a layer"),
        ("PatchRadialAttention", {"decay_factor": 2.5}, "decay_factor"),
        ("PatchPSA", {"preset": "Wan2.1_1.3b/psa_topk"}, None),
        ("PatchPSA", {"preset": "nope"}, "preset 'nope'"),
        ("PatchSpargeAttention", {"topk": -1.0}, "topk"),
        ("SetAttentionBackend", {"cross_attn_1_type": "psa"}, "self-attention only"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_inputs_are_judged_when_a_prompt_is_queued(host, load, node, inputs, said):
    import execution

    load()

    class Loader:
        RETURN_TYPES = ("MODEL",)
        FUNCTION = "run"
        CATEGORY = ""

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

    host.NODE_CLASS_MAPPINGS["Loader"] = Loader
    prompt = {
        "1": {"class_type": "Loader", "inputs": {}},
        "2": {"class_type": node, "inputs": {"model": ["1", 0]} | inputs},
    }
    valid, errors, _ = asyncio.run(execution.validate_inputs("prompt", prompt, "2", {}))
    assert valid == (said is None)
    assert said is None or said in " ".join(f"{e['message']} {e['details']}" for e in errors)


def test_the_oldest_version_is_the_same_wherever_it_is_told():
    from sparse_video_attention.nodes.host import OLDEST_COMFYUI

    from devtools.older_hosts import OLDEST

    oldest = ".".join(map(str, OLDEST_COMFYUI))
    assert OLDEST.version == oldest
    asked = re.findall(r'requires-comfyui = ">=(.+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert asked == [oldest]
    assert f"ComfyUI {oldest} or newer" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("0.3.74", "needs ComfyUI 0.3.75 or newer, and this is 0.3.74: update ComfyUI"),
        ("0.2.9", "needs ComfyUI 0.3.75 or newer, and this is 0.2.9: update ComfyUI"),
        ("0.10.0", None),
        ("1.0.0", None),
        ("0.3.75-dev", None),
        ("a fork", None),
    ],
)
def test_a_comfyui_that_is_too_old_is_told_the_version_it_needs(
    host, load, monkeypatch, caplog, version, said
):
    import comfyui_version

    monkeypatch.setattr(comfyui_version, "__version__", version)
    assert load() == (said is None)
    assert said is None or any(said in message for message in caplog.messages)
    assert said is None or not host.NODE_CLASS_MAPPINGS


def test_a_comfyui_that_does_not_know_its_version_is_too_old(monkeypatch):
    import sys

    from sparse_video_attention.nodes.host import require_comfyui

    monkeypatch.setitem(sys.modules, "comfyui_version", None)
    monkeypatch.delitem(sys.modules, "folder_paths", raising=False)
    require_comfyui()  # outside of ComfyUI
    monkeypatch.setitem(sys.modules, "folder_paths", sys)
    with pytest.raises(ImportError, match=r"needs ComfyUI 0\.3\.75 or newer, and this one is old"):
        require_comfyui()
