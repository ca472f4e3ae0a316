"""Nodes of other packs beside this pack's: which, and how one is tried."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STEPS, SHAPE, TEXT_TOKENS = 6, (1, 16, 5, 16, 20), 40


def load_packs(folder: Path, loop: asyncio.AbstractEventLoop) -> tuple[list[str], list[str]]:
    """Load the packs in a custom_nodes folder, as ComfyUI's start does.

    Returns:
        The names of those that it took and of those that it did not.
    """
    import server

    import nodes

    if getattr(server.PromptServer, "instance", None) is None:
        server.PromptServer.instance = server.PromptServer(loop)

    async def load() -> tuple[list[str], list[str]]:
        await nodes.init_builtin_extra_nodes()
        own = set(nodes.NODE_CLASS_MAPPINGS)
        packs = [path for path in sorted(folder.iterdir()) if _is_pack(path)]
        taken = [path for path in packs if await nodes.load_custom_node(str(path), ignore=own)]
        return [path.name for path in taken], [path.name for path in packs if path not in taken]

    return loop.run_until_complete(load())


def _is_pack(path: Path) -> bool:
    if path.name.endswith(".disabled") or path.name.startswith(("__", ".")):
        return False
    return path.suffix == ".py" or (path / "__init__.py").is_file()


def call_node(name: str, **inputs: Any) -> tuple[Any, ...]:
    """What a node gives for some inputs and its own defaults for the others."""
    import nodes

    node = nodes.NODE_CLASS_MAPPINGS[name]
    listed = node.INPUT_TYPES()
    given = {}
    for key, (kind, *options) in (listed["required"] | listed.get("optional", {})).items():
        options = options[0] if options else {}
        if "default" in options:
            given[key] = options["default"]
        elif isinstance(kind, list | tuple) and kind:
            given[key] = kind[0]
    given |= inputs
    if hasattr(node, "define_schema"):
        return node.execute(**given).result
    return getattr(node(), node.FUNCTION)(**given)


def prompts() -> tuple[Any, Any]:
    """(positive, negative), as nodes hand them on."""
    generator = torch.Generator().manual_seed(7)
    texts = torch.randn(2, 1, TEXT_TOKENS, 4096, generator=generator)
    return tuple([[text, {}]] for text in texts)


def ksampler(model: Any, sampler: str = "euler", **how: Any) -> torch.Tensor:
    """The latent of ComfyUI's KSampler."""
    import nodes

    how = {"steps": STEPS, "cfg": 3.0, "scheduler": "simple", "seed": 7, "denoise": 1.0} | how
    positive, negative = prompts()
    node = nodes.KSampler()
    out = node.sample(
        model,
        sampler_name=sampler,
        positive=positive,
        negative=negative,
        latent_image=empty(),
        **how,
    )
    return out[0]["samples"]


def custom(model: Any, sampler: Any) -> torch.Tensor:
    """The latent of SamplerCustom with a SAMPLER that a node gave."""
    from comfy.samplers import calculate_sigmas
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    sigmas = calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    positive, negative = prompts()
    node = SamplerCustom.execute(model, True, 7, 3.0, positive, negative, sampler, sigmas, empty())
    return node.result[0]["samples"]


def empty() -> dict[str, torch.Tensor]:
    return {"samples": torch.zeros(SHAPE)}


@dataclass(frozen=True)
class Trial:
    """A node of another pack.

    Attributes:
        node: its name in graphs; tried where a pack has it.
        apply: (MODEL) -> MODEL with the node applied.
        sample: (MODEL) -> the latent that it makes, or that KSampler makes.
        steps: that the model is called for, where a cache leaves some out.
        same: how far apart results may be that differ by rounding.
    """

    node: str
    apply: Callable[[Any], Any] = lambda model: model
    sample: Callable[[Any], torch.Tensor] = ksampler
    steps: frozenset[int] = frozenset(range(STEPS))
    # Some run in part in 16 bits.
    same: float = 5e-3


