"""A preset of type dense as a policy: it leaves every call to dense attention and says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..kernels import BlockPlan, TokenLayout


@dataclass(frozen=True)
class DensePreset:
    """What a `baseline` preset chooses. label: the preset, as the log names it."""

    label: str

    name: ClassVar[str] = "psa"
    is_static: ClassVar[bool] = False
    density_is_fixed: ClassVar[bool] = True

    def describe(self) -> str:
        """The preset, for the log."""
        return f"psa {self.label} (dense)"

    def pooling_reason(self) -> None:
        """None: any kernel will do."""

    def dense_reason(self, layout: TokenLayout) -> str:
        """Always a reason: the preset asks for dense attention."""
        return f"preset {self.label} is dense attention"

    def order(self, layout: TokenLayout) -> Tensor | None:
        """None: the tokens keep their order."""
        return None

    def plan(
        self, q: Tensor, k: Tensor, layout: TokenLayout, *, layer: int, scale: float
    ) -> BlockPlan:
        """Never called, since every layout has a dense reason.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(self.dense_reason(layout))

    def forecast(self, layout: TokenLayout) -> str:
        """As dense_reason."""
        return self.dense_reason(layout)
