"""One ComfyUI server, which has this pack, and ComfyUI's own page of it in a real Chromium."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from demo.checkpoints import make_cogvideox_checkpoint, make_wan_checkpoint
from demo.workflow import Workflow
from devtools.server import ComfyServer, make_base_directory

from .comfy_page import PATIENCE_MS, ComfyPage

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOWS = REPOSITORY / "workflows"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Playwright's own downloads are never used; this brings a browser that a system keeps current.
INSTALL = "no Chromium on this machine: sudo apt-get update && sudo apt-get install chromium"
# Nothing may reach the network, and containers have neither a sandbox nor a GPU.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
# Without the tour of a first visit, with explanations as soon as the mouse rests, and with few
# frames a second, which software draws here and a run has to wait for.
PAGE_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "LiteGraph.Node.TooltipDelay": 1,
    "LiteGraph.Canvas.MaximumFps": 10,
}
FOLDERS = {
    "unet_name": "diffusion_models",
    "clip_name": "text_encoders",
    "vae_name": "vae",
    "lora_name": "loras",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.server)


def make_models(models: Path) -> None:
    """The files that the shipped workflows name, as on a machine of someone who has them.

    The diffusion models are tiny ones; of the others only the names count here.
    """
    for path in (WORKFLOWS / "api").glob("*.json"):
        named = [
            (widget, value)
            for node in Workflow.load(path).nodes.values()
            for widget, value in node["inputs"].items()
            if widget in FOLDERS
        ]
        for widget, name in named:
            file = models / FOLDERS[widget] / name
            if file.exists():
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            if widget != "unet_name":
                file.touch()
            elif "wan" in path.stem:
                kind = "i2v" if "i2v" in path.stem else "t2v"
                make_wan_checkpoint(file, num_layers=2, model_type=kind)
            else:
                make_cogvideox_checkpoint(file, num_layers=2)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        # Under CI=true dev.py lets no test be skipped.
        pytest.skip(INSTALL)
    return found


@pytest.fixture(scope="session")
def server(chromium, comfyui_folder, tmp_path_factory) -> Iterator[ComfyServer]:
    """A running server with the models of the shipped workflows."""
    base = tmp_path_factory.mktemp("page")
    packs = {
        # As the README says to clone it: help pages and templates are found by this name.
        "sparse-video-attention": REPOSITORY,
        "seeded_conditioning": REPOSITORY / "demo" / "seeded_conditioning",
    }
    make_base_directory(base, packs)
    make_models(base / "models")
    # ComfyUI comes with it, in the folder that the base directory takes the place of.
    Image.new("RGB", (64, 96), "teal").save(base / "input" / "example.png")
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir()
    settings.write_text(json.dumps(PAGE_SETTINGS), encoding="utf-8")
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


# Not longer than a module: playwright keeps an event loop running in this thread, in which no other
# module's asyncio.run could start one.
@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def page(browser, server) -> ComfyPage:
    """ComfyUI's page in English, with its nodes; a test opens its own graph on it."""
    return ComfyPage(browser, server, "en-US")


@pytest.fixture(scope="session")
def tiny():
    """tiny(stem, **widgets): a shipped workflow that runs in seconds, a latent at its end."""

    def make(stem="wan_t2v_radial", **widgets) -> Workflow:
        shipped = Workflow.load(WORKFLOWS / "api" / f"{stem}.json")
        size = {"width": 192, "height": 128, "length": 17, "steps": 1, "cfg": 1.0}
        workflow = shipped.with_seeded_conditioning(512, seed=1).saving_latent("page/latent")
        return workflow.setting(**size).setting(**widgets)

    return make
