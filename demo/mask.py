"""The block mask of a run as a picture."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw
from sparse_video_attention.kernels import BlockPlan, TokenLayout
from sparse_video_attention.radial_attn import RadialPolicy

PIXELS = 480
KEPT, SKIPPED, BORDER = (37, 99, 166), (236, 239, 243), (255, 255, 255)


def radial_plan(layout: TokenLayout, settings: dict[str, object]) -> BlockPlan:
    """The plan that the radial node makes of these settings."""
    policy = RadialPolicy(
        block_size=int(str(settings["block_size"])),
        decay_factor=float(str(settings["decay_factor"])),
        skipped_blocks=str(settings["skipped_blocks"]),
    )
    return policy.static_plan(layout, "cpu")


def draw_mask(plan: BlockPlan, layout: TokenLayout) -> Image.Image:
    """A row per query block, a column per key block; lines where frames begin."""
    kept = plan.to_levels()[0, 0] == 1
    colours = torch.tensor([SKIPPED, KEPT], dtype=torch.uint8)
    small = Image.fromarray(colours[kept.long()].numpy())
    cell = max(1, PIXELS // max(small.size))
    image = small.resize((small.width * cell, small.height * cell), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    for frame in range(layout.frames + 1):
        token = layout.prefix_tokens + frame * layout.tokens_per_frame
        at = round(token / plan.block_m * cell)
        draw.line([(at, 0), (at, image.height)], fill=BORDER)
        draw.line([(0, at), (image.width, at)], fill=BORDER)
    return image
