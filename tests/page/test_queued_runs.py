"""Runs queued from the page: what is refused is said and can be mended, what ran is shown."""

import re

import pytest
from PIL import Image
from playwright.sync_api import expect
from sparse_video_attention.patching.report_picture import density_colour

from demo.workflow import PATCH

# Wide enough that a picture on a node keeps flat areas of its colours.
SHOWN = {"PreviewAttentionMask": [0, 0], "AttentionReport": [520, 0], "PreviewAny": [0, 620]}


def details(page):
    """Where the page says all that is wrong when a person asks for details."""
    page.complaint.wait_for()
    page.tab.get_by_test_id("error-overlay-see-errors").click()
    panel = page.tab.get_by_test_id("properties-panel")
    panel.get_by_test_id("errors-summary-hero").wait_for()
    for button in panel.get_by_role("button", name=re.compile("^Info for ")).all():
        button.click()
    return panel


def ended_well(page, prompt):
    entry = page.end_of(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    return entry["outputs"]


class TestBadInput:
    @pytest.mark.parametrize(
        ("stem", "node", "widget", "wrong", "said"),
        [
            pytest.param(
                *("wan_t2v_radial", PATCH, "dense_layers", "99"),
                "dense_layers '99': layer 99 is outside this model, whose 2 layers are 0 to 1",
                id="layer-not-in-the-model",
            ),
            pytest.param(
                *("wan_t2v_radial", PATCH, "dense_layers", "a,b"),
                "dense_layers 'a,b': 'a' is not a layer",
                id="layer-list-of-letters",
            ),
            pytest.param(
                *("wan_t2v_radial", PATCH, "decay_factor", 5.0),
                "The value 5 for PatchRadialAttention's decay_factor is above the maximum 2",
                id="decay-factor-out-of-range",
            ),
            pytest.param(
                *("wan_t2v_radial", PATCH, "block_size", 96),
                "block_size 96: allowed are 128 and 64",
                id="block-size-that-is-none",
            ),
            pytest.param(
                *("wan_t2v_psa", "PatchPSA", "preset", "Wan9/none"),
                "preset 'Wan9/none' does not exist; presets are Wan2.1_14b/baseline, ",
                id="unknown-preset",
            ),
        ],
    )
    def test_is_said_on_the_page_and_runs_when_mended(
        self, stem, node, widget, wrong, said, page, tiny, request
    ):
        page.open_prompt(tiny(stem).nodes)
        right = page.widgets(node)[widget]["value"]
        page.reopen_with(node, widget, wrong)
        prompt = page.run()
        assert prompt is None or page.end_of(prompt)["status"]["status_str"] == "error"
        # The page fetches its report of an error that ended a run, and shows a part before.
        expect(details(page)).to_contain_text(said)
        page.photograph(f"refused_{request.node.callspec.id}")

        if widget == "preset":
            page.choose(node, widget, str(right))
        else:
            page.type_into(node, widget, str(right))
        assert page.widgets(node)[widget]["value"] == right
        assert ended_well(page, page.run())
        expect(page.complaint).to_have_count(0)


def colours(picture):
    """{colour: pixels} of a picture file."""
    with Image.open(picture) as opened:
        image = opened.convert("RGB")
        return {colour: count for count, colour in image.getcolors(image.width * image.height)}


def test_preview_and_report_show_their_pictures_and_text(page, tiny):
    graph = {"min_tokens": 0, "dense_timesteps": 1, "block_size": 64, "skipped_blocks": "drop"}
    workflow = tiny(steps=3, **graph)
    latent = workflow.nodes[workflow.sampler]["inputs"]["latent_image"]
    inputs = {"model": [workflow.find(PATCH), 0], "samples": latent, "steps": 3}
    workflow = workflow.reporting(PATCH, "page").without("SaveImage")
    workflow.nodes["preview"] = {"class_type": "PreviewAttentionMask", "inputs": inputs}
    workflow.nodes["text"] = {"class_type": "PreviewAny", "inputs": {"source": ["report", 2]}}
    page.open_prompt(workflow.nodes)
    page.ask(
        """shown => {
            for (const node of app.graph.nodes) {
                node.pos = shown[node.type] ?? [node.pos[0], node.pos[1] + 3000]
                if (node.type in shown) node.setSize([500, node.type === 'PreviewAny' ? 200 : 600])
            }
            app.canvas.ds.scale = 1
            app.canvas.ds.offset = [80, 90]
        }""",
        SHOWN,
    )
    # The first and the last shade: blocks that are left out and blocks that are kept.
    shades = density_colour(0.0), density_colour(1.0)
    before = colours(page.photograph("run_before"))
    assert not any(shade in before for shade in shades)

    outputs = ended_well(page, page.run())
    text = "".join(outputs["text"]["text"])
    assert "1 of 2 layers sparse on 2 of 3 steps" in text
    page.tab.wait_for_function(
        """types => types.every(type => app.graph.nodes.find(node => node.type === type)
            .imgs?.[0]?.naturalWidth)""",
        arg=["PreviewAttentionMask", "AttentionReport"],
    )
    expect(page.tab.locator("textarea").filter(visible=True).first).to_have_value(text)
    page.ask("() => app.canvas.draw(true, true)")
    after = colours(page.photograph("run_after"))
    assert all(after.get(shade, 0) > 5_000 for shade in shades), "no mask on the page"
    assert any(shade not in shades and after[shade] > 100 for shade in sparse_shades(after))


def sparse_shades(found):
    """Colours of a picture that mean a density between none and all."""
    return {density_colour(share / 1000) for share in range(1, 1000)} & found.keys()
