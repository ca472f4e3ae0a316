"""Tuned checkpoints: the published one, those of other models, and broken ones."""

import errno
import io
import os
import pickle
import struct
import zipfile
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


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float64, torch.float8_e4m3fn], ids=lambda dtype: str(dtype)[6:]
)
def test_thresholds_of_any_float_type_are_read(dtype, tmp_path):
    content = {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in entries().items()}
    checkpoint = load_checkpoint(save(tmp_path, content))
    stored = content["blocks.7.self_attn.inner_attention.cdfthreshd"].double().tolist()
    assert list(checkpoint[7].cdfthreshd) == pytest.approx(stored, rel=1e-6)


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


def _zip_of(name, data):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/version", "3\n")
        file.writestr(name, data)
    return _raw(archive.getvalue())


def _safetensors(folder):
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return _raw(struct.pack("<Q", len(header)) + header + bytes(4))(folder)


def _pipe(folder):
    os.mkfifo(folder / "tuned.pt")
    return folder / "tuned.pt"


def _layer(name):
    key = f"blocks.{name}.self_attn.inner_attention.cdfthreshd"
    return _changed(lambda content: content.__setitem__(key, torch.ones(4)))


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
    "safetensors-renamed": (_safetensors, "was not loaded"),
    "web-page": (_raw(b"<!DOCTYPE html><html></html>"), "was not loaded"),
    "lfs-pointer": (_raw(b"version https://git-lfs.github.com/spec/v1\n"), "was not loaded"),
    "another-zip": (_zip_of("archive/notes.txt", b"hello"), "not a complete PyTorch file"),
    "zip-with-code": (_zip_of("archive/data.pkl", pickle.dumps(RunsCode(), 2)), "could run code"),
    "last-byte-lost": (
        lambda folder: _raw(save(folder, entries()).read_bytes()[:-1])(folder),
        "not a complete PyTorch file",
    ),
    "bytes": (_raw(b"hello"), "is not a complete PyTorch file$|was not loaded"),
    "pipe": (_pipe, "is not a file"),
    "endless-name": (lambda folder: folder / f"{'a' * 5000}.pt", "does not exist"),
    "nested-pickle": (
        _set("cdfthreshd", pickle.dumps(RunsCode())),
        "a bytes at .*cdfthreshd' where a tensor belongs",
    ),
    "whole-module": (lambda folder: save(folder, torch.nn.Linear(2, 2)), "could run code"),
    "state-dict-inside": (lambda folder: save(folder, {"state_dict": entries()}), "'state_dict'"),
    "layer-of-30-digits": (_layer("9" * 30), "has an entry 'blocks.999"),
    "layer-of-6000-digits": (_layer("9" * 6000), "has an entry 'blocks.999"),
    "layer-far-away": (_layer("999999"), "up to layer 999999 but none for layer 12"),
    "layer-with-zeros": (_layer("01"), "has an entry 'blocks.01."),
    "meta-tensor": (_set("cdfthreshd", torch.ones(4, device="meta")), "one without values"),
    "sparse-tensor": (_set("cdfthreshd", torch.ones(4).to_sparse()), "has a sparse tensor"),
    "complex": (_set("cdfthreshd", torch.ones(4) * 1j), "torch.complex64 at"),
    "infinite": (_set("cdfthreshd", torch.full((4,), float("inf"))), "has inf at"),
    "just-out-of-range": (_set("cdfthreshd", torch.full((4,), 1.0 + 2**-22)), "has 1.00000023"),
    "range-of-similarity": (_set("simthreshd1", torch.full((4,), -1.1)), "has -1.10.* between -1"),
    "range-of-pvthreshd": (_set("pvthreshd", torch.full((4,), -0.1)), "has -0.1.* between 0 and"),
    "more-heads-than-memory": (
        _set("cdfthreshd", torch.ones(1).expand(10**13)),
        r"shape \[10000000000000\] at .*one value per head",
    ),
    "endless-entry": (_set("x" * 5000, torch.ones(4)), "unknown entry 'blocks.2.self_attn.inner"),
    "lines-in-names": (
        _changed(lambda c: c.update({f"a\nb.{key}": value for key, value in [*c.items()]})),
        r"mixes entries of several models: blocks and a\\nb.blocks$",
    ),
    "out-of-range": (_set("cdfthreshd", torch.full((4,), 1.5)), "has 1.5 at .* between 0 and 1"),
}


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), "cannot be read: there is not enough memory$"),
        (OSError(errno.EIO, "Input/output error"), "cannot be read: Input/output error$"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be read: Permission denied$"),
    ],
)
def test_what_is_not_the_files_fault_is_told_so(tmp_path, monkeypatch, error, sentence):
    def load(*args, **kwargs):
        raise error

    path = save(tmp_path, entries())
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(path)


def test_a_file_saved_on_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        path = save(tmp_path, entries())
    assert load_checkpoint(path).num_heads == 4


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_sentence_naming_it(kind, tmp_path, monkeypatch):
    write, sentence = BROKEN[kind]
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert len(message) < 6000 if "endless-name" in kind else len(message) < 1000
    assert not (tmp_path / "loaded-code-ran").exists()
