"""A block plan as a picture, with the borders of frames."""

from __future__ import annotations

from PIL import Image, ImageOps

from ..kernels import BlockPlan, TokenLayout
from .page import LINE, MARGIN, SPARSE, WIDTH, Page, wrapped

LABELS = 64
FRAME, OUTSIDE = (240, 178, 84), (178, 62, 84)
# Borders closer than this would hide what is between them.
_NEAREST_BORDERS = 6
_SIDE = WIDTH - 2 * MARGIN - LABELS


def _mask_picture(plan: BlockPlan) -> Image.Image:
    """Square, dark where much is left out; blocks are whole pixels where there is room."""
    blocks = plan.to_image(head=0, cell=1)
    side = _SIDE // plan.num_k_blocks * plan.num_k_blocks or _SIDE
    exact = side >= max(blocks.size)
    resized = blocks.resize(
        (side, side), Image.Resampling.NEAREST if exact else Image.Resampling.BOX
    )
    return ImageOps.colorize(resized, SPARSE[0], SPARSE[1])


def _borders(layout: TokenLayout, side: int) -> tuple[list[float], list[float]]:
    """Places of (the borders between frames, the ends of what is outside the video), in pixels."""
    scale = side / layout.num_tokens
    every = max(1, round(_NEAREST_BORDERS / (layout.tokens_per_frame * scale)))
    frames = [
        (layout.prefix_tokens + frame * layout.tokens_per_frame) * scale
        for frame in range(every, layout.frames, every)
    ]
    ends = (layout.prefix_tokens, layout.num_tokens - layout.suffix_tokens)
    return frames, [end * scale for end in ends if 0 < end < layout.num_tokens]


def plan_picture(
    plan: BlockPlan, layout: TokenLayout, *sentences: str, in_frames: bool
) -> Image.Image:
    """A plan that all heads share, RGB, WIDTH pixels wide.

    Args:
        sentences: above it.
        in_frames: rows and columns are tokens in the model's order, so that frames have borders.
    """
    mask = _mask_picture(plan)
    lines = sum(len(wrapped(text)) for text in sentences)
    page = Page((lines + 3) * LINE + mask.height + 2 * MARGIN)
    for text in sentences:
        page.paragraph(text)
    page.y += LINE // 2
    left, top = MARGIN + LABELS, page.y + LINE
    page.write(_axis(layout, "keys", in_frames), left, page.y)
    page.write("queries", MARGIN, top)
    page.image.paste(mask, (left, top))
    if in_frames:
        frames, ends = _borders(layout, mask.width)
        for places, colour in ((frames, FRAME), (ends, OUTSIDE)):
            for place in places:
                page.draw.line((left + place, top, left + place, top + mask.height - 1), colour)
                page.draw.line((left, top + place, left + mask.width - 1, top + place), colour)
    return page.image.crop((0, 0, WIDTH, top + mask.height + MARGIN))


def _axis(layout: TokenLayout, name: str, in_frames: bool) -> str:
    if not in_frames:
        return f"{name}, the most important first"
    parts = ["text or pictures"] if layout.prefix_tokens else []
    parts += [f"frames 0 to {layout.frames - 1}" if layout.frames > 1 else "frame 0"]
    parts += ["pictures"] if layout.suffix_tokens else []
    return f"{name}: {', '.join(parts)}"
