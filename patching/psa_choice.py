"""PatchPSA's inputs as a SparseChoice: which section and preset, and the schedule around it."""

from __future__ import annotations

from typing import Any

from ..psa import ModelFacts, PsaPolicy, PsaPreset, choose_section, find_preset, load_sections
from ..psa.config import unused_by_auto
from ..psa.dense_preset import DensePreset
from ..psa.select import family_of
from .choice import make_choice
from .config_file import find_config_file
from .install import describe_model
from .layout import WAN
from .log import log, shown
from .schedule import MAX_TIMESTEPS
from .settings import SparseChoice, SparsePolicy

AUTO = "auto"
# Beyond the published method, which drops them: most blocks are skipped, so their means matter.
# With most presets this was closer to dense attention on the trained miniatures. On inputs with the
# structure of a video, at the models' sizes, it cut the error to a third (benchmarks/RESULTS.md).
POOL = "pool"
CONFIG_FOLDER, CONFIG_SUFFIXES = "psa", (".yaml", ".yml")


def model_facts(model: Any) -> ModelFacts:
    """What PSA's sections go by, read off a MODEL.

    Raises:
        ValueError: the model is neither WAN nor CogVideoX.
    """
    family, layers = describe_model(model)
    net = model.model.diffusion_model
    patch = net.patch_size[0] if family == WAN else net.patch_embed.patch_size_t or 1
    channels = net.patch_embedding.weight.shape[1] if family == WAN else net.in_channels
    return ModelFacts(
        family=family.lower(),
        dim=net.dim,
        layers=layers,
        latent_channels=model.model.latent_format.latent_channels,
        in_channels=channels,
        patch_size_t=patch,
        has_clip_image=getattr(net, "img_emb", None) is not None,
        network=type(net).__name__,
    )


def choose_preset(model: Any, preset: str, config_file: str) -> tuple[str, PsaPreset]:
    """("section/preset", the preset) for a MODEL.

    Args:
        preset: "auto" for the section that fits the model, or "section/preset".

    Raises:
        ValueError: the file or a preset in it is wrong, or the preset is not known.
    """
    sections = load_sections(find_config_file(config_file, CONFIG_FOLDER, suffixes=CONFIG_SUFFIXES))
    if preset != AUTO:
        section, found = find_preset(sections, preset)
        made_for, family = family_of(section), describe_model(model)[0].lower()
        if made_for not in (None, family) and found.type != "dense":
            log.warning(f"PSA preset {preset} was published for {made_for}; this model is {family}")
        return preset, found
    chosen = choose_section(model_facts(model), sections)
    log.info(f"PSA {chosen.why}")
    unused = unused_by_auto(sections, chosen.section, chosen.preset)
    if unused is not None:
        log.warning(f"PSA {unused}")
    return f"{chosen.section}/{chosen.preset}", sections[chosen.section].presets[chosen.preset]


def psa_choice(
    model: Any,
    *,
    preset: str = AUTO,
    warmup_steps: int = -1,
    config_file: str = "",
    skipped_blocks: str = POOL,
    dense_layers: str = "0",
    **shared: Any,
) -> SparseChoice:
    """The choice PatchPSA's inputs make for a MODEL; the defaults are the node's.

    As published no layer is dense. With presets of mask mode topk a dense first layer is much
    closer: they keep the same share of every layer, also where one needs more
    (docs/measurements.md).

    Args:
        warmup_steps: dense denoising steps, -1 for the preset's own.
        skipped_blocks: "drop", "pool" or "weighted", as in PsaPolicy.
        shared: the inputs of make_choice.

    Raises:
        ValueError: an input is not allowed, in one sentence.
    """
    if type(warmup_steps) is not int or not -1 <= warmup_steps <= MAX_TIMESTEPS:
        raise ValueError(
            f"warmup_steps {shown(warmup_steps)}: allowed are whole numbers from -1 to "
            f"{MAX_TIMESTEPS}"
        )
    label, chosen = choose_preset(model, preset, config_file)
    policy: SparsePolicy
    if chosen.type == "dense":
        policy = DensePreset(label)
    else:
        policy = PsaPolicy.from_preset(chosen, skipped_blocks=skipped_blocks, label=label)
    own_warmup = warmup_steps < 0
    return make_choice(
        model,
        policy,
        dense_timesteps=chosen.warmup_steps if own_warmup else warmup_steps,
        fits_warmup=own_warmup,
        verbose=chosen.verbose,
        dense_layers=dense_layers,
        **shared,
    )
