"""Makes this process one with GPUs that are not there. Only for a process that is started for it.

    python -m tests.cuda_stand_in.stand_in sm_90 benchmarks.end_to_end --model tiny

runs the main of a module with what follows it, on the cards named first (several with commas
between them).
"""

from __future__ import annotations

import builtins
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .cards import CARDS
from .processes import CARDS_VARIABLE, COMPILES_VARIABLE
from .runtime import start_runtime
from .tensors import GENERATORS_FIT, MODE, CudaTensor

# They ask whether `type(x) is Tensor`: another is a compiler's trace, or of another pack.
ASK_FOR_THE_TYPE = ("kernels.fallback", "patching.output_check", "patching.history")


def type_on_a_gpu(x: Any) -> type:
    return Tensor if isinstance(x, CudaTensor) else builtins.type(x)


def start(names: Sequence[str], *, compiles: bool = False) -> None:
    """Be a machine with these cards, all NVIDIA's or all AMD's, until the process ends.

    Args:
        compiles: every kernel for its card, before its first launch.
    """
    cards = start_runtime([CARDS[name] for name in names])
    from .triton_driver import start_triton

    start_triton(cards, compiles=compiles)
    MODE.__enter__()
    GENERATORS_FIT.__enter__()
    for name in ASK_FOR_THE_TYPE:
        importlib.import_module(f"sparse_video_attention.{name}").type = type_on_a_gpu


def start_as_told() -> None:
    """Start with what the environment says, in processes started by this one too."""
    compiles = os.environ.get(COMPILES_VARIABLE) == "1"
    start(os.environ[CARDS_VARIABLE].split(","), compiles=compiles)


# Processes that multiprocessing spawns import what the first one ran, under this name.
if __name__ == "__mp_main__":
    start_as_told()

if __name__ == "__main__":
    os.environ[CARDS_VARIABLE], module = sys.argv[1:3]
    leaves_results = module.startswith("benchmarks.") and module != "benchmarks.warm"
    if leaves_results and "--out" not in sys.argv:
        sys.exit("name a folder with --out: the card's own results are no place for these")
    start_as_told()
    importlib.import_module(module).main(sys.argv[3:])
