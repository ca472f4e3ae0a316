"""The training loop. A step is a function of the recipe, its number and the state before it.

So a run that was interrupted goes on exactly as if it had not been.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .batches import Batch, make_batch
from .models import family_of, frozen, hidden_matrix, make_model
from .muon import Muon
from .noise import weighted_loss
from .parallel import Workers, gather_gradients, replicas
from .recipe import Recipe

GRADIENT_NORM = 1.0


class Training:
    """Model, optimisers and averaged weights, at some step.

    Args:
        device: where the model is.
        autocast: half precision for matrix products, None for fp32.
        compiled: compile the blocks.
        workers: threads that share a step, for CPUs.

    Attributes:
        step: how many are done.
        first_step: the one that this training began with: 0, or where weights were taken over.
        losses: of the steps done since then.
        seconds: spent in steps, over all runs.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: str = "cpu",
        *,
        autocast: torch.dtype | None = None,
        compiled: bool = False,
        workers: int = 1,
    ) -> None:
        self.recipe = recipe
        self.device = torch.device(device)
        self.autocast = autocast
        self.family = family_of(recipe)
        self.model = make_model(recipe).to(self.device)
        self._signal = self.family.colours.signal().to(self.device)
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(not frozen(name))
        self.average = {n: w.detach().clone() for n, w in self.model.state_dict().items()}
        self._workers = Workers(workers)
        self._copies = replicas(self.model, workers)
        self.optimisers = self._optimisers()
        if compiled:
            for block in self.model.get_submodule("blocks").children():
                block.compile(dynamic=False)
        self.step = self.first_step = 0
        self.losses: list[float] = []
        self.seconds = 0.0

    def _optimisers(self) -> tuple[Optimizer, ...]:
        trained = [(n, w) for n, w in self.model.named_parameters() if w.requires_grad]
        matrices = [w for n, w in trained if hidden_matrix(n, w)]
        others = [w for n, w in trained if not hidden_matrix(n, w)]
        return (
            Muon(matrices, lr=self.recipe.matrix_lr, weight_decay=0.01, workers=self._workers),
            AdamW(others, lr=self.recipe.vector_lr, betas=(0.9, 0.98), weight_decay=0.0),
        )

    def run_step(self, batch: Batch | None = None) -> Tensor:
        """One step of the optimisers; returns its loss, still on the device.

        Args:
            batch: this step's, if it has been made already.
        """
        batch = make_batch(self.recipe, self.step) if batch is None else batch
        loss = self._backward(batch.to(self.device))
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        rate = self.recipe.learning_rate(self.step, self.first_step)
        rates = (self.recipe.matrix_lr, self.recipe.vector_lr)
        for optimiser, full in zip(self.optimisers, rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = full * rate
            optimiser.step()
            optimiser.zero_grad()
        self._average()
        self.step += 1
        return loss

    def _backward(self, batch: Batch) -> Tensor:
        """Leave the gradients in the model; returns the loss."""
        clips = len(batch.noisy)
        count = min(self._workers.count, clips)
        split = zip(*(part.tensor_split(count) for part in batch), strict=True)
        parts = zip(self._copies[:count], split, strict=True)

        def backward(work: tuple[nn.Module, tuple[Tensor, ...]]) -> Tensor:
            model, (noisy, target, timestep, context) = work
            with torch.autocast(self.device.type, self.autocast, self.autocast is not None):
                said = model(noisy, timestep, context)
            error = said.float() - target
            loss = weighted_loss(error, self._signal, self.recipe.unseen_weight)
            loss = loss * (len(noisy) / clips)
            loss.backward()
            return loss.detach()

        losses = list(self._workers.map(backward, parts))
        gather_gradients(self._copies)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _average(self) -> None:
        # Short at first, so that the random start is soon forgotten.
        keep = min(1 - 1 / self.recipe.ema_steps, (1 + self.step) / (10 + self.step))
        weights = self.model.state_dict()
        torch._foreach_lerp_(
            list(self.average.values()), [weights[name] for name in self.average], 1 - keep
        )

    def state(self) -> dict[str, Any]:
        """All of it, for torch.save."""
        return {
            "recipe": repr(self.recipe),
            "step": self.step,
            "first_step": self.first_step,
            "losses": self.losses,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it belongs to a model of another size.
        """
        self._take_over(state["model"])
        self.average = {n: w.to(self.device) for n, w in state["average"].items()}
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.losses = state["step"], list(state["losses"])
        self.first_step = state["first_step"]
        self.seconds = state["seconds"]

    def begin_with(self, weights: dict[str, Tensor], *, step: int, seconds: float) -> None:
        """Go on from weights alone: the optimisers begin anew, with a warm-up of their own.

        Args:
            step, seconds: how long they have been trained.

        Raises:
            ValueError: they belong to a model of another size.
        """
        self._take_over(weights)
        self.average = {n: w.detach().clone() for n, w in self.model.state_dict().items()}
        self.step = self.first_step = step
        self.seconds = seconds

    def _take_over(self, weights: dict[str, Tensor]) -> None:
        shapes = {name: tuple(w.shape) for name, w in weights.items()}
        own = {name: tuple(w.shape) for name, w in self.model.state_dict().items()}
        if shapes != own:
            raise ValueError("the saved state belongs to a model of another size")
        self.model.load_state_dict(weights)


def save_state(training: Training, path: Path) -> None:
    """Write it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(training.state(), partial)
    partial.replace(path)
