"""The page about a demo run: one HTML file with everything in it."""

from __future__ import annotations

import base64
import html
import io
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
from PIL import Image

from .comparison import Comparison, pack_lines

TEMPLATE = Path(__file__).with_name("report.html")

TINY_NOTICE = (
    "<b>These are not real videos.</b> The weights are tiny and were drawn at random by "
    "this project, so the clouds below mean nothing and say nothing about the quality of a "
    "trained model. What is real: ComfyUI, its model classes, the sampler, the nodes, the masks "
    "and the times of this machine. For real videos, run the demo with "
    "<code>--unet</code>, <code>--clip</code> and <code>--vae</code>."
)
REAL_NOTICE = (
    "Videos of the weights and the prompt that were given, one seed. Two runs of one prompt are "
    "an example, not a measurement of quality."
)


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return _data_url("image/png", buffer.getvalue())


def machine_line(system: dict[str, Any]) -> str:
    """The machine and the versions that made the numbers."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available():
        device = f"{platform.machine()} with Metal"
    else:
        device = f"CPU, {os.cpu_count()} cores"
    comfyui = system.get("system", {}).get("comfyui_version", "unknown")
    return f"{device}. ComfyUI {comfyui}, PyTorch {torch.__version__}, {platform.system()}."


def _number(value: str, label: str) -> str:
    return f'<div class="number"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'


def _numbers(comparison: Comparison) -> str:
    speedup = comparison.speedup
    faster = f"{speedup:.2f}x" if speedup >= 1 else f"{1 / speedup:.2f}x"
    density = "none" if comparison.density is None else f"{comparison.density:.0%}"
    db = "equal" if math.isinf(comparison.psnr) else f"{comparison.psnr:.1f} dB"
    cards = [
        _number(faster, "faster sampling" if speedup >= 1 else "slower sampling"),
        _number(density, "of the key blocks in sparse calls"),
        _number(db, "PSNR, sparse against dense"),
    ]
    if comparison.latent_error is not None:
        cards.append(_number(f"{comparison.latent_error:.1%}", "relative error of the latent"))
    return "\n".join(cards)


def _bars(comparison: Comparison) -> str:
    runs = {
        "dense": comparison.dense.sampler_seconds,
        "sparse": comparison.sparse.sampler_seconds,
    }
    longest = max(runs.values())
    return "\n".join(
        f'<div class="bar"><span>{name}</span>'
        f'<i class="{name}" style="width:{seconds / longest:.1%}"></i>'
        f"<span>{seconds:.1f} s</span></div>"
        for name, seconds in runs.items()
    )


def _facts(comparison: Comparison) -> str:
    width, height, frames = comparison.size
    rows = {"video": f"{width} x {height}, {frames} frames, {comparison.steps} steps"}
    if comparison.layout is not None:
        rows["tokens"] = f"{comparison.layout.num_tokens} ({comparison.layout})"
    rows["node"] = ", ".join(f"{name} {value}" for name, value in comparison.settings.items())
    rows["colours"] = comparison.colours
    cells = (f"<tr><td>{k}</td><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _section(comparison: Comparison) -> str:
    video = _data_url("video/mp4", comparison.videos["side_by_side"].read_bytes())
    mask = ""
    if comparison.mask is not None:
        mask = (
            "<h3>The mask</h3>"
            f'<img alt="block mask" src="{_png(comparison.mask)}">'
            '<p class="soft">A row per block of queries, a column per block of keys; blue blocks '
            "are computed, white lines are borders of frames. Near frames see each other whole, "
            "distant ones through a window that narrows, and all see the first frame.</p>"
        )
    lines = "\n".join(html.escape(line) for line in pack_lines(comparison.sparse.log))
    return f"""<section>
<h2>{html.escape(comparison.family.title)}</h2>
<div class="numbers">{_numbers(comparison)}</div>
<video src="{video}" autoplay loop muted playsinline controls></video>
<div class="split">
<div>{mask}</div>
<div><h3>Sampling time</h3>{_bars(comparison)}
{_facts(comparison)}
<h3 style="margin-top:20px">What the pack logged</h3><pre>{lines}</pre></div>
</div>
</section>"""


def write_report(
    path: Path, comparisons: Sequence[Comparison], system: dict[str, Any], *, is_real: bool
) -> Path:
    """Write the page.

    Args:
        system: ComfyUI's /system_stats.
        is_real: the weights were given, not made here.
    """
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        machine=html.escape(machine_line(system)),
        notice=REAL_NOTICE if is_real else TINY_NOTICE,
        sections="\n".join(_section(comparison) for comparison in comparisons),
    )
    path.write_text(page, encoding="utf-8")
    return path
