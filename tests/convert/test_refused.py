"""Models and files that cannot be converted: one sentence each, and nothing written."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from .published import INDEX, WHOLE, golden, published


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
