"""The shipped workflows fit the nodes as they are: a graph that opens with shifted widgets lies."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfy

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(path.stem for path in (FOLDER / "api").glob("*.json"))


@pytest.fixture(scope="module")
def pack_nodes(comfyui):
    import asyncio

    from sparse_video_attention.nodes.extension import SparseVideoAttentionExtension

    nodes = asyncio.run(SparseVideoAttentionExtension().get_node_list())
    return {node.GET_SCHEMA().node_id: node for node in nodes}


def widgets(node):
    return [entry for entry in node.GET_SCHEMA().inputs if entry.id != "model"]


def allowed(entry, value):
    options = getattr(entry, "options", None)
    if options is not None:
        return value in options
    low, high = getattr(entry, "min", None), getattr(entry, "max", None)
    if low is not None or high is not None:
        return isinstance(value, (int, float)) and low <= value <= high
    return isinstance(value, (str, bool))


def test_there_is_a_workflow_for_every_promise():
    assert set(NAMES) == {
        "wan_t2v_radial",
        "cogvideox_radial",
        "wan_t2v_psa",
        "cogvideox_psa",
        "wan_t2v_sparge",
        "cogvideox_sparge",
        "wan22_t2v_sparge",
        "wan22_i2v_sparge_4_steps",
    }


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_have_the_same_node_with_allowed_values(pack_nodes, name):
    graph = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    api = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    ours = [node for node in graph["nodes"] if node["type"] in pack_nodes]
    api_ours = [node for node in api.values() if node["class_type"] in pack_nodes]
    assert [node["type"] for node in ours] == [node["class_type"] for node in api_ours]
    samplers = [node for node in graph["nodes"] if node["type"].startswith(("KS", "SamplerCustom"))]
    assert len(ours) == len(samplers), "every sampler's model has its node"
    for node, api_node in zip(ours, api_ours, strict=True):
        entries = widgets(pack_nodes[node["type"]])
        values = node["widgets_values"]
        assert len(values) == len(entries)
        given = {key: value for key, value in api_node["inputs"].items() if key != "model"}
        assert given == {entry.id: value for entry, value in zip(entries, values, strict=True)}
        for entry, value in zip(entries, values, strict=True):
            assert allowed(entry, value), (entry.id, value)


@pytest.mark.parametrize("name", NAMES)
def test_every_link_of_the_graph_joins_two_of_its_slots(name):
    graph = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    for link, source, source_slot, target, target_slot, kind in graph["links"]:
        assert link in nodes[source]["outputs"][source_slot]["links"]
        assert nodes[source]["outputs"][source_slot]["type"] == kind
        assert nodes[target]["inputs"][target_slot]["link"] == link
