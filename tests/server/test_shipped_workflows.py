"""The workflows that the pack ships, against what a real server knows about nodes."""

import json
import uuid
from pathlib import Path

import pytest

from demo.workflow import Workflow
from devtools.server import WorkflowRejected

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"


class TestShippedWorkflows:
    """Both forms of every workflow, against what the server knows about nodes."""

    STEMS = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
    # In the editor only.
    NOTES = {"MarkdownNote", "Note"}

    def widgets(self, node_type, object_info):
        """Names of a node's widgets in the order in which the editor keeps their values."""
        info = object_info[node_type]
        names = []
        for group in ("required", "optional"):
            for name in info["input_order"].get(group, []):
                kind, *options = info["input"][group][name]
                options = options[0] if options else {}
                is_widget = isinstance(kind, list) or kind in (
                    *("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"),
                )
                if is_widget and not options.get("forceInput"):
                    names.append(name)
                    if options.get("control_after_generate") or name in ("seed", "noise_seed"):
                        names.append(None)
        return names

    def editor_graph(self, document, object_info):
        """{node id: (class, {input: value or (source id, slot)})} of an editor document."""
        links = {link[0]: (str(link[1]), link[2]) for link in document["links"]}
        graph = {}
        for node in document["nodes"]:
            if node["type"] in self.NOTES:
                continue
            names = self.widgets(node["type"], object_info)
            values = node["widgets_values"]
            inputs = {n: v for n, v in zip(names, values, strict=False) if n is not None}
            for entry in node["inputs"]:
                if entry.get("link") is not None:
                    inputs[entry["name"]] = links[entry["link"]]
            graph[str(node["id"])] = (node["type"], inputs)
        return graph

    @pytest.mark.parametrize("stem", STEMS)
    def test_editor_and_api_form_are_one_graph(self, stem, object_info):
        document = json.loads((WORKFLOWS / f"{stem}.json").read_text(encoding="utf-8"))
        api = Workflow.load(WORKFLOWS / "api" / f"{stem}.json")
        expected = {
            name: (
                node["class_type"],
                {k: tuple(v) if isinstance(v, list) else v for k, v in node["inputs"].items()},
            )
            for name, node in api.nodes.items()
        }
        assert self.editor_graph(document, object_info) == expected

    @pytest.mark.parametrize("stem", STEMS)
    def test_links_of_the_editor_form_fit_their_slots(self, stem, object_info):
        document = json.loads((WORKFLOWS / f"{stem}.json").read_text(encoding="utf-8"))
        nodes = {node["id"]: node for node in document["nodes"]}
        for link, source, slot, target, index, kind in document["links"]:
            assert object_info[nodes[source]["type"]]["output"][slot] == kind
            assert link in nodes[source]["outputs"][slot]["links"]
            entry = nodes[target]["inputs"][index]
            assert (entry["link"], entry["type"]) == (link, kind)

    @pytest.mark.parametrize("stem", STEMS)
    def test_only_the_weights_are_missing_on_a_fresh_machine(self, stem, server):
        workflow = Workflow.load(WORKFLOWS / "api" / f"{stem}.json")
        with pytest.raises(WorkflowRejected) as error:
            server.submit(workflow.nodes, uuid.uuid4().hex)
        text = str(error.value)
        complaints = text.count("Value not in list")
        assert complaints == text.count("; ") + 1
        assert all(name in text for name in ("unet_name", "clip_name", "vae_name"))

    def test_they_are_offered_as_templates(self, server):
        offered = server.get("/workflow_templates")["sparse_video_attention"]
        assert "wan_t2v_radial" in offered
