"""Fixtures for tests of the patching layer in a real ComfyUI."""

from dataclasses import dataclass

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.patching import AttentionSettings, Schedule, SparseChoice, install


@dataclass(frozen=True)
class BandPolicy:
    """A sparse method as small as can be: blocks within `reach` of the diagonal."""

    reach: int = 1
    reverse: bool = False
    name = "band"
    is_static = True

    def describe(self):
        return f"band (reach {self.reach})"

    def dense_reason(self, layout):
        return None

    def order(self, layout):
        return torch.arange(layout.num_tokens).flip(0) if self.reverse else None

    def static_plan(self, layout, device):
        block = torch.arange(-(-layout.num_tokens // 64))
        return BlockPlan.from_mask(
            (block[:, None] - block).abs() <= self.reach,
            block_m=64,
            block_n=64,
            q_len=layout.num_tokens,
            k_len=layout.num_tokens,
        ).on_device(device)


@pytest.fixture(scope="session")
def band():
    return BandPolicy


@pytest.fixture(scope="session")
def install_band(comfyui):
    """install_band(model, reach=..., **schedule): band attention on a clone of the model."""

    def run(model, *, reach=1, reverse=False, kernel="auto", dense_layers=(0,), **schedule):
        choice = SparseChoice(
            policy=BandPolicy(reach, reverse),
            schedule=Schedule(frozenset(dense_layers), **({"dense_timesteps": 1} | schedule)),
            kernel=kernel,
            min_tokens=0,
        )
        return install(model, AttentionSettings(sparse=choice))

    return run
