"""Sparge's thresholds: one number for all heads, or one per head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Threshold = float | Sequence[float] | Tensor
Counts = int | list[int] | Tensor


def check_threshold(name: str, value: Threshold, low: float, high: float, heads: int) -> None:
    """Raise ValueError unless value is a number, or one number per head, in [low, high].

    Values of a tensor on an accelerator are taken on trust: reading them would wait for it.
    """
    if isinstance(value, Tensor):
        if value.ndim != 1 or value.numel() != heads or not value.is_floating_point():
            raise ValueError(
                f"{name} is a number or a float tensor with one value for each of the {heads} "
                f"heads; got shape {list(value.shape)} of {value.dtype}"
            )
        numbers: Sequence[float] = value.tolist() if value.device.type == "cpu" else ()
    elif isinstance(value, Sequence):
        numbers = value
        if len(numbers) != heads:
            raise ValueError(
                f"{name} has {len(numbers)} values where the call has {heads} heads; give one "
                "number, or one per head"
            )
    else:
        numbers = (float(value),)
    for number in numbers:
        if not low <= number <= high:  # NaN is not either
            raise ValueError(f"{name} is between {low:g} and {high:g}; got {number:g}")


def per_head(value: Threshold, device: torch.device) -> float | Tensor:
    """A number as it is; values per head as fp32 [1, H, 1], contiguous, on the device, without a
    wait."""
    if isinstance(value, Sequence):
        value = torch.tensor(value, dtype=torch.float32)
    if not isinstance(value, Tensor):
        return float(value)
    value = value.to(device=device, dtype=torch.float32, non_blocking=True)
    return value.contiguous().view(1, -1, 1)


def on_device(counts: Counts | None, device: torch.device) -> int | Tensor | None:
    """A number as it is; counts per head as int64 [H] on the device, without a wait."""
    if isinstance(counts, list):
        counts = torch.tensor(counts)
    return counts.to(device, non_blocking=True) if isinstance(counts, Tensor) else counts


def topk_counts(topk: Threshold, num_k_blocks: int) -> Counts:
    """Key blocks that `topk` keeps, at least one: a number, or one per head.

    A tensor on an accelerator gives an int64 tensor [H] there.
    """
    if isinstance(topk, Tensor):
        counts = (topk * num_k_blocks).long().clamp_(1, num_k_blocks)
        return counts.tolist() if counts.device.type == "cpu" else counts
    if isinstance(topk, Sequence):
        return [max(1, int(fraction * num_k_blocks)) for fraction in topk]
    return max(1, int(topk * num_k_blocks))
