"""Which denoising step a forward belongs to, from its noise level.

Calls are never counted: EasyCache and its kin skip forwards, context windows repeat them, and
cond and uncond are one batch or two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Sigmas pass through the model's dtype on their way, so equality is relative.
RELATIVE_TOLERANCE = 1e-4
# The most that k-diffusion's samplers raise a noise level by.
MAX_CHURN = 2**0.5 - 1


def same_level(sigma: float, other: float) -> bool:
    """Whether two noise levels are one but for rounding."""
    return math.isclose(sigma, other, rel_tol=RELATIVE_TOLERANCE)


def churned_levels(sample_sigmas: Sequence[float], options: Mapping[str, Any]) -> list[float]:
    """Where each step starts: at its sigma, or above it in a sampler that first adds noise.

    Args:
        sample_sigmas: the sampler's schedule.
        options: of the sampler; s_churn, s_tmin and s_tmax as in Karras et al. 2022, algorithm 2,
            count here.
    """
    sigmas = list(sample_sigmas[:-1])
    churn = float(options.get("s_churn") or 0.0)
    if churn <= 0.0 or not sigmas:
        return sigmas
    lowest, highest = float(options.get("s_tmin", 0.0)), float(options.get("s_tmax", math.inf))
    factor = 1.0 + min(churn / len(sigmas), MAX_CHURN)
    return [s * factor if lowest <= s <= highest else s for s in sigmas]


def denoising_step(
    sigma: float,
    sample_sigmas: Sequence[float],
    *,
    starts: Sequence[float] | None = None,
    not_before: int = 0,
    reported: int | None = None,
) -> int | None:
    """Index of the step that denoises from `sigma`.

    Args:
        sigma: noise level of the forward.
        sample_sigmas: the sampler's schedule, one more entry than it has steps.
        starts: noise levels that the steps start at, where they are not those of the schedule.
        not_before: the latest step seen in this run; it decides where sigma comes up again in the
            schedule.
        reported: the latest step that the sampler says it has evaluated the model for; decides in
            place of not_before. None as long as it says nothing.

    Returns:
        The step that starts at sigma; between two entries (samplers that evaluate inside a step)
        the step they enclose; None if the schedule has no steps. A sigma outside the schedule
        counts as the nearest step.
    """
    steps = len(sample_sigmas) - 1
    if steps < 1:
        return None
    starts = sample_sigmas[:-1] if starts is None else starts
    ends = sample_sigmas[1:]
    exact = [
        i
        for i in range(steps)
        if same_level(sigma, sample_sigmas[i]) or same_level(sigma, starts[i])
    ]
    exact += [steps] if same_level(sigma, sample_sigmas[steps]) else []
    spans = zip(starts, ends, strict=True)
    inside = [i for i, span in enumerate(spans) if min(span) < sigma < max(span)]
    found = exact or inside
    if not found:
        return 0 if sigma > sample_sigmas[0] else steps - 1
    if reported is not None:
        # Where a step starts there is the next one; inside it, the one that has begun.
        not_before = reported + 1 if exact else reported
    later = [i for i in found if i >= not_before]
    return min(later[0] if later else found[-1], steps - 1)
