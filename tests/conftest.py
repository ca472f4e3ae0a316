"""A real ComfyUI in this process, tiny checkpoints of the real models, and one way to sample."""

import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from sparse_video_attention.kernels import registry
from sparse_video_attention.kernels.registry import Kernel
from torch.utils._python_dispatch import TorchDispatchMode

# Machines that run this are busy and small: what a draw costs in wall time says nothing.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = REPOSITORY / "tests" / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class Storages(TorchDispatchMode):
    """Sizes of the storages that operations returned, in bytes by address."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.held = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.held.append(tensor)  # so that no address is used twice
                storage = tensor.untyped_storage()
                self.sizes[storage.data_ptr()] = storage.nbytes()
        return out


@pytest.fixture
def storages():
    """storages(): a context that keeps the sizes of what is made in it."""
    return Storages


def comfyui_path() -> Path:
    path = Path(os.environ.get("COMFYUI_PATH") or REPOSITORY / ".comfyui" / "ComfyUI")
    if not (path / "comfy" / "sd.py").is_file():
        pytest.fail(f"no ComfyUI at {path}; python dev.py setup brings one, or set COMFYUI_PATH")
    return path


@pytest.fixture(scope="session")
def comfyui_folder():
    """Folder with ComfyUI's main.py."""
    return comfyui_path()


@pytest.fixture(scope="session")
def golden():
    """Folder of the published arrays."""
    return GOLDEN


@pytest.fixture(scope="session")
def comfyui():
    """ComfyUI's own modules, imported on the CPU as its main.py would."""
    root = str(comfyui_path())
    if root not in sys.path:
        # First: ComfyUI's modules have short names (nodes, server, utils).
        sys.path.insert(0, root)
    arguments, sys.argv = sys.argv, ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sample
    import comfy.samplers
    import comfy.sd

    sys.argv = arguments
    return comfy


@pytest.fixture(scope="session")
def checkpoints(comfyui, tmp_path_factory):
    """Paths of tiny checkpoints by model name, written by the demo's own code when asked for."""
    from demo.checkpoints import make_cogvideox_checkpoint, make_wan_checkpoint

    makers = {
        "wan": lambda path: make_wan_checkpoint(path),
        "wan_i2v": lambda path: make_wan_checkpoint(path, model_type="i2v"),
        "cogvideox": lambda path: make_cogvideox_checkpoint(path, version="1.0"),
        "cogvideox_1.5": lambda path: make_cogvideox_checkpoint(path, version="1.5"),
    }
    folder = tmp_path_factory.mktemp("checkpoints")

    class Checkpoints(dict):
        def __missing__(self, name):
            path = folder / f"{name}.safetensors"
            makers[name](path)
            self[name] = path
            return path

    return Checkpoints()


@pytest.fixture(scope="session")
def load_model(comfyui, checkpoints):
    """load_model(name): a fresh MODEL through ComfyUI's own loader."""

    def load(name):
        return comfyui.sd.load_diffusion_model(str(checkpoints[name]))

    return load


@dataclass(frozen=True)
class Sampling:
    """One sampling run. shape: latent [B, C, T, H, W]."""

    shape: tuple[int, ...] = (1, 16, 5, 16, 20)
    steps: int = 4
    cfg: float = 3.0
    sampler: str = "euler"
    scheduler: str = "simple"
    text_tokens: int = 40
    seed: int = 7
    options: dict = field(default_factory=dict)


@pytest.fixture(scope="session")
def sample(comfyui):
    """sample(model, Sampling fields...): the latent that ComfyUI's KSampler makes."""

    def run(model, **fields):
        how = Sampling(**{k: v for k, v in fields.items() if k in Sampling.__dataclass_fields__})
        extra = {k: v for k, v in fields.items() if k not in Sampling.__dataclass_fields__}
        generator = torch.Generator().manual_seed(how.seed)
        context = torch.randn(2, how.text_tokens, 4096, generator=generator)
        positive, negative = ([[context[i : i + 1], {}]] for i in range(2))
        latent = extra.pop("latent", torch.zeros(how.shape))
        # One noise for all samples of a batch would hide a mix-up between them.
        noise = torch.randn(how.shape, generator=generator)
        noise = extra.pop("noise", noise)
        return comfyui.sample.sample(
            model,
            noise,
            how.steps,
            how.cfg,
            how.sampler,
            how.scheduler,
            positive,
            negative,
            latent,
            seed=how.seed,
            disable_pbar=True,
            **extra,
        )

    return run


@pytest.fixture
def preferred_kernel(monkeypatch):
    """preferred_kernel(run, auto_precision=...): a kernel that "auto" takes before all others."""

    def add(run, auto_precision="native"):
        registry.kernels()
        kernel = Kernel(
            name="preferred",
            unavailable=lambda: None,
            refuses=lambda call: None,
            run=run,
            auto_precision=lambda call: auto_precision,
            rank=lambda call: 1e9,
        )
        monkeypatch.setitem(registry._KERNELS, "preferred", kernel)
        registry.unavailable_reason.cache_clear()

    yield add
    registry.unavailable_reason.cache_clear()


@pytest.fixture
def run_lines(caplog):
    """run_lines(): the pack's log lines so far, without its prefix."""
    caplog.set_level(logging.INFO, logger="sparse_video_attention")
    prefix = "[sparse_video_attention] "

    def lines():
        return [
            message.removeprefix(prefix)
            for message in caplog.messages
            if message.startswith(prefix)
        ]

    return lines
