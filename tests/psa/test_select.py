"""The section of presets that a model gets, and what is said about it."""

import dataclasses

import pytest
from sparse_video_attention.psa import ModelFacts, choose_section, load_sections

FUN_CONTROL = {"in_channels": 52}
MODELS = {
    "wan2.1-1.3b": (ModelFacts("wan", 1536, 30), "Wan2.1_1.3b"),
    "wan2.1-1.3b-inpaint": (
        ModelFacts("wan", 1536, 30, in_channels=36, has_clip_image=True),
        "Wan2.1_1.3b",
    ),
    "wan2.1-14b-i2v": (
        ModelFacts("wan", 5120, 40, in_channels=36, has_clip_image=True),
        "Wan2.1_14b",
    ),
    "wan2.2-a14b-i2v": (ModelFacts("wan", 5120, 40, in_channels=36), "Wan2.2_A14B"),
    "wan2.2-a14b-fun": (ModelFacts("wan", 5120, 40, **FUN_CONTROL), "Wan2.2_A14B"),
    "humo-17b": (
        ModelFacts("wan", 5120, 40, in_channels=36, network="HumoWanModel"),
        "Wan2.1_14b",
    ),
    "wan2.2-5b": (ModelFacts("wan", 3072, 30, 48, 48), "Wan2.2_5B"),
    "cogvideox-5b": (ModelFacts("cogvideox", 3072, 42), "CogVideo_5b"),
    "cogvideox-5b-i2v": (ModelFacts("cogvideox", 3072, 42, in_channels=32), "CogVideo_5b"),
    "cogvideox1.5-5b": (ModelFacts("cogvideox", 3072, 42, patch_size_t=2), "CogVideo1.5_5b"),
}


@pytest.mark.parametrize("name", MODELS)
def test_published_model_gets_its_section(name):
    facts, section = MODELS[name]
    choice = choose_section(facts)
    assert (choice.section, choice.preset) == (section, "psa_balanced")
    assert "nearest" not in choice.why
    assert f"{section}/psa_balanced" in choice.why


def test_text_to_video_14b_says_how_to_pick_the_other():
    choice = choose_section(ModelFacts("wan", 5120, 40))
    assert choice.section == "Wan2.1_14b"
    assert "cannot be told apart" in choice.why
    assert "choose the preset Wan2.2_A14B/psa_balanced" in choice.why


NEAREST = {
    "cogvideox-2b": (ModelFacts("cogvideox", 1920, 30), "CogVideo_5b", "CogVideoX 5B"),
    "tiny-wan": (ModelFacts("wan", 256, 4), "Wan2.1_1.3b", "WAN 2.1 1.3B"),
    "tiny-wan-48": (ModelFacts("wan", 256, 4, 48, 48), "Wan2.2_5B", "WAN 2.2 5B"),
    "wan-20b": (ModelFacts("wan", 5120, 60), "Wan2.1_14b", "WAN 2.1 14B"),
    "tiny-cogvideox-1.5": (
        ModelFacts("cogvideox", 128, 3, patch_size_t=2),
        "CogVideo1.5_5b",
        "CogVideoX 1.5 5B",
    ),
}


@pytest.mark.parametrize("name", NEAREST)
def test_other_model_gets_the_nearest_section_and_is_told(name):
    facts, section, nearest = NEAREST[name]
    choice = choose_section(facts)
    assert choice.section == section
    assert f"width {facts.dim} with {facts.layers} layers; {nearest} (" in choice.why


def test_default_attention_of_the_section_is_used():
    sections = load_sections()
    sections["Wan2.1_1.3b"] = dataclasses.replace(
        sections["Wan2.1_1.3b"], default_attention="psa_topk"
    )
    assert choose_section(ModelFacts("wan", 1536, 30), sections).preset == "psa_topk"


def test_unsupported_family_is_refused():
    with pytest.raises(ValueError, match="family 'flux' has no PSA presets.*cogvideox, wan"):
        choose_section(ModelFacts("flux", 3072, 19))
