"""What the pack says on the page, in the languages that it speaks: names, explanations, help."""

import json
import re

import pytest
from playwright.sync_api import expect

from .comfy_page import ComfyPage
from .conftest import REPOSITORY

LOCALES = {"en": "en-US", "zh": "zh-CN"}
NODES = sorted(json.loads((REPOSITORY / "locales/en/nodeDefs.json").read_text(encoding="utf-8")))
EACH_NODE = pytest.mark.parametrize("node", NODES)


@pytest.fixture(scope="module", params=LOCALES)
def spoken(request, browser, server):
    """(the page in a browser of a language, that language)"""
    return ComfyPage(browser, server, LOCALES[request.param]), request.param


def texts_of(node, language):
    path = REPOSITORY / "locales" / language / "nodeDefs.json"
    return json.loads(path.read_text(encoding="utf-8"))[node]


def help_of(node, language):
    """What the document says, without its marks: letters and digits in order."""
    docs = REPOSITORY / "web" / "docs"
    path = docs / f"{node}.md" if language == "en" else docs / node / f"{language}.md"
    text = re.sub(r"\]\([^)]*\)", "]", path.read_text(encoding="utf-8"))
    text = re.sub(r"^```\w*$", "", text, flags=re.MULTILINE)
    return letters(re.sub(r"^\d+\. ", "", text, flags=re.MULTILINE))


def letters(text):
    return re.sub(r"\W", "", text)


@EACH_NODE
def test_names_are_those_of_the_language(node, spoken):
    page, language = spoken
    texts = texts_of(node, language)
    page.drop(node)
    page.photograph(f"{language}_{node}")
    title, inputs, outputs = page.ask(
        """() => [
            app.graph.nodes[0].title,
            app.graph.nodes[0].inputs.map(slot => [slot.name, slot.localized_name]),
            app.graph.nodes[0].outputs.map(slot => slot.localized_name),
        ]"""
    )
    assert title == texts["display_name"]
    names = {name: said["name"] for name, said in texts["inputs"].items()}
    assert dict(inputs) == names
    labels = {name: widget["label"] for name, widget in page.widgets(node).items()}
    assert labels == {name: names[name] for name in labels}
    # An output without a name of its own is called as ComfyUI calls its type.
    for place, (shown, said) in enumerate(zip(outputs, texts["outputs"].values(), strict=True)):
        if not texts_of(node, "en")["outputs"][str(place)]["name"].isupper():
            assert shown == said["name"]


@EACH_NODE
def test_everything_explains_itself_where_the_mouse_rests(node, spoken):
    page, language = spoken
    texts = texts_of(node, language)
    page.drop(node)
    widgets = page.widgets(node)
    for name, said in texts["inputs"].items():
        part = "widget" if name in widgets else "input"
        expect(page.explanation(node, part, name)).to_have_text(said["tooltip"])
    page.photograph(f"{language}_{node}_explained")
    for place, said in texts["outputs"].items():
        expect(page.explanation(node, "output", place)).to_have_text(said["tooltip"])


@EACH_NODE
def test_node_info_shows_the_help_page(node, spoken):
    page, language = spoken
    page.drop(node)
    page.tab.get_by_test_id("info-button").click()
    shown = page.tab.locator(".node-help-content")
    expect(shown.locator("h1")).to_have_text(texts_of(node, language)["display_name"])
    page.photograph(f"{language}_{node}_help")
    assert letters(shown.inner_text()) == help_of(node, language)
