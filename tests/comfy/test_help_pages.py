"""Help pages: where ComfyUI's page looks for them, complete, and true."""

import asyncio
import itertools
import json
import re
from pathlib import Path

import pytest
import sparse_video_attention
import torch
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.kernels.plan import BLOCK_SIZES
from sparse_video_attention.patching.backend_choice import BUNDLED_CONFIGS, check_type
from sparse_video_attention.patching.frame_calls import frame_plans
from sparse_video_attention.patching.lightx2v import SITE_KEYS, read_lightx2v
from sparse_video_attention.patching.settings import AttentionSite
from sparse_video_attention.psa import ModelFacts, PsaPolicy, choose_section, load_sections
from sparse_video_attention.radial_attn.policy import RadialPolicy
from sparse_video_attention.third_party import DENSE_BACKENDS
from sparse_video_attention.third_party.routing import ENVIRONMENT_VARIABLE, IMPLEMENTATIONS

pytestmark = pytest.mark.comfy

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / sparse_video_attention.WEB_DIRECTORY / "docs"
LANGUAGES = ("en", "zh")


def page(node_id, language):
    """As the page of ComfyUI asks for it: <id>/<language>.md first, then <id>.md."""
    translated = DOCS / node_id / f"{language}.md"
    path = translated if translated.is_file() else DOCS / f"{node_id}.md"
    return path.read_text(encoding="utf-8")


def section(text, number):
    """The numberth part under a second-level heading, from 0."""
    return re.split(r"^## .*$", text, flags=re.MULTILINE)[number + 1]


def fenced(text, language):
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return block


@pytest.fixture(scope="module")
def nodes(comfyui):
    from sparse_video_attention.nodes.extension import SparseVideoAttentionExtension

    return asyncio.run(SparseVideoAttentionExtension().get_node_list())


def test_every_node_has_a_page_in_both_languages(nodes):
    ids = {node.define_schema().node_id for node in nodes}
    assert {path.stem for path in DOCS.glob("*.md")} == ids
    assert {path.parent.name for path in DOCS.glob("*/zh.md")} == ids


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_page_explains_every_input_and_no_other(nodes, language):
    for node in nodes:
        schema = node.define_schema()
        inputs = section(page(schema.node_id, language), 0)
        explained = []
        for line in re.findall(r"^- (\*\*.*)$", inputs, flags=re.MULTILINE):
            # Several inputs may share a line; bold names after the explanation's start do not.
            start = re.match(r"(?:\*\*\w+\*\*(?:（[^）]*）)?(?:, |、)?)+", line)[0]
            explained += re.findall(r"\*\*(\w+)\*\*", start)
        assert explained == [entry.id for entry in schema.inputs if entry.id != "model"]


def test_chinese_pages_use_the_labels_of_the_chinese_interface(nodes):
    labels = json.loads((REPOSITORY / "locales/zh/nodeDefs.json").read_text(encoding="utf-8"))
    for node in nodes:
        node_id = node.define_schema().node_id
        text = page(node_id, "zh")
        assert text.startswith(f"# {labels[node_id]['display_name']}\n")
        for name, texts in labels[node_id]["inputs"].items():
            if name != "model":
                assert f"**{name}**（{texts['name']}）" in text