def on_model(
    node: str,
    *,
    steps: frozenset[int] = Trial.steps,
    same: float = Trial.same,
    cfg: float = 3.0,
    **inputs: Any,
) -> Trial:
    """A node that takes a MODEL and gives one; functions among its inputs are called for them."""

    def apply(model: Any) -> Any:
        made = {key: value() if callable(value) else value for key, value in inputs.items()}
        return call_node(node, model=model, **made)[0]

    return Trial(node, apply, lambda model: ksampler(model, cfg=cfg), steps, same)


def sampler_node(node: str, models: tuple[str, ...] = ("model",), **inputs: Any) -> Trial:
    """A node that samples, with all its models the same."""

    def sample(model: Any) -> torch.Tensor:
        positive, negative = prompts()
        prompted = {"positive": positive, "negative": negative, "latent_image": empty()}
        given = prompted | dict.fromkeys(models, model) | {"steps": STEPS, "seed": 7} | inputs
        return call_node(node, **given)[0]["samples"]

    return Trial(node, sample=sample)


def around_sampler(node: str) -> Trial:
    """A node that takes a SAMPLER and gives one."""

    def sample(model: Any) -> torch.Tensor:
        from comfy.samplers import ksampler as by_name

        return custom(model, call_node(node, sampler=by_name("euler", {}))[0])

    return Trial(node, sample=sample)


def named_sampler(node: str, sampler: str) -> Trial:
    """A sampler that a pack adds to KSampler's list, beside its node."""
    return Trial(node, sample=lambda model: ksampler(model, sampler))


EXPERTS = ("model_high_noise", "model_low_noise")
# What people use with WAN. Caches are set so that they leave nothing out, or said what.
TRIALS = {
    "KJNodes: Sage attention": on_model("PathchSageAttentionKJ", sage_attention="auto"),
    "KJNodes: NAG": on_model("WanVideoNAG", conditioning=lambda: prompts()[1]),
    "KJNodes: NAG without guidance": on_model(
        "WanVideoNAG", cfg=1.0, conditioning=lambda: prompts()[1]
    ),
    "KJNodes: enhance a video": on_model("WanVideoEnhanceAVideoKJ", latent=empty),
    "KJNodes: feed-forward in chunks": on_model("WanChunkFeedForward", dim_threshold=100),
    "KJNodes: RifleX": on_model("ApplyRifleXRoPE_WanVideo", latent=empty, k=2),
    "KJNodes: CFG zero star": on_model("CFGZeroStarAndInit"),
    "KJNodes: torch.compile, WAN": on_model("TorchCompileModelWanVideoV2"),
    "KJNodes: torch.compile": on_model("TorchCompileModelAdvanced"),
    "TeaCache": on_model(
        "TeaCache", model_type="wan2.1_t2v_1.3B", rel_l1_thresh=0.01, cache_device="cpu"
    ),
    "MagCache": on_model("MagCache", magcache_thresh=0.0),
    "Cache-DiT, WAN": on_model(
        "WanCacheOptimizer", warmup_steps=2, skip_interval=2, steps=frozenset({0, 1, 3, 5})
    ),
    "Spectrum, WAN": on_model("SpectrumApplyWAN", steps=frozenset(range(5))),
    # It chooses values by comparing them, so that rounding changes the choice.
    "Skimmed CFG": on_model("Skimmed CFG", same=2e-2),
    "Detail Daemon": around_sampler("DetailDaemonSamplerNode"),
    "RES4LYF: res_2s": named_sampler("ClownsharKSampler_Beta", "res_2s"),
    "RES4LYF: res_3m": named_sampler("ClownsharKSampler_Beta", "res_3m"),
    "RES4LYF: Clownshark": sampler_node("ClownsharKSampler_Beta"),
    "Wan MoE KSampler": sampler_node("WanMoeKSampler", EXPERTS),
}
