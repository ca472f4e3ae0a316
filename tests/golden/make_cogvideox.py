"""Makes the cogvideox_*.safetensors beside it: small models of diffusers, an input and the output.

    pip install diffusers==0.42.1 accelerate
    python tests/golden/make_cogvideox.py

diffusers is needed for nothing else here. Positions are those that its pipelines pass.
"""

from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
FRAMES, HEIGHT, WIDTH, TEXT_TOKENS, TEXT_WIDTH = 6, 8, 12, 8, 16
OF_1_5 = {
    **{"patch_size_t": 2, "patch_bias": False},
    **{"sample_width": 170, "sample_height": 96, "sample_frames": 81},
}
MODELS = {
    "1_0_t2v": {"in_channels": 16},
    "1_5_t2v": {"in_channels": 16, **OF_1_5},
    "1_5_i2v": {"in_channels": 32, "ofs_embed_dim": 16, **OF_1_5},
}


def positions(is_1_5: bool):
    grid = HEIGHT // 2, WIDTH // 2
    if is_1_5:
        return get_3d_rotary_pos_embed(
            64, None, grid, FRAMES // 2, grid_type="slice", max_size=(48, 85)
        )
    # At the size that it was trained with they are whole numbers; here too.
    return get_3d_rotary_pos_embed(64, ((0, 0), grid), grid, FRAMES)


def main() -> None:
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = CogVideoXTransformer3DModel(
            num_attention_heads=1,
            attention_head_dim=64,
            time_embed_dim=16,
            text_embed_dim=TEXT_WIDTH,
            num_layers=2,
            max_text_seq_length=TEXT_TOKENS,
            use_rotary_positional_embeddings=True,
            **config,
        ).eval()
        with torch.no_grad():
            for weight, values in model.named_parameters():
                spread = 0.3 if "norm_q" in weight or "norm_k" in weight else 0.15
                one = "norm" in weight and weight.endswith("weight") and values.ndim == 1
                # In half precision, so that the file is small and the output still exact.
                values.copy_((torch.randn_like(values) * spread + one).half().float())
            call = {
                "noisy": torch.randn(2, FRAMES, config["in_channels"], HEIGHT, WIDTH),
                "text": torch.randn(2, TEXT_TOKENS, TEXT_WIDTH),
                "timestep": torch.tensor([500.0, 500.0]),
            }
            (output,) = model(
                hidden_states=call["noisy"],
                encoder_hidden_states=call["text"],
                timestep=call["timestep"],
                ofs=torch.full((1,), 2.0) if "ofs_embed_dim" in config else None,
                image_rotary_emb=positions("patch_size_t" in config),
                return_dict=False,
            )
        tensors = {f"weights.{key}": x.half() for key, x in model.state_dict().items()}
        tensors |= call | {"output": output}
        save_file(
            {key: x.contiguous() for key, x in tensors.items()},
            HERE / f"cogvideox_{name}.safetensors",
        )


if __name__ == "__main__":
    main()
