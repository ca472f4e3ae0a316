"""Writing videos: H.264 in MP4, which every browser plays."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

CAPTION_PIXELS = 26
GAP_PIXELS = 8
CRF = 16


def _even(frames: np.ndarray) -> np.ndarray:
    """H.264 halves the resolution of colours, so both sides must be even."""
    height, width = frames.shape[1:3]
    return frames[:, : height - height % 2, : width - width % 2]


def write_video(path: Path, frames: np.ndarray, fps: int) -> Path:
    """Write uint8 [frames, height, width, 3] as an MP4."""
    frames = _even(frames)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(CRF)}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def video_grid(rows: Sequence[Sequence[tuple[str, np.ndarray] | None]]) -> np.ndarray:
    """Videos of one size in rows, each under its caption; None leaves a place empty."""
    first = next(cell for row in rows for cell in row if cell is not None)[1]
    count, height, width, _ = first.shape
    columns = max(len(row) for row in rows)
    tile = height + CAPTION_PIXELS
    size = (len(rows) * tile, width * columns + GAP_PIXELS * (columns - 1))
    canvas = np.full((count, *size, 3), 255, dtype=np.uint8)
    font = ImageFont.load_default(size=15)
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            if cell is None:
                continue
            caption, frames = cell
            header = Image.new("RGB", (width, CAPTION_PIXELS), "white")
            ImageDraw.Draw(header).text((2, 4), caption, fill="black", font=font)
            top, left = i * tile, j * (width + GAP_PIXELS)
            canvas[:, top : top + CAPTION_PIXELS, left : left + width] = np.asarray(header)
            canvas[:, top + CAPTION_PIXELS : top + tile, left : left + width] = frames
    return canvas
