"""PatchSpargeAttention's inputs as a SparseChoice: plug-and-play, or a tuned checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..sparge import SpargeCheckpoint, SpargePolicy, load_checkpoint
from ..sparge.block_sizes import HALVES, PUBLISHED_BLOCKS
from ..sparge.policy import BLOCK_ORDERS, BLOCK_SCORES
from ..third_party import spas_sage_attn
from .choice import make_choice
from .install import describe_model
from .layout import WAN
from .log import shown
from .settings import SparseChoice

FOLDER = "sparge"
NO_CHECKPOINT = "none"
AUTO = "auto"
# Other people's kernels run the blocks that they were written for; this pack's run any.
LIBRARIES = ("flash_attn4", "spas_sage_attn", "sparse_sageattn")
# By name: query and key tokens per block.
BLOCK_SHAPES = {"128x64": PUBLISHED_BLOCKS, "128x32": (128, 32), "64x32": HALVES}


def register_folder() -> None:
    """Let ComfyUI know models/sparge, where tuned checkpoints are kept."""
    import folder_paths

    folder = Path(folder_paths.models_dir) / FOLDER
    folder_paths.add_model_folder_path(FOLDER, str(folder))


def checkpoint_names() -> list[str]:
    """Tuned checkpoints in ComfyUI's sparge folders."""
    import folder_paths

    if FOLDER not in folder_paths.folder_names_and_paths:
        return []
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.lower().endswith(".pt")]


def checkpoint_path(name: str) -> str | None:
    """Full path of a checkpoint, None for "none".

    Args:
        name: in ComfyUI's sparge folders, or a full path (LightX2V's files have one).

    Raises:
        ValueError: there is no such file.
    """
    if not isinstance(name, str):
        raise ValueError(f"sparge_ckpt {shown(name)}: expected the name of a file, or none")
    if name == NO_CHECKPOINT:
        return None
    if Path(name).is_absolute():
        return name
    import folder_paths

    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ValueError(
            f"sparge_ckpt {shown(name)}: no such file in models/{FOLDER}; found there: "
            f"{', '.join(checkpoint_names()) or 'none'}"
        )
    return str(path)


def checkpoint_stamp(name: str | None) -> str:
    """Changes whenever the file behind a sparge_ckpt input does.

    Args:
        name: None where the input is linked and the name not known yet: any may be meant.
    """
    if name is None:
        return "\n".join(checkpoint_stamp(known) for known in checkpoint_names())
    try:
        path = checkpoint_path(name)
        if path is None:
            return name
        state = Path(path).stat()
    except (OSError, ValueError) as error:
        return str(error)
    return f"{path} {state.st_mtime_ns} {state.st_size}"


def _load(model: Any, name: str) -> SpargeCheckpoint | None:
    path = checkpoint_path(name)
    if path is None:
        return None
    family, layers = describe_model(model)
    net = model.model.diffusion_model
    heads = net.num_heads if family == WAN else net.num_attention_heads
    checkpoint = load_checkpoint(path, num_layers=layers, num_heads=heads, family=family)
    # Here and not at the first call, which hosts may be capturing in a graph.
    checkpoint.on_device(model.load_device)
    return checkpoint


def _block_size(block_shape: str, kernel: str, device: torch.device) -> tuple[int, int]:
    """Query and key tokens per block: what is asked for; at auto SpargeAttn's own where that is,
    since it takes no other, and else the published ones.

    Raises:
        ValueError: the kernel is a library that does not run what is asked for.
    """
    own = PUBLISHED_BLOCKS
    if kernel == spas_sage_attn.BACKEND.name and device.type == "cuda":
        own = spas_sage_attn.block_size_on(device)
    if block_shape == AUTO:
        return own
    if kernel in LIBRARIES and BLOCK_SHAPES[block_shape] != own:
        raise ValueError(
            f"block_shape {shown(block_shape)}: kernel {kernel} runs blocks of "
            f"{own[0]}x{own[1]} alone; allowed with it is {AUTO}"
        )
    return BLOCK_SHAPES[block_shape]


def sparge_choice(
    model: Any,
    *,
    sparge_ckpt: str = NO_CHECKPOINT,
    topk: float = 0.2,
    simthreshd1: float = -0.1,
    cdfthreshd: float = 0.0,
    attention_sink: bool = False,
    block_order: str = AUTO,
    skipped_blocks: str = "weighted",
    dense_layers: str = "0",
    dense_timesteps: int = 0,
    last_dense_timesteps: int = -1,
    block_scores: str = AUTO,
    block_shape: str = AUTO,
    **shared: Any,
) -> SparseChoice:
    """The choice PatchSpargeAttention's inputs make for a MODEL; the defaults are the node's.

    Published are a topk of 0.5, raster order, scores of block means, dropped blocks and no dense
    steps. With compact blocks, those attended to that their means stand for worst, and weighted
    means of the others, 0.2 is closer to full attention than that; of dense steps the last one
    does most (docs/measurements.md).

    Args:
        cdfthreshd: 0 to keep by topk.
        block_order, block_scores: of SpargePolicy, or "auto".
        block_shape: one of BLOCK_SHAPES, or "auto": as published, halved in small frames and,
            with a lower topk, where that was timed to be faster.
        shared: the other inputs of make_choice.

    Raises:
        ValueError: an input is not allowed or the checkpoint does not fit, in one sentence.
    """
    for name, given, known in (
        ("block_order", block_order, BLOCK_ORDERS),
        ("block_scores", block_scores, BLOCK_SCORES),
        ("block_shape", block_shape, tuple(BLOCK_SHAPES)),
    ):
        if given not in (AUTO, *known):
            allowed = ", ".join((AUTO, *known))
            raise ValueError(f"{name} {shown(given)}: allowed are {allowed}")
    checkpoint = _load(model, sparge_ckpt)
    kernel = shared.get("kernel", AUTO)
    block_m, block_n = _block_size(block_shape, kernel, model.load_device)
    if block_order == AUTO:
        # Thresholds were tuned in the model's own order; the published sink is its first block.
        block_order = "Gilbert" if checkpoint is None and not attention_sink else "raster"
    if block_scores == AUTO:
        # Thresholds are sums of the published scores' softmax.
        by_count = checkpoint is None and not cdfthreshd
        block_scores = "group means" if by_count else "block means"
    # Thresholds were tuned in blocks of one size.
    may_halve = block_shape == AUTO and kernel not in LIBRARIES and checkpoint is None
    policy = SpargePolicy(
        topk=topk,
        simthreshd1=simthreshd1,
        cdfthreshd=cdfthreshd or None,
        attention_sink=attention_sink,
        block_order=block_order,
        block_scores=block_scores,
        skipped_blocks=skipped_blocks,
        checkpoint=checkpoint,
        block_m=block_m,
        block_n=block_n,
        halves_in_small_frames=may_halve,
        halves_if_faster=may_halve,
    )
    return make_choice(
        model,
        policy,
        dense_layers=dense_layers,
        dense_timesteps=dense_timesteps,
        last_dense_timesteps=last_dense_timesteps,
        **shared,
    )
