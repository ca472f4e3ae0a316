"""SetAttentionBackend's inputs as settings: a backend per site, or a sparse method for self."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..radial_attn import RadialPolicy
from ..third_party import DENSE_BACKENDS
from ..third_party.routing import ENVIRONMENT_VARIABLE, IMPLEMENTATIONS
from .choice import make_choice
from .config_file import find_config_file, plain_path
from .exact_calls import EXACT_BY_DEFAULT, ExactCalls
from .install import describe_model
from .layout import model_family
from .lightx2v import LightX2VConfig, read_lightx2v
from .log import log, shown
from .psa_choice import AUTO, psa_choice
from .schedule import resolve_layers
from .settings import FASTEST, AttentionSettings, AttentionSite, DenseChoice, SparseChoice
from .sparge_choice import NO_CHECKPOINT, checkpoint_stamp, sparge_choice

SPARSE_TYPES = ("radial_attn", "psa", "sparge_attn")
# LightX2V's guide names Sparge after its checkpoint.
_OTHER_NAMES = {"sparge_ckpt": "sparge_attn", "sparge": "sparge_attn"}
ON_UNAVAILABLE = ("fallback", "error")
OTHER_CHOICE = "an earlier node's choice, else ComfyUI's own"
CONFIG_FOLDER, CONFIG_SUFFIXES = "attention_configs", (".json",)
BUNDLED_CONFIGS = Path(__file__).resolve().parent.parent / "workflows" / "configs"


def type_names(site: AttentionSite) -> list[str]:
    """What a site's input offers, whether it can run on this machine or not."""
    sparse = SPARSE_TYPES if site is AttentionSite.SELF else ()
    return [AUTO, FASTEST, *DENSE_BACKENDS, *sparse]


def check_type(site: AttentionSite, name: str) -> str:
    """The type's own name.

    Raises:
        ValueError: no such type, or a sparse one where there is no video to be sparse over.
    """
    if not isinstance(name, str):
        raise ValueError(f"{site.value} {shown(name)}: expected the name of a backend")
    known = _OTHER_NAMES.get(name, name)
    if known in SPARSE_TYPES and site is not AttentionSite.SELF:
        raise ValueError(
            f"{site.value} {name!r}: radial_attn, psa and sparge_attn work in self-attention "
            f"only; allowed here are {', '.join(type_names(site))}"
        )
    if known not in type_names(site):
        raise ValueError(f"{site.value} {shown(name)}: allowed are {', '.join(type_names(site))}")
    return known


def _sparse(model: Any, name: str, sparge_ckpt: str) -> SparseChoice:
    """A sparse method with the defaults of its own node."""
    describe_model(model)
    if name == "radial_attn":
        return make_choice(model, RadialPolicy(), dense_layers="0")
    if name == "psa":
        return psa_choice(model)
    return sparge_choice(model, sparge_ckpt=sparge_ckpt or NO_CHECKPOINT)


class _Asked(NamedTuple):
    """A backend for a place. by: the file or variable that names it, "" for the node's input."""

    site: AttentionSite
    name: str
    by: str


def _unavailable(asked: Iterable[_Asked], on_unavailable: str) -> dict[str, str]:
    """What a run's line says of each backend that cannot run here, once for all its places.

    The log gets what to do about it as well.

    Raises:
        ValueError: there is one, and on_unavailable is "error".
    """
    places: dict[tuple[str, str], list[str]] = {}
    for site, name, by in asked:
        if name != FASTEST:
            places.setdefault((name, by), []).append(site.value)
    said: dict[str, str] = {}
    for (name, by), sites in places.items():
        backend = DENSE_BACKENDS[name]
        reason = backend.unavailable()
        if reason is None:
            continue
        where = ", ".join(sites) + (f" ({by})" if by else "")
        if on_unavailable == "error":
            raise ValueError(f"{where} {name!r} cannot run here: {reason}")
        falls_back = f"{name} for {where} falls back to {OTHER_CHOICE}"
        log.warning(f"{falls_back}: {reason}")
        more = f"{said[name]}; " if name in said else ""
        said[name] = f"{more}{falls_back}: {backend.unavailable_in_short()}"
    return said


