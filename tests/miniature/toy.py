"""A miniature of the miniatures, and the few steps of training that tests look at."""

import argparse

import torch

from miniature.recipe import Recipe, Stage
from miniature.training import Training

TOY = Recipe(
    family="wan",
    dim=128,
    ffn_dim=64,
    num_layers=1,
    stages=(
        Stage(4, clips=3, frames=2, height=8, width=8),
        Stage(4, clips=2, frames=3, height=8, width=12),
    ),
    warmup=2,
    cooldown=3,
    ema_steps=4,
)
COGVIDEOX = Recipe("cogvideox", 64, 256, 1, TOY.stages, warmup=2, cooldown=3, ema_steps=4)


def trained(recipe, steps, **options):
    training = Training(recipe, **options)
    for _ in range(steps):
        training.losses.append(float(training.run_step()))
    return training


def options_of(recipe, output, *, minutes, from_weights=False):
    return argparse.Namespace(
        recipe=recipe,
        device="cpu",
        precision=None,
        workers=1,
        compile=False,
        data_processes=0,
        minutes=minutes,
        save_every=1e9,
        output=output,
        from_weights=from_weights,
    )


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
