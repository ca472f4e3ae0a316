"""One real ComfyUI server per session, with this pack, seeded conditioning and tiny weights."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from demo.checkpoints import make_cogvideox_checkpoint, make_wan_checkpoint
from demo.session import run_workflow
from demo.workflow import Workflow
from devtools.server import ComfyServer, make_base_directory

REPOSITORY = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in Path(item.fspath).parents:
            item.add_marker(pytest.mark.server)
            # One server, also where tests run in several processes.
            item.add_marker(pytest.mark.xdist_group("server"))


def make_flux_checkpoint(path):
    """An image model, which the sparse nodes do not support: as much of it as detection needs."""
    shapes = {
        "img_in.weight": (128, 64),
        "txt_in.weight": (128, 16),
        "vector_in.in_layer.weight": (128, 8),
        "double_blocks.0.img_attn.norm.key_norm.weight": (128,),
        "single_blocks.0.modulation.lin.weight": (384, 128),
    }
    save_file(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, path
    )


@pytest.fixture(scope="session")
def server(comfyui_folder, tmp_path_factory):
    """A running server; its models are wan, cogvideox and flux."""
    base = tmp_path_factory.mktemp("server")
    packs = {
        "sparse_video_attention": REPOSITORY,
        "seeded_conditioning": REPOSITORY / "demo" / "seeded_conditioning",
    }
    make_base_directory(base, packs)
    models = base / "models" / "diffusion_models"
    make_wan_checkpoint(models / "wan.safetensors", num_layers=2)
    make_cogvideox_checkpoint(models / "cogvideox.safetensors", num_layers=2)
    make_flux_checkpoint(models / "flux.safetensors")
    # ComfyUI comes with it, in the folder that the base directory takes the place of.
    Image.new("RGB", (64, 96), "teal").save(base / "input" / "example.png")
    process = ComfyServer(
        python=Path(sys.executable),
        comfyui=comfyui_folder,
        base=base,
        log_path=base / "server.log",
        cpu=True,
        arguments=["--use-pytorch-cross-attention"],
    )
    with process:
        process.start()
        yield process


@pytest.fixture(scope="session")
def object_info(server):
    return server.get("/object_info")


@pytest.fixture(scope="session")
def run(server):
    """run(workflow): what a workflow leaves, from the server of this test run."""
    return lambda workflow, **options: run_workflow(server, workflow, **options)


@pytest.fixture(scope="session")
def tiny():
    """tiny(stem, model, **widgets): a shipped workflow on tiny weights, a latent at its end."""

    def make(stem="wan_t2v_radial", model="wan", **widgets):
        shipped = Workflow.load(REPOSITORY / "workflows" / "api" / f"{stem}.json")
        tokens = {"wan": 512, "cogvideox": 226}[model]
        size = {"width": 192, "height": 128, "length": 17}
        return (
            shipped.with_seeded_conditioning(tokens, seed=1)
            .saving_latent(f"{model}/latent")
            .setting(unet_name=f"{model}.safetensors", cfg=1.0, **size)
            .setting(**widgets)
        )

    return make
