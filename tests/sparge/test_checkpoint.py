"""Tuned checkpoints: the published one, those of other models, and broken ones."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from sparse_video_attention.sparge import load_checkpoint

PUBLISHED = Path(__file__).parents[1] / "golden" / "sparge_cogvideox_2b.pt"
NAMES = ("is_sparse", "cdfthreshd", "simthreshd1", "simthreshd2", "pvthreshd")


def entries(path="blocks.{}.self_attn", layers=12, heads=4):
    """A healthy file whose numbers tell layer, head and name apart."""
    out = {}
    for layer in range(layers):
        base = torch.arange(heads) / 100 + layer / 20
        values = (torch.arange(heads) % 2 == 0, base, base - 0.9, base * 0, base * 30)
        for name, value in zip(NAMES, values, strict=True):
            out[f"{path.format(layer)}.inner_attention.{name}"] = value
    return out


def save(folder, content):
    torch.save(content, folder / "tuned.pt")
    return folder / "tuned.pt"


def test_published_checkpoint_is_read_whole():
    raw = torch.load(PUBLISHED, weights_only=True)
    checkpoint = load_checkpoint(PUBLISHED, num_layers=30, num_heads=30, family="CogVideoX")
    assert (len(checkpoint), checkpoint.num_heads, checkpoint.family) == (30, 30, "CogVideoX")
    for layer, thresholds in enumerate(checkpoint):
        for name in ("is_sparse", "cdfthreshd", "simthreshd1", "pvthreshd"):
            stored = raw[f"transformer_blocks.{layer}.attn1.inner_attention.{name}"]
            assert getattr(thresholds, name) == tuple(stored.tolist()), (layer, name)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["bare", "prefixed"])
def test_layer_10_is_not_layer_1(tmp_path, prefix):
    content = {f"{prefix}{key}": value for key, value in reversed(entries().items())}
    checkpoint = load_checkpoint(save(tmp_path, content))
    assert checkpoint.family == "WAN"
    assert len(checkpoint) == 12
    assert [layer.cdfthreshd[0] for layer in checkpoint] == pytest.approx(
        [layer / 20 for layer in range(12)]
    )
    assert checkpoint[10].is_sparse == (True, False, True, False)


def test_equal_files_are_equal_and_hashable(tmp_path):
    first = load_checkpoint(save(tmp_path, entries()))
    again = load_checkpoint(save(tmp_path, entries()))
    other = entries()
    other["blocks.3.self_attn.inner_attention.cdfthreshd"][1] = 0.5
    assert first == again and hash(first) == hash(again)
    assert first != load_checkpoint(save(tmp_path, other))


@pytest.mark.parametrize(
    ("expected", "both_numbers"),
    [
        ({"num_layers": 40}, "30 layers .CogVideoX. where this model has 40"),
        ({"num_heads": 48}, "30 heads a layer .CogVideoX. where this model has 48"),
        ({"family": "WAN"}, "named as in CogVideoX and this model is WAN"),
    ],
    ids=["layers", "heads", "family"],
)
def test_another_models_checkpoint_is_refused(expected, both_numbers):
    with pytest.raises(ValueError, match=both_numbers):
        load_checkpoint(PUBLISHED, **expected)


class RunsCode:
    """Its pickle would make a folder when loaded."""

    def __reduce__(self):
        return os.mkdir, ("loaded-code-ran",)


def _changed(change):
    def write(folder):
        content = entries()
        change(content)
        return save(folder, content)

    return write


def _set(name, value, layer=2):
    key = f"blocks.{layer}.self_attn.inner_attention.{name}"
    return _changed(lambda content: content.__setitem__(key, value))


def _delete(*names, layer=2):
    keys = [f"blocks.{layer}.self_attn.inner_attention.{name}" for name in names]
    return _changed(lambda content: [content.pop(key) for key in keys])


def _raw(data):
    def write(folder):
        (folder / "tuned.pt").write_bytes(data)
        return folder / "tuned.pt"

    return write


def _truncated(folder):
    data = save(folder, entries()).read_bytes()
    return _raw(data[: len(data) // 2])(folder)


def _second_model(content):
    content.update(entries("model.blocks.{}.self_attn"))


def _shorter_layer(content):
    for name in NAMES:
        key = f"blocks.5.self_attn.inner_attention.{name}"
        content[key] = content[key][:3]


BROKEN = {
    "missing-file": (lambda folder: folder / "none.pt", "does not exist"),
    "folder": (lambda folder: folder, "is a folder"),
    "empty-file": (_raw(b""), "is empty"),
    "text": (_raw(b"not a checkpoint"), "was not loaded|not a complete PyTorch file"),
    "truncated": (_truncated, "not a complete PyTorch file"),
    "code": (lambda folder: save(folder, {"a": RunsCode()}), "could run code"),
    "bare-pickle-code": (_raw(pickle.dumps(RunsCode(), protocol=2)), "could run code"),
    "list": (lambda folder: save(folder, [torch.ones(3)]), "holds a list"),
    "tensor": (lambda folder: save(folder, torch.ones(3)), "holds a Tensor"),
    "empty-dict": (lambda folder: save(folder, {}), "holds no entries"),
    "number-key": (_changed(lambda c: c.update({7: torch.ones(4)})), "has an entry 7; expected"),
    "weights": (
        lambda folder: save(folder, {"blocks.0.self_attn.q.weight": torch.ones(4, 4)}),
        "has an entry 'blocks.0.self_attn.q.weight'; expected",
    ),
    "other-module": (
        lambda folder: save(folder, entries("vace_blocks.{}.self_attn")),
        "has an entry 'vace_blocks.0",
    ),
    "unknown-name": (_set("lambda", torch.ones(4)), "unknown entry .*lambda'; known are"),
    "missing-name": (_delete("cdfthreshd"), "has no 'cdfthreshd' for layer 2"),
    "missing-layer": (_delete(*NAMES), "up to layer 11 but none for layer 2"),
    "two-models": (_changed(_second_model), "mixes entries of several models"),
    "short-tensor": (_set("pvthreshd", torch.ones(3)), "3 values of 'pvthreshd' for layer 2"),
    "short-layer": (_changed(_shorter_layer), "for layer 5 where layer 0 has 4 heads"),
    "matrix": (_set("cdfthreshd", torch.ones(4, 1)), r"shape \[4, 1\] at .*cdfthreshd"),
    "no-heads": (_set("cdfthreshd", torch.ones(0)), r"shape \[0\] at .*cdfthreshd"),
    "number": (_set("cdfthreshd", 0.5), "a float at .*cdfthreshd' where a tensor belongs"),
    "integers": (_set("cdfthreshd", torch.ones(4, dtype=torch.int64)), "torch.int64 at"),
    "float-flags": (_set("is_sparse", torch.ones(4)), "torch.float32 at .* torch.bool belongs"),
    "nan": (_set("simthreshd1", torch.tensor([0.1, float("nan"), 0, 0])), "has nan at"),
    "out-of-range": (_set("cdfthreshd", torch.full((4,), 1.5)), "has 1.5 at .* between 0 and 1"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_sentence_naming_it(kind, tmp_path, monkeypatch):
    write, sentence = BROKEN[kind]
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert not (tmp_path / "loaded-code-ran").exists()
