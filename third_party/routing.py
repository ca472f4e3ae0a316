"""attention_forward: one call for any tensor layout and any installed attention library.

The routing call of the DiffSynth guide, with its implementation names and its environment
variable.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor

from ..kernels.memory_errors import is_out_of_memory
from .backend import DenseBackend
from .dense import DENSE_BACKENDS

ENVIRONMENT_VARIABLE = "DIFFSYNTH_ATTENTION_IMPLEMENTATION"

# The guide's names, in the order in which the first available one is taken.
IMPLEMENTATIONS = {
    "flash_attention_4": "flash_attn4",
    "flash_attention_3": "flash_attn3",
    "flash_attention_2": "flash_attn2",
    "sage_attention": "sage_attn2",
    "xformers": "xformers",
    "torch": "torch_sdpa",
}
_AXES = "b n s d"


def find_backend(name: str, asked_by: str = "implementation") -> DenseBackend:
    """The backend of an implementation name of the guide, or of a backend name.

    Raises:
        ValueError: no such name, or it cannot run on this machine, with how to install it.
    """
    lowered = name.lower()
    backend = DENSE_BACKENDS.get(IMPLEMENTATIONS.get(lowered, lowered))
    if backend is None:
        known = dict.fromkeys([*IMPLEMENTATIONS, *DENSE_BACKENDS])
        raise ValueError(f"{asked_by} is one of {', '.join(known)}; got {name!r}")
    reason = backend.unavailable()
    if reason is not None:
        raise ValueError(f"{asked_by} {name!r} cannot run on this machine: {reason}")
    return backend


def backend_from_environment() -> DenseBackend | None:
    """The backend that DIFFSYNTH_ATTENTION_IMPLEMENTATION names, None if it is not set.

    Raises:
        ValueError: as find_backend.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return find_backend(name, ENVIRONMENT_VARIABLE) if name else None


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pattern: str = "b n s d",
    k_pattern: str = "b n s d",
    v_pattern: str = "b n s d",
    out_pattern: str = "b n s d",
    dims: Mapping[str, int] | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention over tensors in any layout.

    Args:
        q, k, v: in the layouts the patterns name.
        q_pattern, k_pattern, v_pattern, out_pattern: einops patterns over b (batch), n (heads),
            s (tokens) and d (head dim), for example "b s (n d)".
        dims: sizes that the patterns cannot tell, for example {"n": 12}.
        attn_mask: as in torch's scaled_dot_product_attention, for [b, n, s, s] logits.
        scale: of the logits; 1 / sqrt(d) by default.
        implementation: a name from IMPLEMENTATIONS or of a dense backend; by default what the
            environment variable DIFFSYNTH_ATTENTION_IMPLEMENTATION names, else the first one
            that is available and takes the call. A call that the named one does not take (a
            mask, a head dim) goes to torch, and so, with a RuntimeWarning, does one it fails on.

    Returns:
        The output in the layout of out_pattern, in q's dtype.

    Raises:
        ValueError: a name is unknown or cannot run on this machine; a pattern does not fit; k and v
            differ in tokens.
    """
    q = _to_heads_first(q, q_pattern, dims, "q")
    k = _to_heads_first(k, k_pattern, dims, "k")
    v = _to_heads_first(v, v_pattern, dims, "v")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k has {k.shape[-2]} tokens and v {v.shape[-2]}; they must be as many")
    named = backend_from_environment() if implementation is None else find_backend(implementation)
    order = [DENSE_BACKENDS[name] for name in IMPLEMENTATIONS.values()]
    out = _attend(order if named is None else [named], q, k, v, attn_mask, scale)
    return _rearrange(out, _AXES, out_pattern, dims, "out")


def _attend(
    backends: Iterable[DenseBackend],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """The output of the first backend that is available and serves the call; torch serves all."""
    torch_sdpa = DENSE_BACKENDS["torch_sdpa"]
    for backend in backends:
        if backend.unavailable() is not None or backend is torch_sdpa:
            continue
        if backend.refuses(q, k, v, mask, scale) is not None:
            continue
        try:
            return backend.run(q, k, v, scale=scale, mask=mask)
        except Exception as error:  # a build without a kernel for this GPU or dtype, for example
            if is_out_of_memory(error):
                raise  # the next one would need as much
            cause = " ".join(str(error).split())[:300]
            warnings.warn(
                f"attention_forward passes over {backend.name}, which failed: "
                f"{type(error).__name__}: {cause}",
                RuntimeWarning,
                stacklevel=3,
            )
    return torch_sdpa.run(q, k, v, scale=scale, mask=mask)


def _to_heads_first(x: Tensor, pattern: str, dims: Mapping[str, int] | None, name: str) -> Tensor:
    return _rearrange(x, pattern, _AXES, dims, name)


def _rearrange(
    x: Tensor, source: str, target: str, dims: Mapping[str, int] | None, name: str
) -> Tensor:
    """einops.rearrange with the sizes that concern this tensor, as a view wherever one exists."""
    if source.split() == target.split():
        return x
    from einops import EinopsError, rearrange

    mentioned = set(source.replace("(", " ").replace(")", " ").split())
    sizes = {axis: size for axis, size in (dims or {}).items() if axis in mentioned}
    try:
        return rearrange(x, f"{source} -> {target}", **sizes)
    except EinopsError as error:
        pattern = target if name == "out" else source
        cause = " ".join(str(error).split())
        raise ValueError(
            f"{name}_pattern {pattern!r} does not fit {name} of shape {list(x.shape)} over the "
            f"axes b, n, s and d: {cause}"
        ) from None
