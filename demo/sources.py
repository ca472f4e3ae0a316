"""A family's weights and workflows: the user's own files, the trained miniature, or tiny ones."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from devtools.environment import ROOT
from devtools.progress import Step
from miniature.weights import weights_path

from .comparison import Weights
from .families import Family
from .methods import METHODS, Method, method_workflow
from .workflow import Workflow

API_FORMS = ROOT / "workflows" / "api"
# WAN's own length at a size that a CPU samples in seconds; enough tokens to be sparse.
SMALL_SIZE = {"width": 320, "height": 192, "length": 81}
SMALL_STEPS = 10
# Presets of PSA wait longer than that, Sparge one step.
SMALL_WARMUP = SMALL_STEPS // 4
# Of so small a frame a block is a quarter or more: few of them are a small choice.
SMALL_SPARGE = {"topk": 0.5}

# What large models are sampled with drives a miniature's colours out of range.
MINIATURE_GUIDANCE = 3.0


def _link_or_copy(source: Path, target: Path) -> None:
    """As little of a copy as this machine allows: weights are tens of GB."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Windows asks a privilege for the first, and one drive for the second.
    for link in (os.symlink, os.link):
        try:
            link(source, target)
            return
        except OSError:
            continue
    shutil.copyfile(source, target)


def weights_of(family: Family, options: argparse.Namespace) -> Weights:
    """The user's if given, else the trained ones if they are in the repository and wanted."""
    if options.unet is not None:
        return "real"
    return "miniature" if not options.tiny and weights_path(family.key).is_file() else "tiny"


def small_workflows(
    family: Family, base: Path, options: argparse.Namespace
) -> list[tuple[Method, Workflow]]:
    """Without encoder and VAE: the miniature where it is at hand, else tiny random weights."""
    weights = weights_of(family, options)
    name = f"{weights}_{family.key}.safetensors"
    path = base / "models" / "diffusion_models" / name
    if weights == "miniature":
        _link_or_copy(weights_path(family.key), path)
    else:
        with Step(f"Making tiny {family.title} weights"):
            family.make_checkpoint(path)

    def small(workflow: Workflow, method: Method) -> Workflow:
        if weights == "miniature":
            workflow = workflow.with_miniature_prompt(family.prompt.sentence)
            workflow = workflow.setting(cfg=MINIATURE_GUIDANCE)
        else:
            workflow = workflow.with_seeded_conditioning(family.text_tokens, seed=1)
        return (
            workflow.saving_latent(f"{family.key}/{method.key}")
            .setting(unet_name=name, steps=SMALL_STEPS, **SMALL_SIZE)
            .setting(dense_timesteps=-1, last_dense_timesteps=0, warmup_steps=SMALL_WARMUP)
            .setting(**SMALL_SPARGE)
            .setting(seed=options.seed, noise_seed=options.seed)
        )

    shipped = [(m, method_workflow(API_FORMS, family.workflow, m)) for m in METHODS]
    return [(method, small(workflow, method)) for method, workflow in shipped]


def real_workflows(
    family: Family, base: Path, options: argparse.Namespace
) -> list[tuple[Method, Workflow]]:
    """The shipped workflows with the user's weights and prompt; sizes only where given."""
    models = base / "models"
    _link_or_copy(options.unet, models / "diffusion_models" / options.unet.name)
    _link_or_copy(options.clip, models / "text_encoders" / options.clip.name)
    _link_or_copy(options.vae, models / "vae" / options.vae.name)
    given = {
        name: getattr(options, name)
        for name in ("width", "height", "length", "steps")
        if getattr(options, name) is not None
    }

    def real(workflow: Workflow) -> Workflow:
        workflow = workflow.setting(
            unet_name=options.unet.name,
            clip_name=options.clip.name,
            vae_name=options.vae.name,
            seed=options.seed,
            noise_seed=options.seed,
            **given,
        )
        prompt = workflow.linked_from("positive")
        workflow.nodes[prompt]["inputs"]["text"] = options.prompt
        return workflow

    shipped = [(m, method_workflow(API_FORMS, family.workflow, m)) for m in METHODS]
    return [
        (method, real(workflow).saving_frames(f"{family.key}/{method.key}"))
        for method, workflow in shipped
    ]
