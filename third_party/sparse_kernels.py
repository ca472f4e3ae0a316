"""Registers the block-sparse libraries of others as kernels; importing it imports none of them.

Their ranks are estimates from published rates, not measurements of this pack: where two kernels
are near each other, the bundled one should win.
"""

from __future__ import annotations

from ..kernels.registry import register
from . import flash_attn4_sparse, flex, sparse_sageattn, spas_sage_attn

SPARSE_BACKENDS = {
    module.BACKEND.name: module.BACKEND
    for module in (flash_attn4_sparse, spas_sage_attn, sparse_sageattn, flex)
}

for _backend in SPARSE_BACKENDS.values():
    register(_backend.kernel())
