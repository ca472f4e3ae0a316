"""The check of other packs, which the suite has none of, on a pack made up for it."""

import asyncio
from itertools import count

import pytest
import torch

from .other_packs import check
from .pack_trials import SHAPE, Trial, call_node, ksampler, load_packs, on_model, sampler_node

pytestmark = [pytest.mark.comfy, pytest.mark.slow]

PACK = """
from types import MethodType

import nodes


class OnModel:
    RETURN_TYPES, FUNCTION = ("MODEL",), "apply"

    @classmethod
    def INPUT_TYPES(cls):
        kinds = ["nothing", "own attention", "error"]
        return {"required": {"model": ("MODEL",), "kind": (kinds,)}}

    def apply(self, model, kind):
        if kind == "error":
            raise RuntimeError("as made")
        model = model.clone()
        if kind == "own attention":
            for i, block in enumerate(model.model.diffusion_model.blocks):
                forward = MethodType(lambda self, x, *args, **kwargs: self.o(x), block.self_attn)
                model.add_object_patch(f"diffusion_model.blocks.{i}.self_attn.forward", forward)
        return (model,)


class TwoSamplers:
    RETURN_TYPES, FUNCTION = ("LATENT",), "sample"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "high": ("MODEL",), "low": ("MODEL",), "steps": ("INT", {"default": 20}),
                "seed": ("INT", {"default": 1}), "at": ("INT", {"default": 3}),
                "positive": ("CONDITIONING",), "negative": ("CONDITIONING",),
                "latent_image": ("LATENT",),
            }
        }

    def sample(self, high, low, steps, seed, at, positive, negative, latent_image):
        given = (positive, negative)
        how = (seed, steps, 3.0, "euler", "simple", *given)
        node = nodes.KSamplerAdvanced()
        first = node.sample(high, "enable", *how, latent_image, 0, at, "enable")[0]
        return node.sample(low, "disable", *how, first, at, steps, "disable")


NODE_CLASS_MAPPINGS = {"MadeUpOnModel": OnModel, "MadeUpTwoSamplers": TwoSamplers}
"""


@pytest.fixture(scope="module")
def host_nodes(comfyui, tmp_path_factory):
    import nodes

    folder = tmp_path_factory.mktemp("custom_nodes")
    (folder / "Made-Up").mkdir()
    (folder / "Made-Up" / "__init__.py").write_text(PACK, encoding="utf-8")
    (folder / "Switched-Off.disabled").mkdir()
    (folder / "Switched-Off.disabled" / "__init__.py").write_text(PACK, encoding="utf-8")
    (folder / "no-pack").mkdir()
    (folder / "one_file.py").write_text("NODE_CLASS_MAPPINGS = {}", encoding="utf-8")
    (folder / "Broken").mkdir()
    (folder / "Broken" / "__init__.py").write_text("import nothing_of_this_name", encoding="utf-8")
    loop = asyncio.new_event_loop()
    assert load_packs(folder, loop) == (["Made-Up", "one_file.py"], ["Broken"])
    yield nodes.NODE_CLASS_MAPPINGS
    loop.close()
    for name in ("MadeUpOnModel", "MadeUpTwoSamplers"):
        del nodes.NODE_CLASS_MAPPINGS[name]


@pytest.fixture
def tried(host_nodes, load_model, install_band):
    """tried(trial, node_comes): the check of a node."""
    return lambda trial, comes: check(trial, lambda: load_model("wan"), install_band, comes)


@pytest.mark.parametrize("comes", ["first", "last"])
def test_nodes_that_leave_attention_alone_pass(tried, comes):
    tried(on_model("MadeUpOnModel"), comes)
    tried(sampler_node("MadeUpTwoSamplers", ("high", "low"), at=2), comes)


def test_one_that_leaves_out_steps_it_should_run_does_not(tried):
    with pytest.raises(AssertionError):
        tried(on_model("MadeUpOnModel", steps=frozenset({0, 1, 2})), "last")


def test_one_that_does_other_things_with_everything_kept_does_not(tried):
    use = count(1)
    drifting = Trial("made up", sample=lambda model: ksampler(model) * (1 + 0.02 * next(use)))
    with pytest.raises(AssertionError, match="density 1.000"):
        tried(drifting, "last")


def test_one_that_sparse_attention_does_not_reach_does_not(tried):
    blind = Trial("made up", sample=lambda model: torch.ones_like(ksampler(model)))
    with pytest.raises(AssertionError, match="sparse attention changed nothing"):
        tried(blind, "last")


def test_one_that_attends_by_itself_is_expected_to_be_named(tried):
    with pytest.raises(pytest.xfail.Exception, match="as forward of the blocks' self_attn took"):
        tried(on_model("MadeUpOnModel", kind="own attention"), "last")


def test_one_that_fails_alone_is_skipped(tried):
    with pytest.raises(
        pytest.skip.Exception, match="fails without this pack too: RuntimeError: as made"
    ):
        tried(on_model("MadeUpOnModel", kind="error"), "first")


def test_inputs_are_the_nodes_own_defaults_but_for_those_given(host_nodes, load_model):
    model = load_model("wan")
    assert call_node("MadeUpOnModel", model=model)[0] is not model
    latent = call_node("EmptyHunyuanLatentVideo", width=160, height=128, length=17)[0]["samples"]
    assert tuple(latent.shape) == SHAPE
