"""What the demo does to the shipped workflows before it submits them."""

from pathlib import Path

import pytest

from demo.methods import METHODS, PATCHES, RADIAL, method_workflow
from demo.workflow import PATCH, Workflow
from miniature.prompts import PROMPTS

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
SHIPPED = ["wan_t2v_radial", "cogvideox_radial"]


@pytest.fixture(params=SHIPPED)
def shipped(request):
    return Workflow.load(WORKFLOWS / "api" / f"{request.param}.json")


def links(workflow):
    return {
        (name, key): tuple(value)
        for name, node in workflow.nodes.items()
        for key, value in node["inputs"].items()
        if isinstance(value, list)
    }


def test_the_dense_twin_differs_by_the_radial_node_alone(shipped):
    dense = shipped.without(PATCH)
    patch = shipped.find(PATCH)
    loader = tuple(shipped.nodes[patch]["inputs"]["model"])
    assert dense.nodes.keys() == shipped.nodes.keys() - {patch}
    expected = {
        key: loader if source == (patch, 0) else source
        for key, source in links(shipped).items()
        if key[0] != patch
    }
    assert links(dense) == expected
    assert loader in links(dense).values()


def test_no_change_touches_the_workflow_it_starts_from(shipped):
    before = links(shipped), shipped.value("steps")
    shipped.without(PATCH)
    shipped.setting(steps=3)
    shipped.with_seeded_conditioning(8, 0).saving_latent("x")
    shipped.saving_frames("x")
    assert (links(shipped), shipped.value("steps")) == before


def test_settings_reach_the_node_that_has_them_and_no_other(shipped):
    changed = shipped.setting(steps=5, no_such_widget=1)
    differing = {
        (name, key)
        for name, node in changed.nodes.items()
        for key in node["inputs"].keys() | shipped.nodes[name]["inputs"].keys()
        if node["inputs"].get(key) != shipped.nodes[name]["inputs"].get(key)
    }
    assert len(differing) == 1 and changed.value("steps") == 5


def test_size_of_the_video_does_not_leak_into_the_conditioning(shipped):
    tiny = shipped.with_seeded_conditioning(64, seed=1).setting(width=320, height=192)
    found = [n for n in tiny.nodes.values() if n["class_type"] == "SeededConditioning"]
    assert [n["inputs"]["features"] for n in found] == [4096, 4096]
    assert [n["inputs"]["tokens"] for n in found] == [64, 64]
    assert found[0]["inputs"]["seed"] != found[1]["inputs"]["seed"]


def test_the_tiny_workflow_needs_no_encoder_no_vae_and_has_no_loose_end(shipped):
    tiny = shipped.with_seeded_conditioning(64, seed=1).saving_latent("x")
    kinds = {node["class_type"] for node in tiny.nodes.values()}
    assert not kinds & {"CLIPLoader", "CLIPTextEncode", "VAELoader", "VAEDecode", "SaveVideo"}
    assert PATCH in kinds and "SaveLatent" in kinds
    assert all(source in tiny.nodes for source, _ in links(tiny).values())
    assert links(tiny)["latent", "samples"] == (tiny.sampler, 0)


def test_the_prompt_is_what_leads_into_the_positive_input(shipped):
    positive = shipped.nodes[shipped.linked_from("positive")]
    assert positive["class_type"] == "CLIPTextEncode"
    assert positive["_meta"]["title"] == "Prompt"


def test_a_report_stands_between_the_sampler_and_all_that_followed_it(shipped):
    reported = shipped.reporting(PATCH, "pictures/report")
    sampler = reported.sampler
    report = reported.nodes["report"]["inputs"]
    assert report == {"model": [reported.find(PATCH), 0], "samples": [sampler, 0]}
    followed = [place for place in links(shipped) if links(shipped)[place] == (sampler, 0)]
    assert followed and all(links(reported)[place] == ("report", 0) for place in followed)
    picture = reported.nodes["report_picture"]["inputs"]
    assert picture == {"images": ["report", 1], "filename_prefix": "pictures/report"}
    assert "report" not in shipped.nodes


def test_a_node_that_is_not_there_is_named():
    with pytest.raises(KeyError, match="0 nodes of KSampler or .*SamplerCustomAdvanced"):
        _ = Workflow({}).sampler


def test_a_miniature_is_told_its_prompt_and_the_empty_one(shipped):
    sentence = PROMPTS[2].sentence
    prompted = shipped.with_miniature_prompt(sentence)
    positive, negative = (prompted.linked_from(name) for name in ("positive", "negative"))
    assert prompted.nodes[positive]["inputs"] == {"prompt": sentence}
    assert prompted.nodes[negative]["inputs"] == {"prompt": ""}
    assert "CLIPLoader" not in {node["class_type"] for node in prompted.nodes.values()}


@pytest.mark.parametrize("stem", ["wan_t2v", "cogvideox"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_every_method_has_a_workflow_that_differs_by_its_node_alone(stem, method):
    workflow = method_workflow(WORKFLOWS / "api", stem, method)
    radial = method_workflow(WORKFLOWS / "api", stem, RADIAL)
    node = workflow.find(method.node)
    assert [n["class_type"] for n in workflow.nodes.values() if n["class_type"] in PATCHES] == [
        method.node
    ]
    assert links(workflow) == links(radial) and node == radial.find(PATCH)
