"""Result files: which code they were made by, and that none is half written."""

import json
from pathlib import Path

import pytest

from benchmarks import result_file
from benchmarks.result_file import CHOICE, code_digest


@pytest.fixture
def sources(tmp_path):
    """A repository's code in a folder."""
    for name in ("kernels/triton_launch.py", "kernels/triton_kernel.py", "benchmarks/tables.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    for name in result_file.CODE_FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "counts", "counts_where_kernels_are_named"),
    [
        ("kernels/triton_launch.py", True, True),
        ("kernels/triton_kernel.py", True, False),
        ("kernels/new.py", True, True),
        ("demo/weights.py", True, True),
        ("psa/attention_config.yaml", True, True),
        ("benchmarks/tables.py", False, False),
        ("README.md", False, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_code_is_known_by_its_text(sources, name, counts, counts_where_kernels_are_named):
    before = code_digest(root=sources), code_digest(CHOICE, sources)
    (sources / name).write_text("2")
    assert (code_digest(root=sources) != before[0]) == counts
    assert (code_digest(CHOICE, sources) != before[1]) == counts_where_kernels_are_named


def test_the_digest_of_this_code_sees_every_folder():
    for folder in result_file.CODE:
        assert list((result_file.REPOSITORY / folder).glob("*.py")), folder
    assert all((result_file.REPOSITORY / name).is_file() for name in result_file.CODE_FILES)


def test_a_file_is_replaced_whole(tmp_path):
    file = result_file.ResultFile(tmp_path / "card" / "a.json", {"device": "x"}, "command", {})
    file.write(rows=[1])
    with pytest.raises(TypeError):
        file.write(rows=[object()])
    assert json.loads(Path(file.path).read_text())["rows"] == [1]
