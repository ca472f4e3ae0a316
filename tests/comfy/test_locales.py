"""Translations of the nodes: complete, in step with the schemas, and found by ComfyUI."""

import asyncio
import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfy

REPOSITORY = Path(__file__).resolve().parents[2]
LOCALES = REPOSITORY / "locales"
CHINESE = re.compile(r"[\u4e00-\u9fff]")
# A number, or a name of code, that a translation has to keep: 0.2, "0-2, 39", start_percent.
LITERAL = re.compile(r"-?\d+(?:\.\d+)?|\b[a-z][a-z0-9]*(?:[_/][a-z0-9]+)+\b|\"[^\"]*\"")


def read(language):
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def leaves(texts, path=()):
    if not isinstance(texts, dict):
        return {path: texts}
    found = {}
    for key, value in texts.items():
        found |= leaves(value, (*path, key))
    return found


@pytest.fixture(scope="module")
def nodes(comfyui):
    from sparse_video_attention.nodes.extension import SparseVideoAttentionExtension

    return asyncio.run(SparseVideoAttentionExtension().get_node_list())


def test_english_is_what_the_server_tells_the_page(nodes):
    shown = {}
    for node in nodes:
        info = node.GET_NODE_INFO_V1()
        inputs = {}
        for group in ("required", "optional"):
            for name, (_, options) in info["input"].get(group, {}).items():
                label = options.get("display_name") or name
                inputs[name] = {"name": label, "tooltip": options["tooltip"]}
        shown[info["name"]] = {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": inputs,
            "outputs": {
                str(position): {"name": name, "tooltip": tooltip}
                for position, (name, tooltip) in enumerate(
                    zip(info["output_name"], info["output_tooltips"], strict=True)
                )
            },
        }
    assert read("en") == shown, "python -m locales writes the file anew"


def test_chinese_translates_every_text_and_no_other():
    english, chinese = leaves(read("en")), leaves(read("zh"))
    assert set(chinese) == set(english)
    for path, text in chinese.items():
        assert CHINESE.search(text), path


def test_chinese_keeps_numbers_and_names_of_code():
    english, chinese = leaves(read("en")), leaves(read("zh"))
    for path, text in english.items():
        if path[-1] == "name":
            continue
        literals = set(LITERAL.findall(text))
        assert not {literal for literal in literals if literal not in chinese[path]}, path


@pytest.mark.parametrize("language", ["en", "zh"])
def test_page_can_show_every_text_as_it_is(language):
    # vue-i18n, which the page translates with, reads these as its own syntax.
    for path, text in leaves(read(language)).items():
        assert not re.search(r"[@{}|]", text), path


def test_comfyui_collects_both_languages(comfyui, monkeypatch, tmp_path):
    import folder_paths
    from app.custom_node_manager import CustomNodeManager

    (tmp_path / "sparse-video-attention").symlink_to(REPOSITORY, target_is_directory=True)
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(tmp_path)])
    collected = CustomNodeManager().build_translations()
    assert {language: texts["nodeDefs"] for language, texts in collected.items()} == {
        "en": read("en"),
        "zh": read("zh"),
    }
