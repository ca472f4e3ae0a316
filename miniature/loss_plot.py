"""The training loss as a picture."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from .training import Training

SIZE, MARGIN = (900, 420), 48
WINDOW = 50


def smoothed(losses: list[float], window: int = WINDOW) -> list[float]:
    """Mean of each loss and up to window - 1 before it."""
    means, total = [], 0.0
    for index, loss in enumerate(losses):
        total += loss - (losses[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


def plot_losses(training: Training, path: Path) -> None:
    """Every loss as a dot, their running mean as a line, stages as vertical lines."""
    losses = training.losses
    if not losses:
        return
    top = sorted(losses)[int(0.98 * (len(losses) - 1))] * 1.1
    width, height = SIZE
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)

    def at(step: float, loss: float) -> tuple[float, float]:
        x = MARGIN + (width - 2 * MARGIN) * step / max(1, training.recipe.steps)
        return x, height - MARGIN - (height - 2 * MARGIN) * min(loss, top) / top

    end = 0
    for stage in training.recipe.stages:
        end += stage.steps
        draw.line([at(end, 0), at(end, top)], fill=(220, 220, 220))
        label = f"{stage.frames}x{stage.height}x{stage.width}"
        draw.text((at(end - stage.steps, 0)[0] + 3, MARGIN - 16), label, fill=(120, 120, 120))
    for tenths in range(0, 11, 2):
        draw.text((6, at(0, top * tenths / 10)[1] - 6), f"{top * tenths / 10:.2f}", fill="black")
    first = training.first_step
    dots = [at(step, loss) for step, loss in enumerate(losses, first)]
    mean = [at(step, loss) for step, loss in enumerate(smoothed(losses), first)]
    draw.point(dots, fill=(170, 190, 220))
    draw.line(mean, fill=(20, 80, 160), width=2)
    draw.text(
        (MARGIN, height - 30), f"{training.step} steps, {training.seconds:.0f} s", fill="black"
    )
    image.save(path)
