"""The demo's conditioning node in a real ComfyUI: words reach the model, and each its own."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from demo.frames import load_latent
from demo.session import run_workflow
from demo.workflow import Workflow
from devtools.server import ComfyServer, WorkflowRejected, make_base_directory
from miniature.prompts import PROMPTS
from miniature.wan import WanMiniature

REPOSITORY = Path(__file__).resolve().parents[2]
WIDGETS = {"width": 64, "height": 64, "length": 5, "steps": 2, "unet_name": "toy.safetensors"}

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(comfyui_folder, tmp_path_factory):
    base = tmp_path_factory.mktemp("prompts")
    make_base_directory(
        base,
        {
            "sparse_video_attention": REPOSITORY,
            "prompt_conditioning": REPOSITORY / "miniature" / "prompt_conditioning",
        },
    )
    model = WanMiniature(128, 64, 1)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.1 * torch.randn(weight.shape, generator=generator)
        for name, weight in model.state_dict().items()
    }
    folder = base / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    save_file(weights, folder / "toy.safetensors")
    process = ComfyServer(
        python=Path(sys.executable),
        comfyui=comfyui_folder,
        base=base,
        log_path=base / "server.log",
        cpu=True,
    )
    with process:
        process.start()
        yield process


def prompted(sentence):
    shipped = Workflow.load(REPOSITORY / "workflows" / "api" / "wan_t2v_radial.json")
    small = shipped.with_miniature_prompt(sentence).saving_latent("latent")
    return small.setting(**WIDGETS)


def test_every_prompt_makes_a_video_of_its_own_and_the_same_one_again(server):
    def sampled(sentence):
        return load_latent(run_workflow(server, prompted(sentence)).files["latent"][0])

    first, other, again = (sampled(PROMPTS[index].sentence) for index in (0, 1, 0))
    assert torch.isfinite(first).all() and torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)
    # Guidance that starts from the prompt itself would not see another prompt at all.
    assert not torch.allclose(first, sampled(""), atol=1e-3)


def test_the_node_lists_what_was_trained_and_refuses_anything_else(server):
    node = server.get("/object_info/MiniaturePrompt")["MiniaturePrompt"]
    listed = json.dumps(node["input"]["required"]["prompt"])
    assert all(prompt.sentence in listed for prompt in PROMPTS)
    with pytest.raises(WorkflowRejected, match="prompt"):
        server.submit(prompted("a red fox walks through fresh snow").nodes, "test")
