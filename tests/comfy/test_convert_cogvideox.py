"""convert_cogvideox.py: what it writes computes in ComfyUI what diffusers computes.

tests/golden/make_cogvideox.py made the golden files.
"""

import importlib.util
import json
import os
import signal
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
WHOLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{WHOLE}.index.json"


def golden(kind):
    tensors = load_file(GOLDEN / f"cogvideox_{kind}.safetensors")
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
        save_file(held, folder / "transformer" / file, metadata={"format": "pt"})
    (folder / "transformer" / INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("convert_cogvideox", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Where it looks for its annotations.
    sys.modules["convert_cogvideox"] = module
    spec.loader.exec_module(module)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield module
    for number, handler in handlers.items():
        signal.signal(number, handler)
    del sys.modules["convert_cogvideox"]


@pytest.fixture
def run(script, monkeypatch, capsys):
    """run(source, target): (what was printed, why nothing was written or None)."""

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
        assert "wrote" not in printed
        assert not target.parent.exists() or not list(target.parent.iterdir())
        (line,) = why.splitlines()
        assert line.startswith("nothing was written: ")
        return line

    return refused


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


def test_models_whose_positions_comfyui_lacks_are_refused(refused, tmp_path):
    weights, _ = golden("1_5_t2v")
    source = tmp_path / "model.safetensors"
    save_file(weights | {"patch_embed.pos_embedding": torch.zeros(1, 20, 64)}, source)
    assert "1.0 image to video" in refused(source)
    save_file(weights | {"norm_final.weight": torch.zeros(1920)}, source)
    assert "it is CogVideoX 2B" in refused(source)


@pytest.mark.parametrize(
    ("part", "count", "first"),
    [
        ("transformer_blocks.0.ff.net.2.", 2, "blocks.0.ff_out.bias"),
        ("transformer_blocks.0.attn1.to_q.bias", 1, "blocks.0.q.bias"),
        ("proj_out.", 2, "proj_out.bias"),
        ("transformer_blocks.0.attn1.", 12, "blocks.0.attn_out.bias"),
        ("ofs_embedding.linear_2.bias", 1, "ofs_embedding_linear_2.bias"),
    ],
)
def test_a_missing_weight_is_named(refused, tmp_path, part, count, first):
    weights, _ = golden("1_5_i2v")
    source = tmp_path / "model.safetensors"
    save_file({name: t for name, t in weights.items() if not name.startswith(part)}, source)
    assert f"{source}: weights are missing ({count}, the first {first})" in refused(source)


def test_a_missing_block_in_the_middle_is_named(refused, tmp_path):
    weights, _ = golden("1_5_t2v")
    last = {name: t for name, t in weights.items() if name.startswith("transformer_blocks.1.")}
    more = {name.replace("blocks.1.", "blocks.3."): t.clone() for name, t in last.items()}
    source = tmp_path / "model.safetensors"
    save_file(weights | more, source)
    assert "weights are missing (24, the first blocks.2.attn_out.bias)" in refused(source)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["blocks.0.norm1.linear.weight"], "in ComfyUI's format already"),
        (["model.diffusion_model.blocks.0.norm1.linear.weight"], "in ComfyUI's format already"),
        (["transformer.transformer_blocks.0.norm1.linear.weight"], "begin with more than"),
        (["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"], "it is a LoRA"),
        (["blocks.0.self_attn.q.weight"], "it is no CogVideoX in diffusers' layout"),
    ],
)
def test_what_is_no_whole_cogvideox_is_refused_by_name(refused, tmp_path, names, why):
    source = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1) for name in names}, source)
    assert f"{source}: " in refused(source) and why in refused(source)


@pytest.mark.parametrize("name", ["adapter.weight", "scaled_fp8"])
def test_a_weight_that_comfyui_has_not_is_named(refused, tmp_path, name):
    weights, _ = golden("1_5_t2v")
    source = tmp_path / "model.safetensors"
    save_file(weights | {name: torch.zeros(1)}, source)
    assert f"{name} is no weight of a CogVideoX" in refused(source)


HEADERS = {
    "no offsets": b'{"a": {"dtype": "F16", "shape": [1]}}',
    "backwards": b'{"a": {"dtype": "F16", "shape": [1], "data_offsets": [2, 0]}}',
    "fractions": b'{"a": {"dtype": "F16", "shape": [1], "data_offsets": [0.0, 2.0]}}',
    "deep": b"[" * 100_000,
    "nothing": b"{}",
}


@pytest.mark.parametrize("damage", ["cut", "empty", "pointer", "header", *HEADERS])
def test_files_that_are_not_whole(refused, tmp_path, damage):
    source = tmp_path / "model.safetensors"
    save_file(golden("1_5_t2v")[0], source)
    made = {name: len(x).to_bytes(8, "little") + x + bytes(2) for name, x in HEADERS.items()}
    made |= {
        "cut": source.read_bytes()[:-2],
        "empty": b"",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4f2a\nsize 12\n",
        "header": (20).to_bytes(8, "little") + b"\xff" * 40,
    }
    source.write_bytes(made[damage])
    assert f"{source}: not a whole .safetensors file" in refused(source)


