"""ComfyUI's model patches for WAN beside this pack: talking heads and camera control.

Both work between the blocks, on tokens in the video's own order. Small networks of ComfyUI's own
classes with random weights, put on by ComfyUI's own nodes.
"""

import torch

DIM, LAYERS = 256, 4
# 9 frames of 128x96 are 3 latent frames of 12x16.
FRAMES, HEIGHT, WIDTH = 9, 96, 128


class Encoder:
    """A VAE in so far as the nodes ask one: pixels to latents of WAN's sizes."""

    def encode(self, pixels):
        frames = (pixels.shape[0] - 1) // 4 + 1
        generator = torch.Generator().manual_seed(3)
        shape = (1, 16, frames, pixels.shape[1] // 8, pixels.shape[2] // 8)
        return torch.randn(shape, generator=generator)

    def temporal_compression_decode(self):
        return 4

    def spacial_compression_encode(self):
        return 8


def _as_patch(network):
    """A MODEL_PATCH, as ComfyUI's ModelPatchLoader makes it, with weights that do something."""
    import comfy.model_management as management
    import comfy.model_patcher

    generator = torch.Generator().manual_seed(5)
    for weight in network.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = noise * max(weight[0].numel(), 1) ** -0.5
    return comfy.model_patcher.CoreModelPatcher(
        network.eval().requires_grad_(False),
        load_device=management.get_torch_device(),
        offload_device=management.unet_offload_device(),
    )


def uni3c(model):
    """Camera control: residuals of a network of its own are added behind each block."""
    import comfy.ops
    from comfy.ldm.wan.uni3c import WanUni3CControlnet
    from comfy_extras.nodes_model_patch import WanUni3CControlnetApply

    network = WanUni3CControlnet(
        conv_out_dim=DIM,
        dim=128,
        ffn_dim=128,
        num_heads=2,
        num_layers=LAYERS - 1,
        time_embed_dim=DIM,
        out_proj_dim=DIM,
        operations=comfy.ops.manual_cast,
    )
    render = torch.rand(FRAMES, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(6))
    return WanUni3CControlnetApply().apply_patch(
        model, _as_patch(network), Encoder(), render, 1.0, 0.0, 1.0
    )[0]


class _Talk(torch.nn.Module):
    """What InfiniteTalk adds to a model, at this model's width (ComfyUI's class fixes 40 heads)."""

    def __init__(self):
        super().__init__()
        import comfy.ops
        from comfy.ldm.wan.model_multitalk import (
            MultiTalkAudioProjModel,
            SingleStreamMultiAttention,
        )

        operations = comfy.ops.manual_cast
        self.audio_proj = MultiTalkAudioProjModel(
            seq_len_vf=8, blocks=2, channels=16, intermediate_dim=32, out_dim=48,
            context_tokens=4, operations=operations,
        )  # fmt: skip
        self.blocks = torch.nn.ModuleList()
        for _ in range(LAYERS):
            block = torch.nn.Module()
            block.audio_cross_attn = SingleStreamMultiAttention(
                DIM, 48, num_heads=2, qkv_bias=True, operations=operations
            )
            block.norm_x = operations.LayerNorm(DIM)
            self.blocks.append(block)


def _audio(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoded_audio_all_layers": list(torch.randn(3, 1, 4 * FRAMES, 16, generator=generator))
    }


def infinite_talk(speakers, *, goes_on=False):
    """Talking heads: attention to sound behind each block's attention to text, frame by frame.

    Two speakers are told apart by what tokens attend to, from q and k. goes_on: from the last
    frames of a video before.
    """

    def apply(model):
        from comfy_extras.nodes_wan import WanInfiniteTalkToVideo

        mode = {"mode": "single_speaker"}
        if speakers == 2:
            left = torch.zeros(1, HEIGHT, WIDTH)
            left[..., : WIDTH // 2] = 1.0
            mode = {
                "mode": "two_speakers",
                "audio_encoder_output_2": _audio(8),
                "mask_1": left,
                "mask_2": 1.0 - left,
            }
        picture = torch.rand(1, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(6))
        return WanInfiniteTalkToVideo.execute(
            mode, model, _as_patch(_Talk()), [], [], Encoder(), WIDTH, HEIGHT, FRAMES, _audio(7),
            motion_frame_count=5, start_image=picture, audio_scale=1.0,
            previous_frames=picture.expand(FRAMES, -1, -1, -1) if goes_on else None,
        ).result[0]  # fmt: skip

    return apply


MODEL_PATCHES = {
    "WanUni3CControlnetApply": ("nodes_model_patch", uni3c),
    "WanInfiniteTalkToVideo-1": ("nodes_wan", infinite_talk(1)),
    "WanInfiniteTalkToVideo-2": ("nodes_wan", infinite_talk(2)),
    "WanInfiniteTalkToVideo-goes-on": ("nodes_wan", infinite_talk(1, goes_on=True)),
}


def needs(name):
    """(module, attribute) of ComfyUI that a name of MODEL_PATCHES comes from."""
    return f"comfy_extras.{MODEL_PATCHES[name][0]}", name.split("-")[0]
