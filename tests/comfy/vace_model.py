"""A tiny VACE checkpoint, and what a run of it gives with only its main blocks sparse."""

import torch
from safetensors.torch import load_file, save_file

from .conftest import attention_in_band

SHAPE = (1, 16, 3, 16, 20)
TOKENS = 3 * 8 * 10
# Four main blocks; the two of VACE hang on 0 and 2.
MAIN, VACE_LAYERS = (0, 1, 2, 3), (0, 2)


def write_vace_checkpoint(wan, path):
    """The tiny WAN with two of its blocks once more, for the control."""
    weights = load_file(wan)
    generator = torch.Generator().manual_seed(5)
    dim = weights["blocks.0.self_attn.q.weight"].shape[0]
    for i, layer in enumerate(VACE_LAYERS):
        for name, value in list(weights.items()):
            if name.startswith(f"blocks.{layer}."):
                weights[f"vace_blocks.{i}.{name.removeprefix(f'blocks.{layer}.')}"] = value.clone()
        for projection in ("before_proj", "after_proj") if i == 0 else ("after_proj",):
            weight = torch.randn(dim, dim, generator=generator) * dim**-0.5
            weights[f"vace_blocks.{i}.{projection}.weight"] = weight.bfloat16()
            weights[f"vace_blocks.{i}.{projection}.bias"] = torch.zeros(dim).bfloat16()
    control = torch.randn(dim, 96, 1, 2, 2, generator=generator) * 384**-0.5
    weights["vace_patch_embedding.weight"] = control.bfloat16()
    weights["vace_patch_embedding.bias"] = torch.zeros(dim).bfloat16()
    save_file(weights, path)


class BandInMainBlocks:
    """The judge: dense attention under a band mask in main blocks, as it is in VACE blocks."""

    def __init__(self):
        self.in_vace = False

    def watch(self, net):
        for block in net.vace_blocks:
            yield block.register_forward_pre_hook(lambda *_: self.__setattr__("in_vace", True))
            yield block.register_forward_hook(lambda *_: self.__setattr__("in_vace", False))

    def __call__(self, func, q, k, v, heads, mask=None, *args, **kwargs):
        if self.in_vace or not q.shape[1] == k.shape[1] == TOKENS:
            return func(q, k, v, heads, mask, *args, **kwargs)
        return attention_in_band(q, k, v, heads)