@pytest.mark.parametrize("language", LANGUAGES)
def test_example_preset_file_loads_and_auto_takes_it(language, tmp_path):
    file = tmp_path / "my_presets.yaml"
    file.write_text(fenced(page("PatchPSA", language), "yaml"), encoding="utf-8")
    sections = load_sections(file)
    facts = ModelFacts(family="wan", dim=5120, layers=40)
    chosen = choose_section(facts, sections)
    assert (chosen.section, chosen.preset) == ("Wan2.1_14b", "closer")
    preset = sections["Wan2.1_14b"].presets["closer"]
    policy = PsaPolicy.from_preset(preset)
    assert (policy.block_m, policy.block_n, policy.rearrange_method) == (128, 64, "Gilbert")
    assert policy.levels == (1, 2, 4, 8)
    assert preset.warmup_steps == 10
    bundled = load_sections()
    assert {name: set(s.presets) for name, s in sections.items()} == {
        name: set(s.presets) | ({"closer"} if name == "Wan2.1_14b" else set())
        for name, s in bundled.items()
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_table_of_presets_is_the_bundled_file(language):
    rows = re.findall(r"^\| `(\S+)` \| [^|]* \| ([^|]*) \|$", page("PatchPSA", language), re.M)
    assert {name: re.findall(r"`(\w+)`", presets) for name, presets in rows} == {
        name: [preset for preset, value in found.presets.items() if value.type == "psa"]
        for name, found in load_sections().items()
    }


def test_auto_and_wan_2_2_a14b_are_as_described():
    text_to_video = ModelFacts(family="wan", dim=5120, layers=40)
    image_to_video = ModelFacts(family="wan", dim=5120, layers=40, in_channels=36)
    assert choose_section(text_to_video).section == "Wan2.1_14b"
    assert choose_section(image_to_video).section == "Wan2.2_A14B"


@pytest.mark.parametrize("language", LANGUAGES)
def test_densities_on_the_psa_page_follow_from_the_presets(language):
    sections = load_sections()

    def density(name, preset):
        ratios = sections[name].presets[preset].mask_ratios
        assert sections[name].presets[preset].mask_mode == "topk"
        return sum((ratios[level][1] - ratios[level][0]) / level for level in (1, 2, 4, 8))

    assert density("CogVideo_5b", "psa_balanced") == pytest.approx(0.15)
    assert density("CogVideo1.5_5b", "psa_balanced") == pytest.approx(0.15)
    assert density("Wan2.1_1.3b", "psa_topk") == pytest.approx(0.10)
    presets = section(page("PatchPSA", language), 1)
    assert re.findall(r"(\d+) %", presets) == ["15", "10"]
    assert BLOCK_SIZES[0] == 16 and BLOCK_SIZES[-1] == 256


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_on_the_radial_page_follow_from_the_mask(language):
    text = page("PatchRadialAttention", language)
    small, large = TokenLayout(21, 30, 52), TokenLayout(21, 45, 80)
    cogvideox = TokenLayout(13, 30, 45, prefix_tokens=226)
    for settings, layout, percent in (
        ({}, small, "35 %"),
        ({}, large, "27 %"),
        ({"block_size": 64}, small, "28 %"),
        ({"block_size": 64}, large, "25"),
        ({"decay_factor": 0.8}, small, "42"),
        ({"decay_factor": 0.8}, large, "37 %"),
        ({}, cogvideox, "47 %"),
    ):
        # Of the mask itself, and a key for each block that it skips.
        plan = RadialPolicy(**settings).static_plan(layout, "cpu")
        kept = float((plan.to_levels() == 1).float().mean())
        density = kept + (1 - kept) / plan.block_n
        assert f"{density * 100:.0f}" == percent.removesuffix(" %") and percent in text
    # Animate 2 has one frame more, the reference.
    for grid, percent in (((22, 30, 52), "42 %"), ((22, 45, 80), "32 %")):
        plans = frame_plans(RadialPolicy(), TokenLayout(*grid), torch.device("cpu")).calls
        density = sum(plan.density() for plan in plans) / len(plans)
        assert f"{density * 100:.0f} %" == percent and percent in text
    for block_size, fewest in ((128, 43), (64, 22)):
        policy = RadialPolicy(block_size)
        assert policy.dense_reason(TokenLayout(9, 1, fewest)) is None
        assert policy.dense_reason(TokenLayout(9, 1, fewest - 1)) is not None
        assert policy.dense_reason(TokenLayout(1, 30, 52)) is not None
        assert re.search(rf"(?<!\d){fewest}(?!\d)", text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_lightx2v_example_is_read(language, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(fenced(page("SetAttentionBackend", language), "json"), encoding="utf-8")
    config = read_lightx2v(file)
    assert set(config.types) == set(SITE_KEYS) and not config.ignored
    for site in AttentionSite:
        assert check_type(site, config.types[site.value]) == "flash_attn3"
    assert config.sparge and config.sparge_ckpt == ""


@pytest.mark.parametrize("language", LANGUAGES)
def test_backends_and_their_installation_are_those_of_the_adapters(language):
    text = page("SetAttentionBackend", language)
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.M))
    assert list(rows) == list(DENSE_BACKENDS)
    for name, backend in DENSE_BACKENDS.items():
        commands = re.findall(r"`(pip install [^`]*)`", rows[name])
        if name == "triton_int8":
            # Which release, the PyTorch of a machine says.
            assert commands == [] and "`install.py`" in rows[name]
        elif backend.library is None:
            assert commands == []
        elif "pip install " in backend.library.linux and "clone" not in backend.library.linux:
            assert commands != []
        for command in commands:
            assert command in f"{backend.library.linux} {backend.library.windows}"
    assert f"`{ENVIRONMENT_VARIABLE}`" in text
    assert set(IMPLEMENTATIONS) <= set(re.findall(r"`(\w+)`", text))
    for file in BUNDLED_CONFIGS.glob("*.json"):
        assert f"`{file.name}`" in text


@pytest.fixture(scope="module")
def measured_rows():
    """Of the miniatures' settings those whose errors were measured, by (family, prompt)."""
    rows = {}
    for path in (REPOSITORY / "benchmarks/results").glob("*/quality_*_fine.json"):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            if "error" in row:
                rows.setdefault((row["family"], row["prompt"]), []).append(row)
    assert {family for family, _ in rows} == {"wan", "cogvideox"} and len(rows) == 4
    return rows


@pytest.mark.parametrize("language", LANGUAGES)
def test_decibels_of_measured_errors_are_those_of_the_results(language, measured_rows):
    text = page("MeasureAttentionError", language)
    table = re.findall(r"^\| (0\.\d+) to (0\.\d+) \| (\d+) to (\d+) \|$", text, flags=re.M)
    bands = [tuple(map(float, band)) for band in table]
    held = {band: [] for band in bands}
    for row in (row for rows in measured_rows.values() for row in rows):
        (band,) = [band for band in bands if band[0] <= row["error"] <= band[1]]
        held[band].append(row["psnr_db"])
    for (_, _, low, high), decibels in held.items():
        assert low <= min(decibels) < low + 1 and high - 1 < max(decibels) <= high


@pytest.mark.parametrize("language", LANGUAGES)
def test_pairs_of_measured_errors_are_those_of_the_results(language, measured_rows):
    pairs = [pair for rows in measured_rows.values() for pair in itertools.combinations(rows, 2)]
    astray = [
        sorted((a["error"], b["error"]))
        for a, b in pairs
        if (a["error"] < b["error"]) != (a["psnr_db"] > b["psnr_db"])
    ]
    assert {str(len(pairs)), str(len(pairs) - len(astray))} <= set(
        re.findall(r"\d+", page("MeasureAttentionError", language))
    )
    assert len(astray) == 4 and all(larger < 1.2 * smaller for smaller, larger in astray)
