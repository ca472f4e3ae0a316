"""Dense libraries that are missing, broken or too old: a reason, and what to do about it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sparse_video_attention.third_party import DENSE_BACKENDS
from sparse_video_attention.third_party.comfy_kitchen_int8 import load
from sparse_video_attention.third_party.constraints import Constraints
from sparse_video_attention.third_party.library import LibraryUnusable

WHEELS = {
    "flash_attn2": "flash_attn",
    "flash_attn3": "flash_attn_interface",
    "flash_attn4": "flash_attn.cute",
    "sage_attn2": "sageattention",
    "sage_attn3": "sageattn3",
    "xformers": "xformers.ops",
    "comfy_kitchen_int8": "comfy_kitchen",
}


@pytest.mark.parametrize("name", WHEELS)
@pytest.mark.parametrize(
    "code",
    [
        "raise OSError('libcudart.so.11: cannot open shared object file')",
        "raise ImportError('DLL load failed while importing _C')",
        "raise RuntimeError('built for\\n another torch')",
        "import a_module_nobody_has",
    ],
    ids=["OSError", "ImportError", "RuntimeError", "missing-dependency"],
)
def test_a_broken_wheel_is_a_reason(name, code, broken_wheel, qkv):
    broken_wheel(WHEELS[name], code)
    backend = replace(DENSE_BACKENDS[name])
    reason = backend.unavailable()
    text = code.partition("'")[2].rpartition("'")[0].replace("\\n ", " ") or "a_module_nobody_has"
    assert "does not work" in reason and text in reason and "\n" not in reason
    assert "to install it: " in reason
    with pytest.raises(ValueError, match="cannot run"):
        backend.run(*qkv())


@pytest.mark.parametrize("system", ["Linux", "Windows"])
@pytest.mark.parametrize("name", WHEELS)
def test_a_missing_library_is_a_reason_with_an_instruction(name, system, monkeypatch):
    for module in WHEELS.values():  # None: importing it finds nothing
        monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    monkeypatch.setitem(sys.modules, "flash_attn_3", None)
    monkeypatch.setattr("platform.system", lambda: system)
    backend = replace(DENSE_BACKENDS[name])
    reason = backend.unavailable()
    hint = backend.library.linux if system == "Linux" else backend.library.windows
    assert "is not installed; to install it: " in reason and hint in reason


@pytest.mark.parametrize("no_device", [None, "it needs a GPU of another kind"])
@pytest.mark.parametrize("name", WHEELS)
def test_in_short_it_is_what_decides(name, no_device, monkeypatch):
    for module in WHEELS.values():
        monkeypatch.setitem(sys.modules, module.split(".")[0], None)
    monkeypatch.setitem(sys.modules, "flash_attn_3", None)
    monkeypatch.setattr(Constraints, "machine_reason", lambda self: no_device)
    short = replace(DENSE_BACKENDS[name]).unavailable_in_short()
    # What no installing would change comes first.
    assert short == no_device or (no_device is None and short.endswith("is not installed"))


def test_flash_attention_2_is_not_there_where_only_version_4_is(broken_wheel):
    """Both live in the folder flash_attn, which version 4 alone leaves without an __init__."""
    broken_wheel("flash_attn.cute", "def flash_attn_func(*args, **options): ...")
    folder = next(Path(path) for path in sys.path if (Path(path) / "flash_attn").is_dir())
    (folder / "flash_attn" / "__init__.py").unlink()
    reason = replace(DENSE_BACKENDS["flash_attn2"]).unavailable()
    assert "only FlashAttention 4 is installed; to install it: " in reason
    no_gpu_here = replace(DENSE_BACKENDS["flash_attn4"]).unavailable() or ""
    assert "install" not in no_gpu_here


def test_xformers_without_its_compiled_part_is_a_reason(stand_in):
    stand_in("xformers", _has_cpp_library=False)
    stand_in("xformers.ops", memory_efficient_attention=None)
    reason = replace(DENSE_BACKENDS["xformers"]).unavailable()
    assert "is built for another torch or CUDA release; to install it: pip install x" in reason


def test_comfy_kitchen_without_the_call_says_what_to_do(stand_in):
    stand_in("comfy_kitchen")
    reason = replace(DENSE_BACKENDS["comfy_kitchen_int8"]).unavailable()
    assert "no int8_attention yet; 0.2.30 and newer have it" in reason
    assert "pip install -U comfy-kitchen" in reason


@pytest.mark.parametrize("said", [{}, {"unavailable_reason": "libcudart.so.13: cannot open"}])
def test_comfy_kitchen_without_its_compiled_part_says_why(stand_in, monkeypatch, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stand_in(
        "comfy_kitchen",
        int8_attention=None,
        int8_attention_is_available=lambda: False,
        list_backends=lambda: {"cuda": said},
    )
    with pytest.raises(LibraryUnusable) as error:
        load()
    why = said.get("unavailable_reason", "they were made for other GPUs")
    assert str(error.value) == f"the kernels of comfy_kitchen do not run here: {why}"
