"""Animate 2 as newer ComfyUIs have it, or, on an older one, a model that calls attention likewise.

A pose video guides the frames behind the reference: each frame's queries come in a call of their
own, with the keys of all tokens and, but for the reference in front, those of the frame's pose.
"""

import importlib

import torch
import torch.nn.functional as F
from sparse_video_attention.kernels import TokenLayout

from .model_variants import wan
from .variant_model import Model

CODE, NAME = "wan.model_animate2", "WanAnimate2Model"
LAYOUT = TokenLayout(3, 8, 10)
FRAME, VIDEO = LAYOUT.tokens_per_frame, LAYOUT.num_tokens
POSE = (1, 16, 2, 16, 20)
_I2V = dict(config={"in_dim": 36, "out_dim": 16}, x=(1, 36, 3, 16, 20))


def animate2(comfyui):
    """The Model, of ComfyUI's own class where there is one; is_comfyuis_own says whether it is."""
    try:
        importlib.import_module(f"comfy.ldm.{CODE}")
    except ModuleNotFoundError:
        model = Model(comfyui, wan(**_I2V))
        model.net.__class__ = _stand_in()
        model.dense = model.run(model.patcher)[0]
        model.is_comfyuis_own = False
        return model
    model = Model(comfyui, wan(code=CODE, name=NAME, **_I2V))
    model.is_comfyuis_own = True
    return model


def _stand_in():
    from comfy.ldm.wan import model as wan_model

    class SelfAttention(wan_model.WanSelfAttention):
        pose = None

        def forward(self, x, freqs, transformer_options=None):
            if self.pose is None:
                return super().forward(x, freqs, transformer_options=transformer_options)
            q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
            frames = []
            for frame, queries in enumerate(q.split(LAYOUT.tokens_per_frame, dim=1)):
                pose = [self.pose.expand(len(k), -1, -1)] if frame else []
                keys, values = torch.cat([k, *pose], dim=1), torch.cat([v, *pose], dim=1)
                frames.append(
                    wan_model.optimized_attention(
                        queries,
                        keys,
                        values,
                        heads=self.num_heads,
                        transformer_options=transformer_options,
                    )
                )
            return self.o(torch.cat(frames, dim=1))

    class Guided(wan_model.WanModel):
        def forward_orig(self, *args, pose_latents=None, **kwargs):
            pose = None
            if pose_latents is not None:
                size = (1, LAYOUT.tokens_per_frame, self.dim)
                pose = pose_latents.flatten().repeat(4)[: size[1] * size[2]].view(size)
            for block in self.blocks:
                block.self_attn.__class__ = SelfAttention
                block.self_attn.pose = pose
            return super().forward_orig(*args, **kwargs)

    Guided.__name__ = NAME
    return Guided


class BandByFrames:
    """Band attention of blocks of 64 in every frame's call, as dense attention under a mask.

    A block of a frame's queries may meet two of the video's blocks: it sees what both see.
    """

    def __init__(self, dense_layers):
        self.dense_layers = dense_layers
        self.frame = 0

    def __call__(self, func, q, k, v, heads, mask=None, **kwargs):
        layer = kwargs["transformer_options"]["block_index"]
        if q.shape[1] != FRAME or k.shape[1] not in (VIDEO, VIDEO + FRAME):
            return func(q, k, v, heads, mask, **kwargs)
        self.frame = 0 if k.shape[1] == VIDEO else self.frame + 1
        if layer in self.dense_layers:
            return func(q, k, v, heads, mask, **kwargs)
        at = torch.arange(FRAME)
        first = at // 64 * 64
        last = (first + 64).clamp(max=FRAME) - 1
        key = torch.arange(k.shape[1]) // 64
        seen = [
            ((self.frame * FRAME + edge)[:, None] // 64 - key).abs() <= 1 for edge in (first, last)
        ]
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[0] | seen[1])
        return out.transpose(1, 2).flatten(2)
