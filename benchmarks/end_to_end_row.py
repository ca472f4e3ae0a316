"""What one end-to-end measurement says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EndToEndRow:
    """One node, or dense attention, on one video.

    Attributes:
        method: "dense" is ComfyUI's own choice; a dense backend has its name behind it.
        layers, model_layers: those measured, and those the published model has.
        parameters: the method and its settings, as the log says them; ComfyUI's own for dense.
        kernel, density: of the sparse calls.
        precision: asked for.
        step_seconds: of every timed step; step_s is their median.
        attention_s: self-attention inside a step, dense layers included; None where not known.
        best_dense: the fastest dense method of this video and run. Sparse runs use it for what
            they keep dense, and their speed-ups are over it.
        speedup: best_dense's step over this one.
        schedule_steps, dense_steps: of a full run with the node's defaults.
        schedule_s: that run, extrapolated; schedule_speedup: best_dense's over it.
        latent_rel_l2: difference of the latent to the dense run's. Weights are random: it says
            that the run is sound, not how a video would look.
        notes: what the pack had to say about the run.
    """

    model: str
    video: str
    layout: str
    tokens: int
    layers: int
    model_layers: int
    dtype: str
    method: str
    parameters: str
    precision: str
    kernel: str
    density: float
    step_seconds: list[float]
    step_s: float
    attention_s: float | None
    best_dense: str
    speedup: float
    schedule_steps: int
    dense_steps: int
    schedule_s: float
    schedule_speedup: float
    latent_rel_l2: float
    notes: list[str]
