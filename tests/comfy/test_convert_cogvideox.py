"""convert_cogvideox.py: what it writes computes in ComfyUI what diffusers computes.

The golden files hold small CogVideoX 1.5 models, an input and the output, made with diffusers
0.42.1 (CogVideoXTransformer3DModel, fp32, the rotary positions of its pipeline).
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.comfy

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "convert_cogvideox.py"
GOLDEN = ROOT / "tests" / "golden"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def golden(kind):
    tensors = load_file(GOLDEN / f"cogvideox_1_5_{kind}.safetensors")
    weights = {name[8:]: t for name, t in tensors.items() if name.startswith("weights.")}
    return weights, {name: t for name, t in tensors.items() if not name.startswith("weights.")}


def published(folder, weights):
    """As on a model hub: two files and an index of which weight is where."""
    names = sorted(weights)
    files = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    where = {name: files[at % 2] for at, name in enumerate(names)}
    (folder / "transformer").mkdir(parents=True)
    for file in files:
        held = {name: weights[name].contiguous() for name in names if where[name] == file}
        save_file(held, folder / "transformer" / file)
    (folder / "transformer" / INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """run(source, target): (what was printed, why nothing was written or None)."""
    spec = importlib.util.spec_from_file_location("convert_cogvideox", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(source, target):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(source), str(target)])
        try:
            script.main()
        except SystemExit as end:
            return capsys.readouterr().out, end.code
        return capsys.readouterr().out, None

    return run


@pytest.fixture
def refused(run, tmp_path):
    """refused(source): the one sentence; nothing is left behind."""

    def refused(source):
        target = tmp_path / "out" / "model.safetensors"
        printed, why = run(source, target)
        assert not printed
        assert not target.parent.exists() or not list(target.parent.iterdir())
        (line,) = why.splitlines()
        return line

    return refused


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_a_published_folder_computes_in_comfyui_as_in_diffusers(comfyui, tmp_path, kind):
    import comfy.sd

    weights, call = golden(kind)
    source = published(tmp_path / "CogVideoX1.5-5B", weights)
    target = tmp_path / "models" / "cogvideox1.5.safetensors"
    command = [sys.executable, str(SCRIPT), str(source), str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"wrote {target} ({len(weights)} weights)\n"
    assert [path.name for path in target.parent.iterdir()] == [target.name]

    options = {"dtype": torch.float32}
    model = comfy.sd.load_diffusion_model(str(target), model_options=options).model
    network = model.diffusion_model
    assert set(network.state_dict()) == set(load_file(target))
    ofs = torch.full((2,), 2.0) if kind == "i2v" else None
    with torch.no_grad():
        # ComfyUI has channels before frames.
        noisy = call["noisy"].transpose(1, 2)
        out = network(noisy, call["timestep"], call["text"], ofs=ofs).transpose(1, 2)
    error = (out - call["output"]).norm() / call["output"].norm()
    assert error < 1e-5, float(error)


def test_weights_keep_their_bits_and_type(run, tmp_path):
    weights = {name: t.bfloat16() for name, t in golden("t2v")[0].items()}
    source = tmp_path / "one.safetensors"
    save_file(weights, source)
    target = tmp_path / "two.safetensors"
    assert run(source, target)[1] is None
    with safe_open(target, "pt") as file:
        assert torch.equal(
            file.get_tensor("blocks.1.q.weight"), weights["transformer_blocks.1.attn1.to_q.weight"]
        )
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
        assert len(file.keys()) == len(weights)


def test_cogvideox_1_0_is_converted_with_a_word_about_its_positions(run, tmp_path):
    weights, _ = golden("t2v")
    weights["patch_embed.proj.weight"] = torch.zeros(64, 16, 2, 2)
    save_file(weights, tmp_path / "one.safetensors")
    printed, why = run(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    assert why is None
    assert "1.875 times too far apart" in printed


def test_models_whose_positions_comfyui_lacks_are_refused(refused, tmp_path):
    weights, _ = golden("t2v")
    source = tmp_path / "model.safetensors"
    save_file(weights | {"patch_embed.pos_embedding": torch.zeros(1, 20, 64)}, source)
    assert "1.0 image to video" in refused(source)
    save_file(weights | {"norm_final.weight": torch.zeros(1920)}, source)
    assert "it is CogVideoX 2B" in refused(source)


def test_what_is_no_whole_cogvideox_is_refused_by_name(refused, tmp_path):
    weights, _ = golden("t2v")
    source = tmp_path / "model.safetensors"
    save_file({name: t for name, t in weights.items() if "blocks.0.ff.net.2" not in name}, source)
    assert "weights are missing (1, the first blocks.0.ff_out)" in refused(source)
    save_file(weights | {"adapter.weight": torch.zeros(1)}, source)
    assert "adapter is no weight of a CogVideoX" in refused(source)
    save_file({"blocks.0.norm1.linear.weight": torch.zeros(1)}, source)
    assert "in ComfyUI's format already" in refused(source)
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(1)}, source)
    assert f"{source}: it is no CogVideoX in diffusers' layout" in refused(source)
    source.write_bytes(source.read_bytes()[:-2])
    assert "not a whole .safetensors file" in refused(source)


def test_folders_and_files_that_are_not_all_there(refused, tmp_path):
    folder = published(tmp_path / "model", golden("t2v")[0])
    gone = folder / "transformer" / "model-00002-of-00002.safetensors"
    gone.unlink()
    assert f"{gone.name} is missing; download it again" in refused(folder)
    assert "there is no such folder or file" in refused(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    assert "no .safetensors file" in refused(tmp_path / "empty")


def test_a_file_that_is_there_is_kept(run, tmp_path):
    folder = published(tmp_path / "model", golden("t2v")[0])
    target = tmp_path / "kept.safetensors"
    target.write_text("mine")
    assert "is there already" in run(folder, target)[1]
    assert target.read_text() == "mine"
    assert "has to end in .safetensors" in run(folder, tmp_path / "model.bin")[1]
