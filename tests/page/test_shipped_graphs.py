"""The shipped workflows as the page opens them, and where a person finds them."""

import json
import re

import pytest
from PIL import Image
from playwright.sync_api import expect

from .comfy_page import SETTLED_MS
from .conftest import WORKFLOWS

# Titles of nodes that lie on each other, at the sizes that the page gives them.
OVERLAPS = """() => {
    const boxes = app.graph.nodes.map(node => {
        const [left, top, width, height] = node.getBounding()
        return {title: node.title, left, top, right: left + width, bottom: top + height}
    })
    return boxes.flatMap((a, i) => boxes.slice(i + 1)
        .filter(b => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
        .map(b => [a.title, b.title]))
}"""
STEMS = sorted(path.stem for path in WORKFLOWS.glob("*.json"))


def document_of(stem):
    return json.loads((WORKFLOWS / f"{stem}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")


def default_of(name, inputs, info):
    """What the page sends for an input nobody chose; "a.b" is what the choice of "a" brings.

    Args:
        inputs: of the node, by name, as sent.
        info: groups of inputs by name, as the server describes them.
    """
    outer, _, inner = name.partition(".")
    kind, options = next(group[outer] for group in info.values() if outer in group)
    if inner:
        chosen = next(option for option in options["options"] if option["key"] == inputs[outer])
        below = {n.partition(".")[2]: v for n, v in inputs.items() if n.startswith(f"{outer}.")}
        return default_of(inner, below, chosen["inputs"])
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, list) else options["options"]
    return choices[0]["key"] if isinstance(choices[0], dict) else choices[0]


def assert_sent_is_shipped(sent, stem, object_info):
    """Nodes and inputs by name and value.

    ComfyUI's own nodes get new inputs from one version to the next; those the page sends at their
    defaults, and the shipped form, which older versions take too, does not have them.
    """
    shipped = json.loads((WORKFLOWS / "api" / f"{stem}.json").read_text(encoding="utf-8"))
    assert set(sent) == set(shipped)
    for name, node in shipped.items():
        assert sent[name]["class_type"] == node["class_type"]
        info = object_info[node["class_type"]]
        inputs = dict(sent[name]["inputs"])
        if info["python_module"] != "custom_nodes.sparse-video-attention":
            for new in inputs.keys() - node["inputs"].keys():
                default = default_of(new, sent[name]["inputs"], info["input"])
                assert inputs.pop(new) == default, f"{node['class_type']}: {new}"
        assert inputs == node["inputs"], node["class_type"]


@pytest.mark.parametrize("stem", STEMS)
def test_a_workflow_opens_without_complaint_and_sends_its_api_form(stem, page, object_info):
    page.open_graph(document_of(stem))
    page.tab.wait_for_timeout(SETTLED_MS)
    page.photograph(f"workflow_{stem}")
    expect(page.complaint).to_have_count(0)
    expect(page.tab.get_by_role("dialog")).to_have_count(0)
    assert_sent_is_shipped(page.sent(), stem, object_info)
    assert page.ask(OVERLAPS) == [], "every input of every node can be seen"


def test_the_page_does_complain_of_a_node_and_a_model_that_are_not_there(page):
    text = json.dumps(document_of(STEMS[0]))
    text = re.sub("Patch(PSA|RadialAttention)", "PatchNothing", text)
    page.open_graph(json.loads(text.replace("_vae.safetensors", "_nothing.safetensors")))
    expect(page.complaint).to_contain_text(re.compile("2 (errors|issues) found"))


def test_templates_are_offered_with_thumbnails_and_open(page, object_info):
    page.open_graph(document_of(STEMS[0]))
    page.tab.get_by_role("button", name="Templates").first.click()
    dialog = page.tab.get_by_role("dialog")
    dialog.get_by_text("sparse-video-attention", exact=True).first.click()
    expect(dialog.get_by_test_id(re.compile("^template-workflow-"))).to_have_count(len(STEMS))
    for stem in STEMS:
        card = dialog.get_by_test_id(f"template-workflow-{stem}")
        card.scroll_into_view_if_needed()
        thumbnail = card.get_by_role("img").first
        thumbnail.wait_for()
        page.tab.wait_for_function("image => image.naturalWidth", arg=thumbnail.element_handle())
        with Image.open(WORKFLOWS / f"{stem}.jpg") as shipped:
            assert thumbnail.evaluate("i => [i.naturalWidth, i.naturalHeight]") == [*shipped.size]
    page.photograph("templates")
    stem = STEMS[-1]
    dialog.get_by_test_id(f"template-workflow-{stem}").click()
    expect(dialog).to_have_count(0)
    node = next(n["type"] for n in document_of(stem)["nodes"] if n["type"].startswith("Patch"))
    page.tab.wait_for_function("type => app.graph.nodes.some(n => n.type === type)", arg=node)
    page.tab.wait_for_timeout(SETTLED_MS)
    assert_sent_is_shipped(page.sent(), stem, object_info)
