"""The inputs that every sparse node shares, as a SparseChoice for one MODEL."""

from __future__ import annotations

from typing import Any

from .install import describe_model
from .schedule import Schedule, resolve_layers
from .settings import SparseChoice, SparsePolicy


def make_choice(
    model: Any,
    policy: SparsePolicy,
    *,
    dense_layers: str = "",
    dense_timesteps: int = -1,
    last_dense_timesteps: int = 0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    kernel: str = "auto",
    precision: str = "auto",
    min_tokens: int = 4096,
    dense_vace_blocks: bool = False,
    fits_warmup: bool = False,
    verbose: bool = False,
) -> SparseChoice:
    """A policy with the schedule and kernel around it. Arguments as the nodes' inputs.

    Raises:
        ValueError: the model is not supported or an input is not allowed, in one sentence.
    """
    _, num_layers = describe_model(model)
    return SparseChoice(
        policy=policy,
        schedule=Schedule(
            dense_layers=resolve_layers(dense_layers, num_layers),
            dense_timesteps=dense_timesteps,
            last_dense_timesteps=last_dense_timesteps,
            start_percent=start_percent,
            end_percent=end_percent,
            fits_warmup=fits_warmup,
            dense_vace_blocks=dense_vace_blocks,
        ),
        kernel=kernel,
        precision=precision,
        min_tokens=min_tokens,
        verbose=verbose,
    )
