"""Where the video tokens of a forward are: one reader per model class.

A reader looks at the model's own forward arguments, never at the attention call, and returns a
TokenLayout or the reason why the class or this use of it is not known. Whatever has no place in
the video grid becomes prefix or suffix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..kernels import TokenLayout
from ..kernels.layout import Grid

WAN, COGVIDEOX = "WAN", "CogVideoX"
_FAMILY_BY_CLASS = {"WanModel": WAN, "CogVideoXTransformer3DModel": COGVIDEOX}

# Of the video's tokens: more sources and poses than that are chosen among, fewer cost little.
_LARGE_SHARE = 0.2

# Where every layer makes one self-attention call, layers can be counted if the host does not say
# which it is at: CogVideoX everywhere, WAN in older ComfyUIs.
_ONE_CALL_PER_LAYER = frozenset(
    {"WanModel", "CameraWanModel", "AnimateWanModel", "CogVideoXTransformer3DModel"}
)


@dataclass(frozen=True)
class ForwardTokens:
    """The tokens of one forward.

    Attributes:
        layout: of every self-attention call over the video.
        text_length, image_length: keys of the cross-attention calls to the text and to the
            reference image; None where the model has no such call. A call is known by its
            lengths, so a video of exactly that many tokens cannot be told from its context.
        frame_by_frame: self-attention comes in a call per frame, whose keys are those of the
            video and, but for the first frame, those of one frame more.
    """

    layout: TokenLayout
    text_length: int | None = None
    image_length: int | None = None
    frame_by_frame: bool = False

    def is_one_frame(self, q_len: int, k_len: int) -> bool:
        """Whether a call with so many queries and keys is one of those per frame."""
        if not self.frame_by_frame:
            return False
        frame, video = self.layout.tokens_per_frame, self.layout.num_tokens
        return q_len == frame and k_len in (video, video + frame)


def model_family(diffusion_model: nn.Module) -> str | None:
    """ "WAN" or "CogVideoX" for these models and everything derived from them, else None."""
    for cls in type(diffusion_model).__mro__:
        if cls.__name__ in _FAMILY_BY_CLASS:
            return _FAMILY_BY_CLASS[cls.__name__]
    return None


def countable_layers(diffusion_model: Any) -> int:
    """Layers of a model whose self-attention calls tell the layer by their order, 0 for others."""
    counts = type(diffusion_model).__name__ in _ONE_CALL_PER_LAYER
    return len(diffusion_model.blocks) if counts else 0


def fewest_calls(diffusion_model: nn.Module) -> int:
    """Self-attention calls that every forward of a model makes at least, 0 if not known.

    Every block of a known one makes one; of models that only dense backends are for there is one.
    """
    if is_readable(diffusion_model):
        return len(diffusion_model.blocks)  # type: ignore[arg-type]
    return 0 if model_family(diffusion_model) else 1


def may_come_frame_by_frame(diffusion_model: nn.Module) -> bool:
    """Whether there are steps in which self-attention comes in a call per frame."""
    return _READERS.get(type(diffusion_model).__name__) is _read_animate2


def may_have_more_tokens(diffusion_model: nn.Module) -> bool:
    """Whether it is made for references or poses that conditioning adds to the video's tokens."""
    reader = _READERS.get(type(diffusion_model).__name__)
    has_picture = getattr(diffusion_model, "ref_conv", None) is not None
    return has_picture or reader in (_read_s2v, _read_humo, _read_scail)


def supported_families() -> str:
    return " and ".join(sorted(set(_FAMILY_BY_CLASS.values()), reverse=True))