def test_folders_that_are_not_whole(refused, tmp_path):
    folder = published(tmp_path / "model", golden("1_5_t2v")[0])
    gone = folder / "transformer" / "model-00002-of-00002.safetensors"
    gone.unlink()
    assert f"{gone.name} is missing; download it again" in refused(folder)
    for text in ("{", "[]", "{}", '{"weight_map": 1}'):
        (folder / "transformer" / INDEX).write_text(text)
        assert f"{INDEX}: not whole; download it again" in refused(folder)
    assert "there is no such folder or file" in refused(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    assert "no .safetensors file" in refused(tmp_path / "empty")


def test_whatever_of_the_published_files_is_named(run, refused, tmp_path):
    """The index stands for its folder; a part for nothing."""
    folder = published(tmp_path / "model", golden("1_5_t2v")[0]) / "transformer"
    assert "it is one of 2 parts; name their folder" in refused(
        folder / "model-00001-of-00002.safetensors"
    )
    assert run(folder / INDEX, tmp_path / "one.safetensors")[1] is None
    (folder / INDEX).unlink()
    # As a Mac leaves them on a network drive.
    (folder / "._model-00001-of-00002.safetensors").write_bytes(b"Mac OS X")
    second = folder / "model-00002-of-00002.safetensors"
    second.rename(second.with_suffix(".SAFETENSORS"))
    assert run(folder, tmp_path / "two.safetensors")[1] is None
    one, two = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_files_of_two_models_in_a_folder(run, refused, tmp_path):
    """The whole model where it is, whatever lies beside it; no mixture of two."""
    weights, _ = golden("1_5_t2v")
    zeros = {name: torch.zeros_like(t) for name, t in weights.items()}
    (tmp_path / "model").mkdir()
    save_file(zeros, tmp_path / "model" / "model-00001-of-00002.safetensors")
    save_file(zeros, tmp_path / "model" / "other.safetensors")
    assert "is in model-00001-of-00002.safetensors and in other" in refused(tmp_path / "model")
    save_file(weights, tmp_path / "model" / WHOLE)
    target = tmp_path / "target.safetensors"
    assert run(tmp_path / "model", target)[1] is None
    out = load_file(target)["blocks.0.q.weight"]
    assert torch.equal(out, weights["transformer_blocks.0.attn1.to_q.weight"])


def test_a_file_that_is_there_is_kept(run, tmp_path):
    folder = published(tmp_path / "model", golden("1_5_t2v")[0])
    target = tmp_path / "kept.safetensors"
    target.write_text("mine")
    assert "is there already" in run(folder, target)[1]
    assert target.read_text() == "mine"
    assert "has to end in .safetensors" in run(folder, tmp_path / "model.bin")[1]


def test_a_disk_that_is_full_leaves_nothing(refused, tmp_path):
    import resource

    source = published(tmp_path / "model", golden("1_5_t2v")[0])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert "File too large" in refused(source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_another_conversion_s_file_is_left_alone(run, tmp_path):
    folder = published(tmp_path / "model", golden("1_5_t2v")[0])
    theirs = tmp_path / "target.safetensors.part"
    theirs.write_text("half")
    _, why = run(folder, tmp_path / "target.safetensors")
    assert f"{theirs}: is there already; another conversion is under way" in why
    assert theirs.read_text() == "half"


def test_a_source_that_shrinks_is_no_success(script, refused, tmp_path, monkeypatch):
    folder = published(tmp_path / "model", golden("1_5_t2v")[0])
    (cut,) = (folder / "transformer").glob("*-00002-of-*")
    convert = script.convert

    def shrinking(weights):
        cut.write_bytes(cut.read_bytes()[:-100])
        return convert(weights)

    monkeypatch.setattr(script, "convert", shrinking)
    assert f"{cut}: it became shorter while it was read" in refused(folder)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_asked_to_end_it_leaves_nothing(script, refused, tmp_path, monkeypatch, name):
    source = published(tmp_path / "model", golden("1_5_t2v")[0])
    number = getattr(signal, name)
    monkeypatch.setattr(script, "_copy", lambda *given: os.kill(os.getpid(), number))
    assert refused(source) == "nothing was written: stopped"


def test_stopped_half_way_leaves_nothing(script, refused, tmp_path, monkeypatch):
    source = published(tmp_path / "model", golden("1_5_t2v")[0])
    copied = []

    def stop(weight, target):
        copied.append(weight)
        if len(copied) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(script, "_copy", stop)
    assert refused(source) == "nothing was written: stopped"
