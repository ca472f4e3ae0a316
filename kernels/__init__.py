"""Attention over block plans: the plan, the kernels that run it, and their registry."""

from .attention import block_sparse_attention
from .gilbert import gilbert_order
from .layout import TokenLayout
from .plan import BlockPlan
from .registry import available

__all__ = ["BlockPlan", "TokenLayout", "available", "block_sparse_attention", "gilbert_order"]
