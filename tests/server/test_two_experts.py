"""The workflows of WAN 2.2 from end to end: two experts share a schedule, each with its node."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from demo.checkpoints import make_wan_checkpoint
from demo.comparison import pack_lines
from demo.workflow import Workflow

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows" / "api"
SIZE = {"width": 192, "height": 128, "length": 17}
LAYERS = 3


def make_vae(path):
    """A WAN VAE of a few channels: what it shows does not matter, its shapes do."""
    from comfy.ldm.wan.vae import WanVAE

    torch.manual_seed(0)
    made = WanVAE(
        dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True], dropout=0.0,
    )  # fmt: skip
    # ComfyUI leaves weights as the memory was: there may be NaN in it.
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_file({name: tensor.contiguous() for name, tensor in made.state_dict().items()}, path)


def make_lora(path):
    """It changes the queries of every layer, so that it can be seen to be there."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        name = f"diffusion_model.blocks.{layer}.self_attn.q"
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, 256, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(256, 2, generator=generator)
    save_file(tensors, path)


WEIGHTS = {"unet_name": "diffusion_models", "lora_name": "loras", "vae_name": "vae"}


def shipped(stem):
    """(workflow of a stem in a size that runs in seconds, the files that it needs)"""
    workflow = Workflow.load(WORKFLOWS / f"{stem}.json").with_seeded_conditioning(512, seed=1)
    workflow = workflow.setting(**SIZE, min_tokens=0)
    files = set()
    for node in workflow.nodes.values():
        for widget in node["inputs"].keys() & WEIGHTS.keys():
            # Not the names of real ones: this server is to have none of those.
            name = node["inputs"][widget] = f"tiny_{node['inputs'][widget]}"
            files.add(f"{WEIGHTS[widget]}/{name}")
    return workflow, files


@pytest.fixture(scope="module", autouse=True)
def weights(server, comfyui):
    for stem in ("wan22_t2v_sparge", "wan22_i2v_sparge_4_steps"):
        for file in shipped(stem)[1]:
            path = server.base / "models" / file
            path.parent.mkdir(exist_ok=True)
            if "lora" in file:
                make_lora(path)
            elif "vae" in file:
                make_vae(path)
            else:
                kind = "i2v" if "i2v" in file else "t2v"
                seed = int("low_noise" in file)
                make_wan_checkpoint(path, num_layers=LAYERS, model_type=kind, seed=seed)


@pytest.mark.parametrize(
    ("stem", "first", "second"),
    [
        ("wan22_t2v_sparge", "10 of 10", "9 of 10"),
        ("wan22_i2v_sparge_4_steps", "2 of 2", "2 of 2"),
    ],
)
def test_each_expert_counts_the_steps_of_its_own_sampler(run, stem, first, second):
    workflow, _ = shipped(stem)
    result = run(workflow)
    lines = pack_lines(result.log)
    assert len(lines) == 2
    assert f"2 of {LAYERS} layers sparse on {first} steps" in lines[0]
    assert f"2 of {LAYERS} layers sparse on {second} steps" in lines[1]
    assert all("(topk 0." in line and "5x8x12" in line for line in lines)
    assert not any("NaN" in line for line in lines), "what was looked at is a video"
    (video,) = result.files["22"]
    assert video.suffix == ".mp4" and video.stat().st_size > 1000


def test_what_the_note_says_of_the_other_way_to_sample_runs_too(run):
    """The LoRAs bypassed, twenty steps."""
    workflow, _ = shipped("wan22_i2v_sparge_4_steps")
    workflow = workflow.without("LoraLoaderModelOnly").setting(steps=20, cfg=3.5)
    nodes = workflow.nodes
    kind = "PatchSpargeAttention"
    patches = [node["inputs"] for node in nodes.values() if node["class_type"] == kind]
    samplers = [nodes[name]["inputs"] for name in sorted(workflow.samplers)]
    for patch in patches:
        patch |= {"topk": 0.2, "last_dense_timesteps": -1}
    samplers[0]["end_at_step"] = samplers[1]["start_at_step"] = 10
    lines = pack_lines(run(workflow).log)
    assert "sparse on 10 of 10 steps" in lines[0] and "sparse on 9 of 10 steps" in lines[1]
