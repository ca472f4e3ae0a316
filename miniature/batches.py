"""What a step of training learns from: a function of the recipe and the number of the step."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import astuple, replace
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .models import family_of
from .noise import spread_out
from .prompts import HARDEST, PROMPTS, Prompt, text_features
from .recipe import Recipe
from .scene import Draw
from .seeds import private_seed
from .video_set import VideoSet

# Clips of a step have numbers of their own.
_CLIPS_PER_STEP = 1 << 12
# Batches that are made before they are asked for, per process.
_AHEAD = 2


class Batch(NamedTuple):
    """fp32: what the model gets, [B, C, T, H, W], what it has to say, [B, C, T, H, W], the
    timesteps, [B], and the text, [B, words, TEXT_WIDTH]."""

    noisy: Tensor
    target: Tensor
    timestep: Tensor
    context: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


def make_batch(recipe: Recipe, step: int) -> Batch:
    """The batch of a step."""
    stage = recipe.stage_at(step)
    family = family_of(replace(recipe, train_shift=stage.train_shift or recipe.train_shift))
    generator = torch.Generator().manual_seed(private_seed("noise", recipe.seed, step))
    size = (stage.frames, stage.height, stage.width)
    clips = VideoSet(recipe.seed, *size, stage.variety, stage.placement)
    first = step * _CLIPS_PER_STEP
    drawn = [clips.clip(first + i, prompt) for i, prompt in enumerate(_prompts(recipe, step))]
    video = family.colours.encode(torch.stack([video for _, video in drawn]))
    dropped = torch.rand(stage.clips, generator=generator) < recipe.dropped_prompts
    context = [
        text_features(None if drop else prompt)
        for (prompt, _), drop in zip(drawn, dropped.tolist(), strict=True)
    ]
    noise = torch.randn(video.shape, generator=generator)
    example = family.noising(video, noise, spread_out(stage.clips, generator))
    return Batch(example.noisy, example.target, example.timestep, torch.stack(context))


def _prompts(recipe: Recipe, step: int) -> list[Prompt | None]:
    """Of the clips of a step, None for those that show anything."""
    stage = recipe.stage_at(step)
    draw = Draw(private_seed("prompts", recipe.seed, step))

    def happens(share: float) -> bool:
        # Drawn for no stage that does not want it, so that the batches of older stages stay.
        return share > 0 and draw.uniform(0.0, 1.0) < share

    def stored() -> Prompt:
        prompt = PROMPTS[draw.integer(len(PROMPTS))]
        if happens(stage.hardest):
            return HARDEST
        if happens(stage.word_share):
            with_word = [p for p in PROMPTS if stage.word in astuple(p)]
            return with_word[draw.integer(len(with_word))]
        return prompt

    return [stored() if draw.uniform(0.0, 1.0) < stage.stored else None for _ in range(stage.clips)]


def _one_thread() -> None:
    torch.set_num_threads(1)


def _arrays(recipe: Recipe, step: int) -> list[np.ndarray]:
    # Tensors would travel through shared memory, of which containers have little.
    return [part.numpy() for part in make_batch(recipe, step)]


def batches(recipe: Recipe, start: int, processes: int) -> Iterator[Batch]:
    """The batches of all steps from `start` on, in order.

    Args:
        processes: that make them ahead, so that a GPU need not wait; 0 to make each when asked.
    """
    if processes == 0:
        yield from (make_batch(recipe, step) for step in range(start, recipe.steps))
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_one_thread) as pool:
        steps = iter(range(start, recipe.steps))
        waiting: deque[Future[list[np.ndarray]]] = deque(
            pool.submit(_arrays, recipe, step)
            for step in itertools.islice(steps, _AHEAD * processes)
        )
        try:
            while waiting:
                batch = Batch(*map(torch.from_numpy, waiting.popleft().result()))
                for step in itertools.islice(steps, 1):
                    waiting.append(pool.submit(_arrays, recipe, step))
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
