"""The copy that ComfyUI's registry would give out: what .comfyignore leaves of the repository."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest
from pathspec import GitIgnoreSpec

from .test_registration import NODES

pytestmark = pytest.mark.comfy

REPOSITORY = Path(__file__).resolve().parents[2]
# Miniatures' weights are 18 MB, results and golden arrays most of the rest.
MOST_BYTES = 2_000_000


def copy_of_the_registry(target):
    lines = [
        line
        for name in (".gitignore", ".comfyignore")
        for line in (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    ]
    spec = GitIgnoreSpec.from_lines([".git", *lines])

    def left_out(folder, names):
        place = Path(folder).relative_to(REPOSITORY)
        return [
            name
            for name in names
            if spec.match_file((place / name).as_posix())
            or (Path(folder, name).is_dir() and spec.match_file((place / name).as_posix() + "/"))
        ]

    shutil.copytree(REPOSITORY, target, ignore=left_out)
    return target


@pytest.fixture(scope="module")
def pack(comfyui, tmp_path_factory):
    return copy_of_the_registry(tmp_path_factory.mktemp("custom_nodes") / "sparse-video-attention")


def test_it_is_small_and_has_nothing_of_the_workshop(pack):
    files = [Path(folder, name) for folder, _, names in os.walk(pack) for name in names]
    assert sum(file.stat().st_size for file in files) < MOST_BYTES
    assert not {"tests", "benchmarks", "miniature", ".venv", ".git"} & set(os.listdir(pack))


def test_it_loads_whole(pack, monkeypatch):
    import nodes

    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", {})
    assert asyncio.run(nodes.load_custom_node(str(pack)))
    assert set(nodes.NODE_CLASS_MAPPINGS) >= set(NODES)
    for name in NODES:
        module = nodes.NODE_CLASS_MAPPINGS[name].RELATIVE_PYTHON_MODULE
        assert module == "custom_nodes.sparse-video-attention"
        assert (pack / "web" / "docs" / f"{name}.md").is_file()
    for name in ("LICENSE", "README.md", "install.py", "pyproject.toml"):
        assert (pack / name).is_file(), name


@pytest.mark.parametrize("folder", ["workflows", "locales", "web", "psa"])
def test_what_the_nodes_read_is_there(pack, folder):
    def data(root):
        kinds = {".json", ".yaml", ".md", ".js", ".jpg", ".png"}
        files = (root / folder).rglob("*")
        return {file.relative_to(root) for file in files if file.suffix in kinds}

    assert data(pack) and data(pack) == data(REPOSITORY)
