"""A graph as people build them, in a real server: the sparse node beside LoRA, cache, guidance."""

import pytest
import torch
from safetensors.torch import save_file

from demo.comparison import logged_density, pack_lines
from demo.frames import load_latent
from demo.workflow import PATCH

# Three frames of 16 x 16 tokens: at the widest window the mask is full.
SIZE = {"width": 256, "height": 256, "length": 9}
RADIAL = {"min_tokens": 0, "block_size": 64, "dense_layers": "", "dense_timesteps": 0}
BEFORE = {
    "lora": ("LoraLoaderModelOnly", {"lora_name": "companion.safetensors", "strength_model": 1.0}),
    "shift": ("ModelSamplingSD3", {"shift": 5.0}),
}
AFTER = {
    "cache": (
        "EasyCache",
        {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 0.8, "verbose": False},
    ),
    "guidance": ("CFGZeroStar", {}),
}


@pytest.fixture(scope="module")
def lora(server):
    generator = torch.Generator().manual_seed(9)
    name = "diffusion_model.blocks.1.self_attn.v"
    down, up = (torch.randn(shape, generator=generator) * 0.1 for shape in ((2, 256), (256, 2)))
    folder = server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    save_file(
        {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up},
        folder / "companion.safetensors",
    )


def among_companions(workflow):
    """The workflow with companions on both sides of the sparse node."""
    new = workflow.setting()
    patch, sampler = new.find(PATCH), new.sampler
    for where, companions in ((patch, BEFORE), (sampler, AFTER)):
        for name, (class_type, widgets) in companions.items():
            link = new.nodes[where]["inputs"]["model"]
            new.nodes[name] = {"class_type": class_type, "inputs": widgets | {"model": link}}
            new.nodes[where]["inputs"]["model"] = [name, 0]
    return new


def test_a_full_mask_changes_nothing_among_companions_and_a_sparse_one_acts(run, tiny, lora):
    graph = among_companions(tiny(steps=6, cfg=2.0, sampler_name="euler", **SIZE, **RADIAL))
    full = run(graph.setting(decay_factor=2.0))
    alone = run(graph.without(PATCH))
    sparse = run(graph.setting(decay_factor=0.0, dense_layers="0", dense_timesteps=1))
    latents = [load_latent(result.files["latent"][0]) for result in (full, alone, sparse)]
    kept, dense, changed = latents
    assert float((kept - dense).norm() / dense.norm()) < 1e-5
    assert float((changed - dense).norm() / dense.norm()) > 1e-4
    assert not pack_lines(alone.log)

    (line,) = pack_lines(full.log)
    # The cache leaves out steps 3 to 5; past its end_percent the model is called again.
    assert "2 of 2 layers sparse on 3 of 6 steps" in line and "dense calls: none" in line
    assert logged_density(full.log) == 1.0
    (line,) = pack_lines(sparse.log)
    assert "1 of 2 layers sparse on 2 of 6 steps" in line
    assert "2 x first 1 of 6 steps, 2 x layer 0 is in dense_layers" in line
    assert logged_density(sparse.log) < 1.0
