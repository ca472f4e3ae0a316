"""What convert_cogvideox.py writes computes in ComfyUI what diffusers computes."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .published import SCRIPT, golden, published


def error_in_comfyui(path, call, scale=None):
    """Of the outputs: how far ComfyUI's is from that of diffusers.

    Args:
        scale: of the distances of positions, None for ComfyUI's.
    """
    import comfy.sd

    model = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32}).model
    network = model.diffusion_model
    assert set(network.state_dict()) == set(load_file(path))
    if scale is not None:
        network.spatial_interpolation_scale = scale
    ofs = torch.full((2,), 2.0) if "ofs_embedding_linear_1.weight" in load_file(path) else None
    with torch.no_grad():
        # ComfyUI has channels before frames.
        noisy = call["noisy"].transpose(1, 2)
        out = network(noisy, call["timestep"], call["text"], ofs=ofs).transpose(1, 2)
    return float((out - call["output"]).norm() / call["output"].norm())


@pytest.mark.comfy
@pytest.mark.parametrize("kind", ["1_5_t2v", "1_5_i2v"])
def test_a_published_folder_computes_in_comfyui_as_in_diffusers(comfyui, tmp_path, kind):
    weights, call = golden(kind)
    source = published(tmp_path / "CogVideoX1.5-5B 模型", weights)
    target = tmp_path / "models" / "视频1.5.safetensors"
    # An interpreter without any package, and a console without most letters.
    command = [sys.executable, "-S", "-X", "utf8=0", str(SCRIPT), str(source), str(target)]
    result = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONIOENCODING": "cp1252"}
    )
    assert result.returncode == 0, result.stderr
    shown = str(target).replace("视频", r"\u89c6\u9891")
    assert result.stdout == f"writing 0.0 GB\nwrote {shown} ({len(weights)} weights)\n"
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    # As any file of this person's, and aligned.
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert int.from_bytes(target.read_bytes()[:8], "little") % 8 == 0
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert error_in_comfyui(target, call) < 1e-6


@pytest.mark.comfy
def test_positions_of_cogvideox_1_0_in_comfyui_are_as_the_note_says(comfyui, run, tmp_path):
    """Once ComfyUI sets them as published, the note and the page have to go."""
    weights, call = golden("1_0_t2v")
    target = tmp_path / "model.safetensors"
    printed, why = run(published(tmp_path / "CogVideoX-5b", weights), target)
    assert why is None and "1.875 times too far apart" in printed
    assert error_in_comfyui(target, call) > 1e-3
    assert error_in_comfyui(target, call, scale=1.0) < 1e-6


def test_weights_keep_their_bits_and_type(run, tmp_path):
    weights = {name: t.bfloat16() for name, t in golden("1_5_t2v")[0].items()}
    weights["norm_final.weight"] = weights["norm_final.weight"].float()
    source = tmp_path / "one.safetensors"
    save_file(weights, source)
    target = tmp_path / "two.safetensors"
    assert run(source, target)[1] is None
    with safe_open(target, "pt") as file:
        names = {"blocks.1.q.weight": "transformer_blocks.1.attn1.to_q.weight"}
        names |= {"norm_final.weight": "norm_final.weight"}
        for name, published_name in names.items():
            assert torch.equal(file.get_tensor(name), weights[published_name])
            assert file.get_tensor(name).dtype is weights[published_name].dtype
        assert len(file.keys()) == len(weights)


def test_large_weights_are_copied_piece_by_piece(script, run, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "COPIED_AT_ONCE", 1000)
    weights, _ = golden("1_5_t2v")
    save_file(weights, tmp_path / "one.safetensors")
    assert run(tmp_path / "one.safetensors", tmp_path / "two.safetensors")[1] is None
    out = load_file(tmp_path / "two.safetensors")
    assert all(torch.equal(out[script.comfyui_name(name)], t) for name, t in weights.items())
