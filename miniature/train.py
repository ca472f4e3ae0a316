"""python -m miniature.train: train a miniature, with a progress bar, stoppable at any time.

The state is kept under outputs/miniature/<recipe>/, and the same command goes on from it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from .batches import batches
from .loss_plot import plot_losses
from .recipes import RECIPES
from .training import Training, save_state
from .weights import card_path, weights_path

OUTPUT = Path(__file__).resolve().parents[1] / "outputs" / "miniature"
SMOOTHING = 50


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m miniature.train", description=__doc__)
    parser.add_argument("recipe", choices=sorted(RECIPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="of matrix products (default: bf16 on a GPU, fp32 on a CPU)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="threads that share a step on a CPU (default: 1)"
    )
    parser.add_argument(
        "--data-processes",
        type=int,
        help="that make clips ahead (default: 0 on a CPU, else all cores but two)",
    )
    parser.add_argument(
        "--from-weights",
        action="store_true",
        help="without a state, go on from the repository's weights, at the step their card says",
    )
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--minutes", type=float, help="stop after this long (default: at the end)")
    parser.add_argument("--save-every", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="(default: %(default)s)")
    return parser


def _begin_with_weights(training: Training) -> None:
    family = training.recipe.family
    weights = {name: weight.float() for name, weight in load_file(weights_path(family)).items()}
    card = json.loads(card_path(family).read_text(encoding="utf-8"))
    training.begin_with(weights, step=card["steps"], seconds=card["seconds"])


def train(options: argparse.Namespace) -> Training:
    """Train until the recipe's end, the given minutes, or an interrupt; the state is saved."""
    precision = options.precision or ("fp32" if options.device == "cpu" else "bf16")
    processes = options.data_processes
    if processes is None:
        processes = 0 if options.device == "cpu" else max(1, (os.cpu_count() or 1) - 2)
    folder = options.output / options.recipe
    path = folder / "state.pt"
    training = Training(
        RECIPES[options.recipe],
        options.device,
        autocast=torch.bfloat16 if precision == "bf16" else None,
        compiled=options.compile,
        workers=options.workers,
    )
    if path.exists():
        training.load(torch.load(path, map_location="cpu", weights_only=True))
    elif options.from_weights:
        _begin_with_weights(training)

    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    started = saved = time.monotonic()
    recent: list[float] = training.losses[-SMOOTHING:]
    title = f"{options.recipe} on {options.device}, {precision}, pid {os.getpid()}"
    with tqdm(
        total=training.recipe.steps, initial=training.step, desc=title, unit="step", mininterval=5
    ) as bar:
        before = time.monotonic()
        for batch in batches(training.recipe, training.step, processes):
            loss = float(training.run_step(batch))
            now = time.monotonic()
            training.losses.append(loss)
            training.seconds += now - before
            before = now
            recent = [*recent, loss][-SMOOTHING:]
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}", refresh=False)
            bar.update()
            out_of_time = options.minutes is not None and now - started > 60 * options.minutes
            if stopped or out_of_time:
                break
            if now - saved > options.save_every:
                save_state(training, path)
                plot_losses(training, folder / "loss.png")
                saved = time.monotonic()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    save_state(training, path)
    plot_losses(training, folder / "loss.png")
    return training


if __name__ == "__main__":
    train(_parser().parse_args())
