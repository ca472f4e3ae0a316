"""The radial attention mask: a static block mask from the token grid alone (arXiv 2506.19852).

Attention between two frames decays with their distance, so the window around the diagonal of a
frame pair halves whenever the distance doubles, and far pairs are thinned out. The rules and
the rounding to blocks are those of mit-han-lab/radial-attention; no token mask is ever made.
"""

from __future__ import annotations

import torch
from torch import Tensor

FAMILIES = ("wan", "hunyuan")
MAX_DECAY_FACTOR = 2.0

# A frame pair whose window would be narrower than this is kept only at every 2nd, 4th, ...
# distance. It is a constant of the method and not the block size.
_FULL_WINDOW = 128


def _check(
    num_frames: int,
    tokens_per_frame: int,
    block_size: int,
    decay_factor: float,
    family: str,
    prefix_tokens: int,
    suffix_tokens: int,
) -> None:
    for name, value, least in (
        ("num_frames", num_frames, 1),
        ("tokens_per_frame", tokens_per_frame, 1),
        ("block_size", block_size, 1),
        ("prefix_tokens", prefix_tokens, 0),
        ("suffix_tokens", suffix_tokens, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    if not 0.0 <= decay_factor <= MAX_DECAY_FACTOR:
        raise ValueError(
            f"decay_factor must be between 0.0 and {MAX_DECAY_FACTOR}; got {decay_factor}"
        )
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {family!r}")


def fewest_dense_rows(block_size: int) -> int:
    """Fewest kept rows that give a column of a block a density over 1/3."""
    return block_size // 3 + 1


def _pair_windows(
    num_frames: int, tokens_per_frame: int, block_size: int, decay_factor: float, family: str
) -> Tensor:
    """int32 [F, F] by query and key frame: window half-width in tokens, -1 for a dropped pair."""
    power = 1 << tokens_per_frame.bit_length()
    by_distance = []
    for distance in range(num_frames):
        window = power / (1 << distance.bit_length())
        if window < _FULL_WINDOW and distance % int(_FULL_WINDOW / window):
            by_distance.append(-1)
        elif distance <= 1:
            by_distance.append(tokens_per_frame)
        else:
            # Token distances are integers, so the real half-width may be rounded down.
            by_distance.append(int(max(block_size, window * decay_factor)))
    frame = torch.arange(num_frames)
    windows = torch.tensor(by_distance, dtype=torch.int32)[(frame[:, None] - frame).abs()]
    if family == "wan":
        windows[:, 0] = tokens_per_frame
    return windows


def _kept_blocks(
    starts: Tensor, tokens_per_frame: int, block_size: int, windows: Tensor
) -> tuple[Tensor, Tensor]:
    """Block rows and block columns, int64 [kept] each, that the frame pairs keep.

    A column c of a block meets the band |r - c| <= w in an interval of rows, so the columns with
    at least n kept rows are an interval as well and its length follows from the block's corners.

    Args:
        starts: int64 [F], first token of every frame.
        windows: int32 [F, F] as from _pair_windows.
    """
    dense_rows = fewest_dense_rows(block_size)
    if tokens_per_frame < dense_rows:
        return starts[:0], starts[:0]
    # A frame that reaches into one block more does so with a partial block, which is dropped.
    blocks = torch.arange(-(-tokens_per_frame // block_size))
    edges = (blocks * block_size - (starts % block_size)[:, None]).to(torch.int32)  # [F, n]
    first = edges.clamp(min=0)
    last = (edges + block_size).clamp(max=tokens_per_frame) - 1
    row_first, row_last = first[:, :, None, None], last[:, :, None, None]
    window = windows[:, None, :, None]

    def columns_with(rows: int) -> Tensor:
        """int32 [F, n, F, n]: columns of every block with at least that many kept rows."""
        # No column has more rows than the block or the band: such corners give a width of 0.
        reach = torch.where(2 * window + 1 >= rows, window + 1 - rows, -tokens_per_frame)
        reach = torch.where(row_last - row_first + 1 >= rows, reach, -tokens_per_frame)
        before = torch.maximum(row_first - reach - 1, first - 1)
        return torch.minimum(row_last + reach, last).sub_(before).clamp_(min=0)

    kept = columns_with(dense_rows).mul_(5) > columns_with(1).mul_(3)
    number = (starts[:, None] // block_size + blocks).flatten()
    row, column = kept.flatten(2).flatten(0, 1).nonzero(as_tuple=True)
    return number[row], number[column]


def _whole_pairs(
    num_blocks: int, block_size: int, tokens_per_frame: int, prefix_tokens: int, family: str
) -> Tensor:
    """bool [M, M]: blocks with tokens of two frames that see each other whole, however few."""
    first_token = torch.arange(num_blocks) * block_size - prefix_tokens
    first = first_token.div(tokens_per_frame, rounding_mode="floor")
    last = (first_token + block_size - 1).div(tokens_per_frame, rounding_mode="floor")
    kept = (first <= last[:, None] + 1) & (last >= first[:, None] - 1)
    if family == "wan":
        kept |= first <= 0
    return kept


def radial_block_mask(
    num_frames: int,
    tokens_per_frame: int,
    *,
    block_size: int = 128,
    decay_factor: float = 0.2,
    family: str = "wan",
    prefix_tokens: int = 0,
    suffix_tokens: int = 0,
    keep_neighbours: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which blocks of tokens attend to which, the same for all heads.

    Args:
        num_frames, tokens_per_frame: of the latent video; tokens are frame-major.
        block_size: tokens per query block and per key block.
        decay_factor: 0.0 to 2.0, width of the windows of frames two or more apart.
        family: "wan" keeps the first frame's keys for everyone (attention sink), "hunyuan" not.
        prefix_tokens, suffix_tokens: tokens before and after the video (text); every block that
            holds one stays on, row and column.
        keep_neighbours: with frames of fewer than 128 tokens too, keep every block of frames next
            to each other, and of the first frame's keys. As published such small frames are
            thinned out like distant ones, and the rounding to blocks loses much of the rest.

    Returns:
        bool [M, M], M = ceil(all tokens / block_size); True keeps the block. The published
        rounding to blocks can leave the row of a block across two frames empty.

    Raises:
        ValueError: an argument is out of its range.

    Source: arXiv 2506.19852, section 4; mit-han-lab/radial-attention, the mask of releases from
    2025-11 on (frames next to each other see each other whole).
    """
    _check(
        num_frames,
        tokens_per_frame,
        block_size,
        decay_factor,
        family,
        prefix_tokens,
        suffix_tokens,
    )
    video_end = prefix_tokens + num_frames * tokens_per_frame
    num_blocks = -(-(video_end + suffix_tokens) // block_size)
    windows = _pair_windows(num_frames, tokens_per_frame, block_size, decay_factor, family)
    starts = prefix_tokens + torch.arange(num_frames) * tokens_per_frame
    mask = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    mask[_kept_blocks(starts, tokens_per_frame, block_size, windows)] = True
    if keep_neighbours and tokens_per_frame < _FULL_WINDOW:
        mask |= _whole_pairs(num_blocks, block_size, tokens_per_frame, prefix_tokens, family)
    for always_on in (
        slice(0, -(-prefix_tokens // block_size)),
        slice(video_end // block_size, None),
    ):
        mask[always_on] = True
        mask[:, always_on] = True
    return mask.to(device)