def _blocks(length: int, patch: int) -> int:
    """Patches along an axis after the model has padded it to whole patches."""
    return -(-length // patch)


def _grid(video: Tensor, patch: Sequence[int]) -> tuple[int, int, int]:
    """Patches of a [B, C, T, H, W] tensor that the model pads."""
    frames, height, width = (_blocks(n, p) for n, p in zip(video.shape[-3:], patch, strict=True))
    return frames, height, width


def _whole_patches(latent: Tensor, patch: Sequence[int]) -> int:
    """Patches of a latent that is not padded: a convolution drops what does not fill one."""
    return math.prod(n // p for n, p in zip(latent.shape[-len(patch) :], patch, strict=True))


def _argument(args: Sequence[Any], kwargs: dict[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


def _wan_tokens(
    model: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    prefix: int = 0,
    suffix: int = 0,
    videos: Sequence[Grid] = (),
    images: Sequence[Tensor | None] = (),
) -> ForwardTokens:
    """WanModel.forward(x, timestep, context, clip_fea, time_dim_concat, transformer_options).

    Args:
        videos: patches of what is behind the video, one after the other, before the suffix.
        images: CLIP features beside clip_fea.
    """
    patch: Sequence[int] = model.patch_size
    frames, height, width = _grid(_argument(args, kwargs, 0, "x"), patch)
    # Phantom's reference pictures: frames behind the video, but not of it.
    pictures = _argument(args, kwargs, 4, "time_dim_concat")
    if pictures is not None:
        suffix += _blocks(pictures.shape[2], patch[0]) * height * width
    # Pictures stand between the video and the others.
    behind = sum(map(math.prod, videos))
    chosen = behind > _LARGE_SHARE * frames * height * width and pictures is None
    text = _argument(args, kwargs, 2, "context")
    images = [_argument(args, kwargs, 3, "clip_fea"), *images]
    image_length = sum(image.shape[-2] for image in images if image is not None)
    # Models made for text alone have no image embedder and pass over the features.
    if getattr(model, "img_emb", None) is None:
        image_length = 0
    return ForwardTokens(
        TokenLayout(
            frames,
            height,
            width,
            prefix_tokens=prefix,
            suffix_tokens=behind + suffix,
            suffix_grids=tuple(videos) if chosen else (),
        ),
        text_length=None if text is None else text.shape[1],
        image_length=image_length or None,
    )


def _read_animate2(model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> ForwardTokens:
    """Animate 2: the reference is the video's first frame; a pose guides it frame by frame.

    In steps that its pose does not reach, attention is as in other models.
    """
    guided = kwargs.get("pose_latents") is not None
    return replace(_wan_tokens(model, args, kwargs), frame_by_frame=guided)


def _ref_conv_tokens(model: Any, kwargs: dict[str, Any]) -> int:
    """Fun control's reference picture, [B, C, H, W], in front of the video."""
    picture = kwargs.get("reference_latent")
    if getattr(model, "ref_conv", None) is None or picture is None:
        return 0
    return _whole_patches(picture, model.patch_size[1:])


def _read_wan(model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> ForwardTokens:
    """WanModel, and the classes that add nothing to its sequence.

    VACE's control blocks attend over the same tokens in calls of their own. The reference of
    Animate and of VACE is the first frame of the video as far as the model can tell.
    """
    return _wan_tokens(model, args, kwargs, prefix=_ref_conv_tokens(model, kwargs))


def _read_wan_in_context(model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> ForwardTokens:
    """WanModel itself, which appends Bernini's context latents, each of its own size."""
    context = kwargs.get("context_latents") or ()
    grids = [_grid(latent, model.patch_size) for latent in context]
    # Sources, of an image as large as it, then pictures, all of which is what keeps a face.
    video = _grid(_argument(args, kwargs, 0, "x"), model.patch_size)
    videos = list(itertools.takewhile(lambda grid: grid[0] > 1 or grid == video, grids))
    suffix = sum(map(math.prod, grids[len(videos) :]))
    prefix = _ref_conv_tokens(model, kwargs)
    return _wan_tokens(model, args, kwargs, prefix=prefix, suffix=suffix, videos=videos)


def _read_humo(model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> ForwardTokens:
    """HuMo: reference frames behind the video."""
    reference = kwargs.get("reference_latent")
    suffix = 0 if reference is None else _whole_patches(reference, model.patch_size)
    return _wan_tokens(model, args, kwargs, suffix=suffix)


def _motion_tokens(packer: Any, motion: Tensor) -> int:
    """S2V's FramePack: the latest frame in fine patches, older ones in ever coarser ones."""
    # Fewer frames than the buckets hold are padded, more are cut.
    convolutions = (packer.proj, packer.proj_2x, packer.proj_4x)
    return sum(
        frames // conv.kernel_size[0] * _whole_patches(motion, conv.kernel_size[1:])
        for frames, conv in zip(packer.zip_frame_buckets, convolutions, strict=True)
    )


def _read_s2v(model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> ForwardTokens:
    """S2V: reference frames behind the video, motion frames behind them."""
    reference, motion = kwargs.get("reference_latent"), kwargs.get("reference_motion")
    suffix = 0 if reference is None else _whole_patches(reference, model.patch_size)
    suffix += 0 if motion is None else _motion_tokens(model.frame_packer, motion)
    return _wan_tokens(model, args, kwargs, suffix=suffix)


def _read_scail(model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> ForwardTokens:
    """SCAIL 1 and 2: reference frames, the video, then poses, which may be of half size."""
    reference, pose = kwargs.get("reference_latent"), kwargs.get("pose_latents")
    prefix = 0 if reference is None else math.prod(_grid(reference, model.patch_size))
    videos = [] if pose is None else [_grid(pose, model.patch_size)]
    return _wan_tokens(model, args, kwargs, prefix=prefix, videos=videos)


def _read_wandancer(model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> ForwardTokens:
    """WanDancer: two pictures behind one another in the image context."""
    return _wan_tokens(
        model,
        args,
        kwargs,
        prefix=_ref_conv_tokens(model, kwargs),
        images=[kwargs.get("clip_fea_ref")],
    )


def _read_cogvideox(model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> ForwardTokens:
    """CogVideoXTransformer3DModel.forward(x, timestep, context, ofs, transformer_options)."""
    patch = (model.patch_embed.patch_size_t or 1, model.patch_size, model.patch_size)
    frames, height, width = _grid(_argument(args, kwargs, 0, "x"), patch)
    text = _argument(args, kwargs, 2, "context")
    return ForwardTokens(TokenLayout(frames, height, width, prefix_tokens=text.shape[1]))


_Reader = Callable[[Any, Sequence[Any], dict[str, Any]], ForwardTokens]
_READERS: dict[str, _Reader] = {
    "WanModel": _read_wan_in_context,
    "VaceWanModel": _read_wan,
    "CameraWanModel": _read_wan,
    "AnimateWanModel": _read_wan,
    "WanAnimate2Model": _read_animate2,
    "WanModel_S2V": _read_s2v,
    "HumoWanModel": _read_humo,
    "SCAILWanModel": _read_scail,
    "SCAIL2WanModel": _read_scail,
    "WanDancerModel": _read_wandancer,
    "CogVideoXTransformer3DModel": _read_cogvideox,
}
_WHY_NOT = {
    "CausalWanModel": (
        "CausalWanModel (autoregressive WAN) makes the video block by block, past ComfyUI's hooks"
    ),
}


def unreadable_reason(diffusion_model: nn.Module) -> str | None:
    """Why the video tokens of this exact model class are not known, None if they are."""
    name = type(diffusion_model).__name__
    # By exact class: a subclass may put its tokens elsewhere.
    if name in _READERS:
        return None
    return _WHY_NOT.get(name, f"where {name} keeps its video tokens is not known")


def is_readable(diffusion_model: nn.Module) -> bool:
    """Whether the video tokens of this exact model class are known."""
    return unreadable_reason(diffusion_model) is None


def read_tokens(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> ForwardTokens | str:
    """The tokens of a forward, or why they are not known.

    Args:
        model: the diffusion model.
        args, kwargs: what its forward was called with.
    """
    reason = unreadable_reason(model)
    return _READERS[type(model).__name__](model, args, kwargs) if reason is None else reason
