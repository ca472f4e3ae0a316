"""python -m benchmarks.quality --keep-others: rows of an earlier result that stay."""

import json

import pytest

from benchmarks.quality_rows import keep_others

from .test_quality import row


class TestKeepingOthers:
    """A method measured again takes its place among the rows of the others."""

    WEIGHTS = {"name": "wan_miniature.safetensors", "sha256": "ab"}

    def earlier(self, path, **changed):
        rows = [row("radial drop", "radial", 0.4, 20.0), row("psa", "psa", 0.2, 18.0, "psa")]
        rows.append(row("floor", "dense in bf16", 1.0, 45.0, "dense"))
        facts = {"weights": self.WEIGHTS, "steps": 12, "guidance": 3.0, "command": "first"}
        path.write_text(json.dumps(facts | changed | {"rows": rows}), encoding="utf-8")

    def now(self):
        return {"weights": self.WEIGHTS, "steps": 12, "guidance": 3.0, "command": "second"}

    def test_rows_of_other_methods_stay_and_both_commands_are_said(self, tmp_path):
        self.earlier(tmp_path / "quality.json")
        result = self.now()
        keep_others(result, tmp_path / "quality.json", ["psa"])
        assert [kept["method"] for kept in result["rows"]] == ["radial", "dense"]
        assert result["command"] == "first && second"

    def test_rows_of_other_settings_stay_where_some_are_measured_alone(self, tmp_path):
        path = tmp_path / "quality.json"
        self.earlier(path)
        earlier = json.loads(path.read_text(encoding="utf-8"))
        labels = ["sparge block_order=raster", "sparge block_order=Gilbert"]
        earlier["rows"] += [row("sparge", label, 0.3, 20.0, "sparge") for label in labels]
        path.write_text(json.dumps(earlier), encoding="utf-8")
        result = self.now()
        keep_others(result, path, ["sparge"], "Gilbert")
        kept = [kept["label"] for kept in result["rows"]]
        assert kept == ["radial", "psa", "dense in bf16", "sparge block_order=raster"]
        result = self.now()
        keep_others(result, path, ["sparge", "dense"], "Gilbert")
        assert "dense in bf16" not in [kept["label"] for kept in result["rows"]]

    def test_floors_measured_again_do_not_stand_twice(self, tmp_path):
        self.earlier(tmp_path / "quality.json", command="first && second")
        result = self.now()
        keep_others(result, tmp_path / "quality.json", ["psa", "dense"])
        assert [kept["method"] for kept in result["rows"]] == ["radial"]
        assert result["command"] == "first && second"

    @pytest.mark.parametrize(
        ("changed", "why"),
        [
            ({"weights": {"name": "wan_miniature.safetensors", "sha256": "cd"}}, "weights was"),
            ({"steps": 4}, "steps was 4 and is 12"),
            ({"guidance": 1.0}, "guidance was 1.0 and is 3.0"),
        ],
        ids=["weights", "steps", "guidance"],
    )
    def test_rows_of_something_else_are_refused(self, changed, why, tmp_path):
        self.earlier(tmp_path / "quality.json", **changed)
        with pytest.raises(ValueError, match=f"quality.json cannot be kept: {why}"):
            keep_others(self.now(), tmp_path / "quality.json", ["psa"])

    def test_no_rows_to_keep_is_said(self, tmp_path):
        with pytest.raises(ValueError, match="no earlier rows to keep: no file"):
            keep_others(self.now(), tmp_path / "quality.json", ["psa"])
