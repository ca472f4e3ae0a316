"""Miniatures sampled by ComfyUI in this process, dense and with a setting."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sparse_video_attention.patching import AttentionSettings, install, run_history
from sparse_video_attention.patching.errors_told import mean_error
from torch import Tensor

from miniature.latents import LATENT_CHANNELS, cogvideox_colours, wan_colours
from miniature.prompts import Prompt, text_features

from .fine_blocks import mean_density
from .quality_setting import Setting

COLOURS = {"wan": wan_colours, "cogvideox": cogvideox_colours}


@dataclass(frozen=True)
class Shot:
    """What is sampled.

    Attributes:
        size: frames, height and width of the latent.
    """

    prompt: Prompt
    seed: int
    size: tuple[int, int, int]

    @property
    def size_name(self) -> str:
        return "x".join(map(str, self.size))


@dataclass(frozen=True)
class Result:
    """A sampled video and what it took.

    Attributes:
        video: fp32 [frames, height, width, 3], between 0 and 1.
        seconds: of the processor on a CPU, of the wall elsewhere.
        density: mean over sparse calls; 1 if there were none. In fine blocks that of real ones.
        sparse_calls, dense_calls: of self-attention, where the pack counted them.
        kernels: that ran the sparse ones.
        error: of sparse calls against full attention on the same q, k and v, their mean; None
            where it was not measured.
    """

    video: Tensor
    seconds: float
    density: float = 1.0
    sparse_calls: int = 0
    dense_calls: int = 0
    kernels: tuple[str, ...] = ()
    error: float | None = None


class Miniature:
    """A trained miniature in ComfyUI.

    Args:
        comfy: ComfyUI's package.
        family: "wan" or "cogvideox".
        dtype: that it computes in.
    """

    def __init__(self, comfy: Any, family: str, weights: Path, dtype: torch.dtype) -> None:
        self._comfy, self.family = comfy, family
        loader = importlib.import_module("comfy.sd")
        self.model = loader.load_diffusion_model(str(weights))
        self.model.set_model_compute_dtype(dtype)

    def sample(
        self,
        shot: Shot,
        steps: int,
        guidance: float,
        setting: Setting | None,
        measures_error: bool = False,
    ) -> Result:
        """Sample as the demo's workflows do.

        Args:
            setting: None for dense attention.
            measures_error: of the setting's sparse calls; it takes time, which `seconds` has in it.

        Raises:
            ValueError: the setting does not fit the model.
        """
        model, choice = self.model, None
        if setting is not None:
            choice = setting.choice(model)
            settings = AttentionSettings(sparse=choice, measures_error=measures_error)
            model = install(model, settings)
        positive, negative = (
            [[text_features(prompt).unsqueeze(0), {}]] for prompt in (shot.prompt, None)
        )
        generator = torch.Generator().manual_seed(shot.seed)
        shape = (1, LATENT_CHANNELS, *shot.size)
        noise = torch.randn(shape, generator=generator)
        sampling = model.get_model_object("model_sampling")
        sigmas = self._comfy.samplers.calculate_sigmas(sampling, "simple", steps)
        # On a CPU other programs would be timed too.
        on_cpu = self.model.load_device.type == "cpu"
        read_clock = time.process_time if on_cpu else time.perf_counter
        started = read_clock()
        latent = self._comfy.sample.sample_custom(
            model,
            noise,
            guidance,
            self._sampler(),
            sigmas,
            positive,
            negative,
            torch.zeros(shape),
            disable_pbar=True,
            seed=shot.seed,
        )
        seconds = read_clock() - started
        latent = model.model.process_latent_in(latent.float().cpu())[0]
        video = COLOURS[self.family]().decode(latent).clamp(0, 1)
        history = run_history(model)
        record = history.latest if history is not None else None
        if record is None:
            return Result(video, seconds)
        sparse = record.sparse()
        real = None if choice is None else mean_density(choice)
        return Result(
            video,
            seconds,
            density=sparse.density if real is None else real,
            sparse_calls=sparse.calls,
            dense_calls=sum(record.dense_reasons().values()),
            kernels=tuple(sparse.kernels),
            error=mean_error(record.calls),
        )

    def _sampler(self) -> Any:
        if self.family == "wan":
            return self._comfy.samplers.sampler_object("euler")
        return importlib.import_module("comfy_extras.nodes_void").VOID_DDIM()
