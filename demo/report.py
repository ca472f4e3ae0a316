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

from .comparison import Comparison, SparseRun, Weights, pack_lines

# Of the longest bar; the number behind it needs the rest.
BAR_WIDTH = "70%"
TEMPLATE = Path(__file__).with_name("report.html")

NOTICES: dict[Weights, str] = {
    "tiny": (
        "<b>This is not a real video.</b> The weights are tiny and were drawn at random by this "
        "project, so the clouds below mean nothing and say nothing about the quality of a trained "
        "model. What is real: ComfyUI, its model classes, the sampler, the nodes, the masks and "
        "the times of this machine. For real videos, run the demo with <code>--unet</code>, "
        "<code>--clip</code> and <code>--vae</code>."
    ),
    "miniature": (
        "From a <b>miniature</b>: a model with the true architecture, a thousandth of the real "
        "size, that this project trained on moving shapes. Its attention is learned, so what "
        "sparsity does to the picture can be seen; how much it costs a large model cannot be read "
        "off it. For real videos, run the demo with <code>--unet</code>, <code>--clip</code> and "
        "<code>--vae</code>."
    ),
    "real": (
        "Videos of the weights and the prompt that were given, one seed. Runs of one prompt are "
        "an example, not a measurement of quality."
    ),
}


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


def _speed(comparison: Comparison, run: SparseRun) -> str:
    speedup = comparison.speedup(run)
    return f"{speedup:.2f}x faster" if speedup >= 1 else f"{1 / speedup:.2f}x slower"


def _closeness(run: SparseRun) -> str:
    return "equal" if math.isinf(run.psnr) else f"{run.psnr:.1f} dB"


def _bar(seconds: float, longest: float, kind: str) -> str:
    width = f"calc({BAR_WIDTH} * {seconds / longest:.3f})"
    return (
        f'<div class="bar"><i class="{kind}" style="width:{width}"></i>'
        f"<span>{seconds:.1f} s</span></div>"
    )


def _results(comparison: Comparison) -> str:
    """A row per run: time, speed, density, and how close it is to the dense one."""
    runs = comparison.runs
    times = [comparison.dense.sampler_seconds, *(run.result.sampler_seconds for run in runs)]
    longest = max(times)
    with_latents = any(run.latent_error is not None for run in runs)
    heads = ["", "sampling time", "", "density", "PSNR", *(["latent error"] * with_latents)]
    rows = [["dense", _bar(times[0], longest, "dense"), "", "100%", "", *([""] * with_latents)]]
    for run, seconds in zip(runs, times[1:], strict=True):
        row = [
            html.escape(run.method.title),
            _bar(seconds, longest, "sparse"),
            _speed(comparison, run),
            "nothing sparse" if run.density is None else f"{run.density:.0%}",
            _closeness(run),
        ]
        rows.append(row + ([f"{run.latent_error:.1%}"] if run.latent_error is not None else []))
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="results"><tr>{head}</tr>{body}</table>'


def _facts(comparison: Comparison) -> str:
    width, height, frames = comparison.size
    rows = {"video": f"{width} x {height}, {frames} frames, {comparison.steps} steps"}
    if comparison.layout is not None:
        rows["tokens"] = f"{comparison.layout.num_tokens} ({comparison.layout})"
    for run in comparison.runs:
        settings = (f"{name} {value}" for name, value in run.settings.items() if value != "")
        rows[run.method.title] = ", ".join(settings)
    rows["colours"] = comparison.colours
    cells = (f"<tr><td>{k}</td><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _section(comparison: Comparison) -> str:
    video = _data_url("video/mp4", comparison.videos["side_by_side"].read_bytes())
    mask = ""
    if comparison.mask is not None:
        mask = (
            "<h3>The radial mask</h3>"
            f'<img alt="block mask" src="{_png(comparison.mask)}">'
            '<p class="soft">A row per block of queries, a column per block of keys; blue blocks '
            "are computed, grey ones left out or attended to through their means, white lines "
            "are borders of frames. Near frames see each other whole, "
            "distant ones through a window that narrows, and all see the first frame. PSA and "
            "Sparge choose their blocks anew at every call.</p>"
        )
    lines = "\n\n".join(
        html.escape(line) for run in comparison.runs for line in pack_lines(run.result.log)
    )
    pictures = "".join(
        f'<img alt="what ran with {html.escape(run.method.title)}" src="{_png(run.report)}">'
        for run in comparison.runs
    )
    prompt = ""
    if comparison.prompt is not None:
        prompt = f'<p class="soft">&ldquo;{html.escape(comparison.prompt)}&rdquo;</p>'
    return f"""<section>
<h2>{html.escape(comparison.family.title)}</h2>
{prompt}
<div class="notice">{NOTICES[comparison.weights]}</div>
<video src="{video}" autoplay loop muted playsinline controls></video>
{_results(comparison)}
<div class="split">
<div>{mask}</div>
<div><h3>Settings</h3>{_facts(comparison)}</div>
</div>
<h3 class="logged">What ran, as <i>Attention Report</i> shows it</h3>
<div class="reports">{pictures}</div>
<h3 class="logged">What the pack logged</h3><pre>{lines}</pre>
</section>"""


def write_report(path: Path, comparisons: Sequence[Comparison], system: dict[str, Any]) -> Path:
    """Write the page.

    Args:
        system: ComfyUI's /system_stats.
    """
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        machine=html.escape(machine_line(system)),
        sections="\n".join(_section(comparison) for comparison in comparisons),
    )
    path.write_text(page, encoding="utf-8")
    return path
