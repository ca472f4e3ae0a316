"""Nodes as a person puts them on the canvas: what is set, and what is kept out of the way."""

import pytest
from playwright.sync_api import expect

from .comfy_page import SETTLED_MS

MODERN = "Comfy.VueNodes.Enabled"
# By DESIGN.md: value when dropped, in the order shown.
RADIAL = {"dense_layers": "0", "dense_timesteps": -1, "block_size": 128, "decay_factor": 0.2}
PSA = {"preset": "auto", "warmup_steps": -1}
SPARGE = {
    **{"sparge_ckpt": "none", "topk": 0.2, "simthreshd1": -0.1},
    **{"dense_layers": "0", "dense_timesteps": 0},
}
BACKEND = {
    **{"self_attn_1_type": "auto", "cross_attn_1_type": "auto", "cross_attn_2_type": "auto"},
    **{"config_file": "", "on_unavailable": "fallback"},
}
EXACT = {"exact_timesteps": -1, "last_exact_timesteps": -1, "exact_layers": ""}
SCHEDULE = {"last_dense_timesteps": 0, "start_percent": 0.0, "end_percent": 1.0}
KERNEL = {"kernel": "auto", "precision": "auto", "min_tokens": 4096, "dense_vace_blocks": False}
SPARGE_ADVANCED = {
    **{"cdfthreshd": 0.0, "attention_sink": False},
    **{"block_order": "auto", "skipped_blocks": "weighted"},
}
# {node: (what everyone sees, what is advanced)}
DROPPED = {
    "PatchRadialAttention": (RADIAL, SCHEDULE | {"skipped_blocks": "pool"} | KERNEL),
    "PatchPSA": (
        PSA,
        {"config_file": "", "dense_layers": "0"} | SCHEDULE | KERNEL | {"skipped_blocks": "pool"},
    ),
    "PatchSpargeAttention": (
        SPARGE,
        SCHEDULE
        | {"last_dense_timesteps": -1}
        | SPARGE_ADVANCED
        | KERNEL
        | {"block_scores": "auto", "block_shape": "auto"},
    ),
    "SetAttentionBackend": (BACKEND, EXACT),
    "PreviewAttentionMask": ({"steps": 20}, {}),
    "AttentionReport": ({}, {}),
    "MeasureAttentionError": ({}, {}),
}
EACH_NODE = pytest.mark.parametrize("node", DROPPED)


@EACH_NODE
def test_a_node_has_its_defaults_and_its_advanced_inputs(node, page):
    plain, advanced = DROPPED[node]
    page.drop(node)
    # Until it is drawn; without, the picture is of the node before.
    page.tab.wait_for_timeout(SETTLED_MS)
    page.photograph(f"dropped_{node}")
    shown = page.widgets(node)
    assert plain | advanced == {name: shown[name]["value"] for name in plain | advanced}
    # What the design does not list came later, and is advanced too.
    assert {name for name, widget in shown.items() if not widget["advanced"]} == set(plain)
    ((_, sent),) = page.sent().items()
    values = {name: widget["value"] for name, widget in shown.items()}
    assert sent == {"class_type": node, "inputs": values}


@pytest.fixture
def modern_page(page):
    """The page with the nodes that its settings call modern."""
    page.ask(f"() => app.extensionManager.setting.set('{MODERN}', true)")
    yield page
    # The server keeps settings for all pages.
    page.ask(f"() => app.extensionManager.setting.set('{MODERN}', false)")


@EACH_NODE
def test_a_modern_node_shows_advanced_inputs_when_asked(node, modern_page):
    plain, advanced = DROPPED[node]
    modern_page.drop(node)
    box = modern_page.tab.locator("[data-node-id]")
    names = box.get_by_test_id("widget-layout-field-label")
    expect(names).to_have_text(list(plain))
    button = box.get_by_text("Show advanced inputs")
    expect(button).to_have_count(1 if advanced else 0)
    if advanced:
        button.click()
        expect(names).to_have_count(len(modern_page.widgets(node)))
        assert {*plain, *advanced} <= {name.strip() for name in names.all_inner_texts()}
    expect(box.locator("[aria-invalid=true]")).to_have_count(0)
    modern_page.photograph(f"modern_{node}")


def test_a_modern_node_sends_a_block_size_as_a_number(modern_page):
    modern_page.drop("PatchRadialAttention")
    widget = modern_page.tab.get_by_test_id("node-widget").filter(has_text="block_size")
    widget.get_by_test_id("decrement").click()
    expect(widget.get_by_test_id("decrement")).to_be_disabled()
    ((_, sent),) = modern_page.sent().items()
    assert repr(sent["inputs"]["block_size"]) == "64"


@pytest.mark.parametrize(
    ("words", "node"),
    [("wan speed", "PatchRadialAttention"), ("sage attention", "SetAttentionBackend")],
)
def test_the_search_box_finds_a_node_by_what_people_call_it(words, node, page):
    page.empty()
    dialog = page.tab.get_by_role("dialog")
    expect(dialog).to_have_count(0)
    box = dialog.get_by_role("textbox").or_(dialog.get_by_role("combobox")).first

    def click_and_type(patience_ms):
        page.tab.mouse.dblclick(600, 500)
        box.fill(words, timeout=patience_ms)

    page.again_if_closed(click_and_type)
    expect(dialog.get_by_test_id("result-item").first).to_contain_text("Attention")
    page.tab.keyboard.press("Enter")
    page.tab.wait_for_function("() => app.graph.nodes.length")
    assert page.ask("() => app.graph.nodes.map(node => node.type)") == [node]
    page.tab.keyboard.press("Escape")


def test_what_is_typed_past_a_range_is_held_to_it(page):
    page.drop("PatchRadialAttention")
    typed = {"decay_factor": "5", "dense_timesteps": "-7", "block_size": "100"}
    for widget, text in typed.items():
        page.type_into("PatchRadialAttention", widget, text)
    shown = page.widgets("PatchRadialAttention")
    held = {"decay_factor": 2.0, "dense_timesteps": -1, "block_size": 128}
    assert {name: shown[name]["value"] for name in typed} == held