def _from_environment() -> str | None:
    """The backend DIFFSYNTH_ATTENTION_IMPLEMENTATION names, None if it is not set.

    Raises:
        ValueError: there is no backend of that name.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE, "").lower()
    if not name:
        return None
    backend = IMPLEMENTATIONS.get(name, name)
    if backend not in (FASTEST, *DENSE_BACKENDS):
        known = ", ".join(dict.fromkeys([*IMPLEMENTATIONS, FASTEST, *DENSE_BACKENDS]))
        raise ValueError(f"{ENVIRONMENT_VARIABLE} {name!r}: allowed are {known}")
    return backend


def read_config(config_file: str) -> tuple[LightX2VConfig, str] | None:
    """What the file of a config_file input says, its types by their own names, and its name.

    Returns:
        None for an empty input.

    Raises:
        ValueError: there is no such file, or something in it is not allowed; naming the file.
    """
    path = find_config_file(
        config_file, CONFIG_FOLDER, suffixes=CONFIG_SUFFIXES, bundled=BUNDLED_CONFIGS
    )
    if path is None:
        return None
    config = read_lightx2v(path)
    try:
        types = {key: check_type(AttentionSite(key), name) for key, name in config.types.items()}
    except ValueError as error:
        raise ValueError(f"config_file {path.name!r}: {error}") from None
    return replace(config, types=types), path.name


def backend_settings(
    model: Any,
    *,
    self_attn_1_type: str = AUTO,
    cross_attn_1_type: str = AUTO,
    cross_attn_2_type: str = AUTO,
    config_file: str = "",
    on_unavailable: str = "fallback",
    exact_timesteps: int = -1,
    last_exact_timesteps: int = -1,
    exact_layers: str = "",
) -> AttentionSettings:
    """The settings SetAttentionBackend's inputs make for a MODEL.

    An input that is not "auto" wins over the configuration file. Where nothing is chosen at all,
    DIFFSYNTH_ATTENTION_IMPLEMENTATION is.

    Raises:
        ValueError: an input or the file is wrong, or with on_unavailable "error" a backend
            cannot run here; one sentence.
    """
    if on_unavailable not in ON_UNAVAILABLE:
        raise ValueError(
            f"on_unavailable {on_unavailable!r}: allowed are {', '.join(ON_UNAVAILABLE)}"
        )
    given = {
        AttentionSite.SELF: self_attn_1_type,
        AttentionSite.CROSS_TEXT: cross_attn_1_type,
        AttentionSite.CROSS_IMAGE: cross_attn_2_type,
    }
    inputs = {site: check_type(site, name) for site, name in given.items()}
    types, sparse, sparge_ckpt, by = inputs, None, "", ""
    read = read_config(config_file)
    if read is not None:
        config, by = read
        types, sparse = _with_config(inputs, config, by)
        sparge_ckpt = config.sparge_ckpt
    own = types[AttentionSite.SELF]
    sparse = sparse or (own if own in SPARSE_TYPES else None)
    wanted = types | {AttentionSite.SELF: AUTO if own in SPARSE_TYPES else own}
    if sparse is None and set(wanted.values()) == {AUTO}:
        wanted, by = dict.fromkeys(wanted, _from_environment() or AUTO), ENVIRONMENT_VARIABLE
    asked = [
        _Asked(site, name, by if inputs[site] == AUTO else "")
        for site, name in wanted.items()
        if name != AUTO
    ]
    if asked and by == ENVIRONMENT_VARIABLE:
        log.info(f"{by} chooses {asked[0].name} for {', '.join(site.value for site in wanted)}")
    exact = ExactCalls(exact_timesteps, last_exact_timesteps, _layers(model, exact_layers))
    unable = _unavailable(asked, on_unavailable)
    able = tuple((site, name) for site, name, _ in asked if name not in unable)
    return AttentionSettings(
        sparse=None if sparse is None else _sparse(model, sparse, sparge_ckpt),
        dense=DenseChoice(able, tuple(unable.values()), _exact(able, exact)),
    )


def _exact(
    able: Iterable[tuple[AttentionSite, str]], exact: ExactCalls
) -> tuple[tuple[AttentionSite, ExactCalls], ...]:
    """Where a node's exact calls hold: with its own backends and, if they are not the default
    ones, with those of earlier nodes that it keeps."""
    sites = [site for site, _ in able] if exact == EXACT_BY_DEFAULT else AttentionSite
    return tuple((site, exact) for site in sites)


def _layers(model: Any, exact_layers: str) -> frozenset[int]:
    """The layers of a MODEL that a list names.

    Raises:
        ValueError: it cannot be read, or the model has no such layers.
    """
    if not exact_layers:
        return frozenset()
    network = model.model.diffusion_model
    if model_family(network) is None:
        raise ValueError(
            f"exact_layers {shown(exact_layers)}: the layers of a {type(network).__name__} cannot "
            "be counted here; leave it empty"
        )
    return resolve_layers(exact_layers, len(network.blocks), name="exact_layers")


def _with_config(
    inputs: dict[AttentionSite, str], config: LightX2VConfig, file_name: str
) -> tuple[dict[AttentionSite, str], str | None]:
    """(the types of inputs and, where those are auto, of a file; the sparse method by its sparge).

    Raises:
        ValueError: the file names two sparse methods for one place.
    """
    if config.ignored:
        ignored = ", ".join(config.ignored)
        log.info(f"{file_name}: keys not about attention are ignored: {ignored}")
    types = {
        site: config.types.get(site.value, AUTO) if name == AUTO else name
        for site, name in inputs.items()
    }
    own = types[AttentionSite.SELF]
    if config.sparge and inputs[AttentionSite.SELF] == AUTO:
        # The dense type beside it serves the calls that stay dense.
        if own in SPARSE_TYPES and own != "sparge_attn":
            raise ValueError(
                f"config_file {file_name!r}: self_attn_1_type {own!r} and sparge are two "
                "sparse methods for self-attention; remove one of them"
            )
        return types, "sparge_attn"
    if own != "sparge_attn" and (config.sparge or config.sparge_ckpt):
        unused = "sparge true" if config.sparge else "sparge_ckpt"
        instead = "auto or sparge_attn" if config.sparge else "sparge_attn"
        log.warning(
            f"{file_name}: {unused} is not used, since self_attn_1_type is {own!r}; set that to "
            f"{instead} to use it"
        )
    return types, None


def environment_stamp() -> str:
    """Changes when the environment variable does."""
    return os.environ.get(ENVIRONMENT_VARIABLE, "")


def checkpoint_in(config_text: str) -> str:
    """Stamp of the tuned checkpoint a configuration names, so that a replaced one is read again."""
    try:
        name = json.loads(config_text).get("sparge_ckpt", "")
    except (ValueError, AttributeError, RecursionError):
        return ""
    name = plain_path(name) if isinstance(name, str) else ""
    return checkpoint_stamp(name) if name else ""
