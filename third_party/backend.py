"""DenseBackend: an attention library behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .constraints import Constraints
from .library import Library


class Attend(Protocol):
    """A library's call: q, k, v [B, H, N, D], any strides -> [B, H, N, D]."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, mask: Tensor | None
    ) -> Tensor: ...


class Loaded(NamedTuple):
    """An imported library.

    Attributes:
        constraints: of the version that is installed, where they differ from the declared ones.
    """

    attend: Attend
    constraints: Constraints | None = None


class IsSound(Protocol):
    """Whether out is the attention of q, k and v; False if that cannot be told. Syncs.

    Raises ArithmeticError, with how far off it is.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, out: Tensor
    ) -> bool: ...


def has_no_nan(q: Tensor, k: Tensor, v: Tensor, scale: float | None, out: Tensor) -> bool:
    """IsSound of libraries that others have tried."""
    if not bool(torch.isnan(out).any()):
        return True
    if all(bool(x.isfinite().all()) for x in (q, k, v)):
        raise ArithmeticError("its first output for this shape holds a NaN")
    return False


@dataclass(frozen=True, eq=False)
class DenseBackend:
    """A way to run dense attention.

    Attributes:
        name: as users write it.
        declared: what its current version can be called with.
        load: imports the library; raises whatever the import raises.
        library: None where nothing has to be installed.
        is_sound: for the nodes to ask about their first output for a shape.
        unfit: () -> None, or why what is installed cannot run here, beyond the constraints.
    """

    name: str
    declared: Constraints
    load: Callable[[], Loaded]
    library: Library | None = None
    is_sound: IsSound = has_no_nan
    unfit: Callable[[], str | None] = lambda: None

    @cached_property
    def _probed(self) -> tuple[Loaded | None, str | None]:
        if self.library is None:
            return self.load(), None
        return self.library.probe(self.load)

    @property
    def constraints(self) -> Constraints:
        """Of the installed version, or the declared ones where none works."""
        loaded, _ = self._probed
        return (loaded.constraints if loaded is not None else None) or self.declared

    @cached_property
    def _unavailable(self) -> tuple[str | None, str | None]:
        """(the whole reason, what decides in it)."""
        _, broken = self._probed
        no_device = self.constraints.machine_reason() or (None if broken else self.unfit())
        if self.library is None:
            return no_device, no_device
        # Where the machine can never run it nothing is to be installed.
        return self.library.unavailable_because(broken, no_device), no_device or broken

    def unavailable(self) -> str | None:
        """None, or why it cannot run on this machine and what would change that."""
        return self._unavailable[0]

    def unavailable_in_short(self) -> str | None:
        """None, or why it cannot run on this machine."""
        return self._unavailable[1]

    def refuses(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
        low_precision_allowed: bool = True,
    ) -> str | None:
        """None, or why it cannot serve this call. No device work."""
        return self.constraints.check(q, k, v, mask, scale, low_precision_allowed)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of a call that it does not refuse.

        Args:
            q: [B, H, N, D]; k, v: [B, H, N', D]; any strides. They are not changed.
            scale: of the logits; 1 / sqrt(D) by default.
            mask: as in torch's scaled_dot_product_attention.

        Returns:
            [B, H, N, D] in q's dtype.
        """
        loaded, broken = self._probed
        if loaded is None:
            raise ValueError(f"{self.name} cannot run: {broken}")
        overwritten = self.constraints.in_place_inputs
        q = q.clone() if "q" in overwritten else q
        k = k.clone() if "k" in overwritten else k
        v = v.clone() if "v" in overwritten else v
        # Triton and the Python DSLs launch on the current device, wherever the tensors are.
        with torch.cuda.device_of(q):
            return loaded.attend(q, k, v, scale=scale, mask=mask)


def dense_rows(x: Tensor) -> Tensor:
    """x itself where the channels of a token are adjacent in memory, as kernels want; or a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def token_major(x: Tensor) -> Tensor:
    """[B, H, N, D] as [B, N, H, D], or back, without a copy."""
    return dense_rows(x).transpose(1, 2)


def is_token_major(x: Tensor) -> bool:
    """True where the heads of a token [B, H, N, D] are nearer in memory than its neighbours."""
    return x.stride(1) < x.stride(2)


def first_output(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output of calls that in some versions return (output, log-sum-exp)."""
    return out[0] if isinstance(out, tuple) else out
