"""This pack beside others, in a ComfyUI that has them in custom_nodes; the suite has none.

    COMFYUI_PATH=<that ComfyUI> python -m pytest -rsx tests/comfy/other_packs.py

Packs that are not there, and nodes that fail without this pack too, are skipped with the reason.
"""

import asyncio
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sparse_video_attention.patching import run_history

from .conftest import relative_error
from .pack_trials import STEPS, TRIALS, Trial, call_node, ksampler, load_packs


@pytest.fixture(scope="module")
def need(comfyui):
    """need(name): skip where no pack in ComfyUI's custom_nodes has a node of this name."""
    import nodes

    loop = asyncio.new_event_loop()
    _, failed = load_packs(Path(os.environ["COMFYUI_PATH"]) / "custom_nodes", loop)
    unloaded = f" (packs that could not be loaded: {', '.join(failed)})" if failed else ""

    def need(name):
        if name not in nodes.NODE_CLASS_MAPPINGS:
            pytest.skip(f"no {name} in this ComfyUI{unloaded}")

    yield need
    loop.close()


def check(trial, load, install_band, node_comes):
    """Everything kept is what the other node does alone, and what should be sparse is.

    Where a node samples twice, the record looked at is the later run's.
    """
    try:
        alone = trial.sample(trial.apply(load()))
    except Exception as error:
        pytest.skip(f"fails without this pack too: {type(error).__name__}: {error}")

    def run(**settings):
        # A model each: some packs leave something on the one they were put on.
        if node_comes == "first":
            patched = trial.apply(install_band(load(), **settings))
        else:
            patched = install_band(trial.apply(load()), **settings)
        return trial.sample(patched), run_history(patched).latest

    kept, record = run(reach=10**6, reverse=True, dense_layers=())
    assert relative_error(kept, alone) < trial.same, record.summary()
    out, record = run()
    if not record.calls and record.attended_by is not None:
        # Not sparse, but the person is told by whom.
        assert record.attended_by in record.summary()
        pytest.xfail(record.summary())
    total = record.total_steps  # fewer where a node has an expert for each part of the schedule
    steps = trial.steps - {0} if total == STEPS else frozenset(range(1, total))
    sparse = {(call.step, call.layer) for call in record.calls if call.reason is None}
    assert sparse == {(step, layer) for step in steps for layer in (1, 2, 3)}, record.summary()
    assert relative_error(out, alone) > trial.same, "sparse attention changed nothing"


@pytest.mark.parametrize("node_comes", ["first", "last"])
@pytest.mark.parametrize("name", TRIALS)
def test_beside(need, load_model, install_band, name, node_comes):
    trial = TRIALS[name]
    need(trial.node)
    check(trial, lambda: load_model("wan"), install_band, node_comes)


@pytest.fixture(scope="module")
def gguf_folder(checkpoints, tmp_path_factory):
    """A folder with the tiny WAN as tiny.gguf: matrices in 8 bits, the rest in 32."""
    gguf = pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("gguf")
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(folder / "tiny.gguf"), "wan")
    for name, weight in load_file(checkpoints["wan"]).items():
        array = weight.float().numpy()
        if array.ndim > 4:  # more axes than the format has
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(n) for n in array.shape])
            array = array.reshape(*array.shape[:2], -1)
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


LOADERS = {
    "UnetLoaderGGUF": {},
    "UnetLoaderGGUFDisTorch2MultiGPU": {"compute_device": "cpu", "donor_device": "cpu"},
}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_model_in_gguf(need, gguf_folder, install_band, loader):
    import folder_paths

    need(loader)
    for kind in ("unet", "diffusion_models", "unet_gguf"):
        folder_paths.add_model_folder_path(kind, str(gguf_folder))
    inputs = LOADERS[loader] | ({"virtual_vram_gb": 0.0} if "MultiGPU" in loader else {})
    model = call_node(loader, unet_name="tiny.gguf", **inputs)[0]
    alone = ksampler(model)
    kept = ksampler(install_band(model, reach=10**6, reverse=True, dense_layers=()))
    assert relative_error(kept, alone) < Trial.same
    patched = install_band(model)
    assert type(patched) is type(model)
    assert relative_error(ksampler(patched), alone) > Trial.same
    assert run_history(patched).latest.sparse().calls == 5 * 3
