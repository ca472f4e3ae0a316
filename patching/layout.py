"""Where the video tokens of a forward are: one reader per model class.

A reader looks at the model's own forward arguments, never at the attention call, and returns a
TokenLayout or the reason why the class or this use of it is not known. Whatever has no place in
the video grid becomes prefix or suffix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..kernels import TokenLayout

WAN, COGVIDEOX = "WAN", "CogVideoX"
_FAMILY_BY_CLASS = {"WanModel": WAN, "CogVideoXTransformer3DModel": COGVIDEOX}

# The attention layer index: WAN announces it, CogVideoX has to be counted.
COUNTED_LAYERS = frozenset({COGVIDEOX})


@dataclass(frozen=True)
class ForwardTokens:
    """The tokens of one forward.

    Attributes:
        layout: of every self-attention call over the video.
        text_length, image_length: keys of the cross-attention calls to the text and to the
            reference image; None where the model has no such call. A call is known by its
            lengths, so a video of exactly that many tokens cannot be told from its context.
    """

    layout: TokenLayout
    text_length: int | None = None
    image_length: int | None = None


def model_family(diffusion_model: nn.Module) -> str | None:
    """ "WAN" or "CogVideoX" for these models and everything derived from them, else None."""
    for cls in type(diffusion_model).__mro__:
        if cls.__name__ in _FAMILY_BY_CLASS:
            return _FAMILY_BY_CLASS[cls.__name__]
    return None


def supported_families() -> str:
    return " and ".join(sorted(set(_FAMILY_BY_CLASS.values()), reverse=True))


def _blocks(length: int, patch: int) -> int:
    """Patches along an axis after the model has padded it to whole patches."""
    return -(-length // patch)


def _grid(video: Tensor, patch: Sequence[int]) -> tuple[int, int, int]:
    """Patches of a [B, C, T, H, W] tensor."""
    frames, height, width = (_blocks(n, p) for n, p in zip(video.shape[-3:], patch, strict=True))
    return frames, height, width


def _argument(args: Sequence[Any], kwargs: dict[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _read_wan(model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> ForwardTokens:
    """WanModel.forward(x, timestep, context, clip_fea, time_dim_concat, transformer_options)."""
    patch: Sequence[int] = model.patch_size
    frames, height, width = _grid(_argument(args, kwargs, 0, "x"), patch)
    extra_frames = _argument(args, kwargs, 4, "time_dim_concat")
    if extra_frames is not None:
        frames += _blocks(extra_frames.shape[2], patch[0])
    prefix = suffix = 0
    reference = kwargs.get("reference_latent")
    if getattr(model, "ref_conv", None) is not None and reference is not None:
        # A plain strided convolution: what does not fill a patch is dropped, not padded.
        prefix = (reference.shape[-2] // patch[1]) * (reference.shape[-1] // patch[2])
    for latent in kwargs.get("context_latents") or ():
        rows = _grid(latent, patch)
        suffix += rows[0] * rows[1] * rows[2]
    text = _argument(args, kwargs, 2, "context")
    image = _argument(args, kwargs, 3, "clip_fea")
    return ForwardTokens(
        TokenLayout(frames, height, width, prefix_tokens=prefix, suffix_tokens=suffix),
        text_length=None if text is None else text.shape[1],
        image_length=None if image is None else image.shape[-2],
    )


def _read_cogvideox(model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> ForwardTokens:
    """CogVideoXTransformer3DModel.forward(x, timestep, context, ofs, transformer_options)."""
    patch = (model.patch_embed.patch_size_t or 1, model.patch_size, model.patch_size)
    frames, height, width = _grid(_argument(args, kwargs, 0, "x"), patch)
    text = _argument(args, kwargs, 2, "context")
    return ForwardTokens(TokenLayout(frames, height, width, prefix_tokens=text.shape[1]))


_Reader = Callable[[Any, Sequence[Any], dict[str, Any]], ForwardTokens]
_READERS: dict[str, _Reader] = {
    "WanModel": _read_wan,
    "CogVideoXTransformer3DModel": _read_cogvideox,
}


def is_readable(diffusion_model: nn.Module) -> bool:
    """Whether the video tokens of this exact model class are known."""
    return type(diffusion_model).__name__ in _READERS


def read_tokens(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> ForwardTokens | str:
    """The tokens of a forward, or why they are not known.

    Args:
        model: the diffusion model.
        args, kwargs: what its forward was called with.
    """
    name = type(model).__name__
    # By exact class: a subclass may put its tokens elsewhere.
    reader = _READERS.get(name)
    if reader is None:
        return f"where {name} keeps its video tokens is not known"
    return reader(model, args, kwargs)
