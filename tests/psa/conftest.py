"""Preset files as users write them."""

import pytest

PSA = "type: psa\nmask_ratios: {1: [0, 0.5]}\n"


def preset(text, name="p"):
    """A file whose preset's fields start in line 4."""
    lines = "".join(f"      {line}\n" for line in text.splitlines())
    return f"S:\n  attention_configs:\n    {name}:\n{lines}"


@pytest.fixture
def preset_file(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write
