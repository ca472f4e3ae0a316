"""How a node's choice reaches a running model, through ComfyUI's public hooks only."""

from .choice import make_choice
from .install import describe_model, install, run_history
from .schedule import Schedule, layer_spans, resolve_layers
from .settings import AttentionSettings, AttentionSite, SparseChoice, SparsePolicy

__all__ = [
    "AttentionSettings",
    "AttentionSite",
    "Schedule",
    "SparseChoice",
    "SparsePolicy",
    "describe_model",
    "install",
    "layer_spans",
    "make_choice",
    "resolve_layers",
    "run_history",
]
