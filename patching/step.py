"""Which denoising step a forward belongs to, from its noise level.

Calls are never counted: EasyCache and its kin skip forwards, context windows repeat them, and
cond and uncond are one batch or two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Sigmas pass through the model's dtype on their way, so equality is relative.
RELATIVE_TOLERANCE = 1e-4


def denoising_step(
    sigma: float, sample_sigmas: Sequence[float], *, not_before: int = 0
) -> int | None:
    """Index of the step that denoises from `sigma`.

    Args:
        sigma: noise level of the forward.
        sample_sigmas: the sampler's schedule, one more entry than it has steps.
        not_before: the latest step seen in this run; it decides between equal sigmas of a
            schedule that goes up again.

    Returns:
        The position of sigma in the schedule; between two entries (samplers that evaluate
        inside a step) the step they enclose; None if the schedule has no steps. A sigma outside
        the schedule counts as the nearest step.
    """
    steps = len(sample_sigmas) - 1
    if steps < 1:
        return None
    exact = [
        i for i, s in enumerate(sample_sigmas) if math.isclose(sigma, s, rel_tol=RELATIVE_TOLERANCE)
    ]
    inside = [
        i
        for i in range(steps)
        if min(sample_sigmas[i : i + 2]) < sigma < max(sample_sigmas[i : i + 2])
    ]
    found = exact or inside
    if not found:
        return 0 if sigma > sample_sigmas[0] else steps - 1
    later = [i for i in found if i >= not_before]
    return min((later or found)[0], steps - 1)
