"""The pack on ComfyUI's own page, in a real browser: what a person drags, types, and sees."""

import json
import os
import shutil
from pathlib import Path

import pytest

from demo.workflow import PATCH

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
SHIPPED = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Of a page on a busy machine.
PATIENCE = 300_000


@pytest.fixture(scope="module")
def chromium():
    """Path of the browser, with one sentence where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is not None:
        return found
    missing = "no Chromium on this machine: apt-get install chromium"
    if os.environ.get("CI") == "true":
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.fixture(scope="module")
def page(server, chromium):
    """ComfyUI's page when its nodes are there."""
    playwright = pytest.importorskip("playwright.sync_api")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=arguments)
        opened = browser.new_page(viewport={"width": 1600, "height": 1000})
        opened.set_default_timeout(PATIENCE)
        opened.goto(server.url, wait_until="domcontentloaded", timeout=PATIENCE)
        opened.wait_for_function(
            "node => window.app?.graph && window.LiteGraph?.registered_node_types[node]",
            arg=PATCH,
            timeout=PATIENCE,
        )
        yield opened
        browser.close()


def load_graph(page, graph):
    page.evaluate("graph => window.app.loadGraphData(graph)", graph)


def load_prompt(page, workflow):
    page.evaluate("nodes => window.app.loadApiJson(nodes, 'test')", workflow.nodes)


def prompt(page):
    """What the page would send: {node: {class_type, inputs}}"""
    sent = page.evaluate("() => window.app.graphToPrompt()")["output"]
    return {
        name: {"class_type": node["class_type"], "inputs": node["inputs"]}
        for name, node in sent.items()
    }


@pytest.mark.parametrize("stem", SHIPPED)
def test_a_shipped_workflow_is_sent_as_its_api_form_says(stem, page):
    load_graph(page, json.loads((WORKFLOWS / f"{stem}.json").read_text(encoding="utf-8")))
    sent = prompt(page)
    shipped = json.loads((WORKFLOWS / "api" / f"{stem}.json").read_text(encoding="utf-8"))
    assert sent == {
        name: {"class_type": node["class_type"], "inputs": node["inputs"]}
        for name, node in shipped.items()
    }


def test_a_node_dragged_in_has_the_defaults_and_an_explanation_of_each(page, object_info):
    for node, info in object_info.items():
        if (
            info["category"] != "model/patch/attention"
            or "sparse_video" not in info["python_module"]
        ):
            continue
        shown = page.evaluate(
            """type => {
                const node = window.LiteGraph.createNode(type)
                return {
                    title: node.title,
                    widgets: (node.widgets ?? []).map(w => [w.name, w.value, w.tooltip]),
                    inputs: node.inputs.map(i => i.name),
                    outputs: node.outputs.map(o => o.type),
                }
            }""",
            node,
        )
        assert shown["title"] == info["display_name"] and shown["outputs"] == info["output"]
        declared = info["input"]["required"] | info["input"].get("optional", {})
        assert "model" in shown["inputs"]
        for name, value, tooltip in shown["widgets"]:
            options = declared[name][1]
            choices = declared[name][0] if isinstance(declared[name][0], list) else None
            choices = options.get("options", choices)
            default = options.get("default", choices[0] if choices else None)
            assert value == default and tooltip == options["tooltip"]


def test_a_layer_list_that_cannot_be_read_is_said_on_the_page(page, tiny):
    load_prompt(page, tiny(dense_layers="a,b"))
    page.evaluate("() => { window.app.queuePrompt(0) }")
    page.wait_for_function("() => document.body.innerText.includes(\"'a' is not a layer\")")
    page.keyboard.press("Escape")


def test_preview_and_report_show_their_pictures_on_the_nodes(page, tiny):
    workflow = tiny(steps=3, min_tokens=0, dense_timesteps=1, block_size=64)
    sampler = workflow.nodes[workflow.sampler]["inputs"]
    inputs = {"model": [workflow.find(PATCH), 0], "samples": sampler["latent_image"], "steps": 3}
    workflow = workflow.reporting(PATCH, "page")
    workflow.nodes["preview"] = {"class_type": "PreviewAttentionMask", "inputs": inputs}
    load_prompt(page, workflow)
    page.evaluate("() => { window.app.queuePrompt(0) }")
    sizes = page.wait_for_function(
        """() => {
            const shown = ['PreviewAttentionMask', 'AttentionReport'].map(type =>
                window.app.graph._nodes.find(node => node.type == type)?.imgs?.[0])
            return shown.every(image => image?.naturalWidth) &&
                shown.map(image => [image.naturalWidth, image.naturalHeight])
        }"""
    ).json_value()
    assert all(width == 880 and height > 200 for width, height in sizes)
