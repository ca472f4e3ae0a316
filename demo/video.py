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


def side_by_side(videos: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Videos of one size next to each other, each under its caption."""
    _, (count, height, width, _) = videos[0][0], videos[0][1].shape
    total = width * len(videos) + GAP_PIXELS * (len(videos) - 1)
    header = Image.new("RGB", (total, CAPTION_PIXELS), "white")
    draw = ImageDraw.Draw(header)
    font = ImageFont.load_default(size=15)
    canvas = np.full((count, height + CAPTION_PIXELS, total, 3), 255, dtype=np.uint8)
    for index, (caption, frames) in enumerate(videos):
        left = index * (width + GAP_PIXELS)
        draw.text((left + 2, 4), caption, fill="black", font=font)
        canvas[:, CAPTION_PIXELS:, left : left + width] = frames
    canvas[:, :CAPTION_PIXELS] = np.asarray(header)
    return canvas
