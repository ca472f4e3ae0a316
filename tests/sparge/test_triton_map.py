"""The Triton statistics and selection: equal to torch in the interpreter, and compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "sparge_maps.npz"

IN_THE_INTERPRETER = """
import importlib
import json
import sys

import numpy as np
import torch
from sparse_video_attention.kernels.twins import Twins
from sparse_video_attention.sparge import block_map, dynamic_map, statistics
from sparse_video_attention.sparge.triton_map import block_statistics
from sparse_video_attention.sparge import triton_select
from sparse_video_attention.sparge.triton_select import select

cases = [  # batch, heads, tokens, head_dim, block, dtype, center
    (1, 2, 256, 64, 128, torch.float32, False),
    (2, 3, 333, 128, 64, torch.bfloat16, True),
    (1, 1, 63, 64, 128, torch.float16, True),
    (1, 2, 200, 24, 32, torch.float32, True),
]
for batch, heads, tokens, head_dim, block, dtype, with_center in cases:
    gen = torch.Generator().manual_seed(tokens)
    # Token-major memory, as models hand it over.
    x = torch.randn(batch, tokens, heads, head_dim, generator=gen).add_(0.5).to(dtype)
    x = x.transpose(1, 2)
    center = x.mean(2, keepdim=True, dtype=torch.float32) if with_center else None
    found = block_statistics(x, block, center)
    truth = statistics.torch_block_statistics(x, block, center)
    torch.testing.assert_close(found.mean, truth.mean)
    torch.testing.assert_close(found.similarity, truth.similarity, equal_nan=True)
    assert truth.similarity.isnan().sum() == batch * heads * (tokens % block > 0)

class OnTheCpu(Twins):
    # Twins of these names run here, the others never.

    def __init__(self, *names):
        self.names = names or ("triton_map", "triton_select")
        self.used = set()

    def run(self, module, x, refuses, run, wrong, kind):
        name = module.rpartition(".")[2]
        if name not in self.names:
            return None
        twin = importlib.import_module(module)
        assert refuses(twin) is None
        self.used.add(name)
        found = run(twin)
        assert wrong(found) is None, wrong(found)
        return found


golden = np.load(sys.argv[1])
for index, case in enumerate(json.loads(str(golden["cases"]))):
    q, k = (torch.from_numpy(golden[f"{name}_{index}"]) for name in "qk")
    twins = OnTheCpu("triton_map", *["triton_select"] * (index % 2))  # a program takes a while
    kept = block_map(q, k, **case, twins=twins)
    assert torch.equal(kept, torch.from_numpy(golden[f"map_{index}"])), index
    assert twins.used == set(twins.names)

# Thresholds per head, several chunks of rows, a sink, heads without a competitor.
gen = torch.Generator().manual_seed(5)
q, k = (torch.randn(1, 3, n, 16, generator=gen) * 3 for n in (90, 600))
q += 2  # queries are alike, and about half of the key blocks
dynamic_map.CHUNK_SCORES = 3 * 19
for how in (
    {"topk": [0.05, 0.5, 1.0], "simthreshd1": [-1.0, 0.031, float("inf")]},
    {"topk": torch.tensor([0.01, 0.3, 0.9]), "simthreshd1": -1.0, "attention_sink": True},
    {"cdfthreshd": [0.0, 0.6, 1.0], "simthreshd1": torch.tensor([2.0, 0.031, -1.0])},
    {"cdfthreshd": 0.9, "simthreshd1": -1.0},
):
    how |= {"block_q": 64, "block_k": 32}
    found, truth = block_map(q, k, **how, twins=OnTheCpu()), block_map(q, k, **how)
    assert torch.equal(found, truth), how
    assert 0.1 < truth[:, :, 0].float().mean() < 0.9, how

# The longest rows, with many equal scores: a block more needs torch.
assert triton_select.refuses(2**14) and triton_select.refuses(2**14 - 1) is None
scores = torch.randn(1, 1, 2, 2**14 - 1, generator=gen).mul(4).round()
alike = torch.ones(1, 1, 2**14 - 1, dtype=torch.bool)
for how in ({"counts": 3000, "limit": None}, {"counts": None, "limit": 0.7}):
    kept = torch.zeros(1, 1, 2, 2**14 - 1, dtype=torch.bool)
    select(scores, alike[..., :2].contiguous(), alike, kept, first_row=0, **how)
    chosen = dynamic_map._highest_count, dynamic_map._highest_mass
    want = chosen[how["counts"] is None](scores.clone(), how["counts"] or how["limit"])
    assert torch.equal(kept, want), how

# Equal scores: as many as asked for, the first of them.
scores = torch.tensor([[0.0, 1.0, -2.0, 1.0, 0.0, -2.0, 1.0, 0.0, 0.0, -3.0]])[None, None]
alike = torch.ones(1, 1, 10, dtype=torch.bool)
for count, expected in ((1, [1]), (2, [1, 3]), (5, [0, 1, 3, 4, 6]), (8, [0, 1, 2, 3, 4, 6, 7, 8])):
    kept = torch.zeros(1, 1, 1, 10, dtype=torch.bool)
    select(scores, alike[..., :1], alike, kept, first_row=0, counts=count)
    assert kept[0, 0, 0].nonzero()[:, 0].tolist() == expected, (count, kept)
shares = scores.softmax(-1)[0, 0, 0]
for number, expected in ((0, [1]), (1, [1]), (2, [1, 3]), (4, [0, 1, 3, 6])):
    kept = torch.zeros(1, 1, 1, 10, dtype=torch.bool)
    limit = float(shares.sort(descending=True).values[:number].sum()) + 1e-4 * (number > 0)
    select(scores, alike[..., :1], alike, kept, first_row=0, limit=limit)
    assert kept[0, 0, 0].nonzero()[:, 0].tolist() == expected, (number, kept)
print("equal")
"""


def test_equals_torch_in_the_interpreter():
    pytest.importorskip("triton")
    ran = subprocess.run(
        [sys.executable, "-c", IN_THE_INTERPRETER, str(GOLDEN)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.stdout.strip().endswith("equal"), ran.stderr


@pytest.mark.parametrize(
    ("capability", "block", "head_dim"),
    [(80, 128, 128), (89, 64, 64), (90, 128, 128), (100, 128, 128), (120, 64, 128)],
    ids=lambda value: str(value),
)
def test_compiles_without_spilling(capability, block, head_dim, tmp_path):
    triton = pytest.importorskip("triton")
    from sparse_video_attention.sparge.triton_map import block_statistics_kernel as kernel
    from triton.backends.compiler import GPUTarget

    constants = {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_PADDED": head_dim,
        "BLOCK": block,
        "HAS_CENTER": True,
    }
    signature = {"X": "*bf16", "CENTER": "*fp32", "MEAN": "*bf16", "SIMILARITY": "*fp32"}
    signature |= dict.fromkeys(("stride_xb", "stride_xh", "stride_xn"), "i32")
    signature |= {"stride_xd": "constexpr", "num_heads": "i32", "num_tokens": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        triton.compiler.ASTSource(
            fn=kernel, signature=signature, constexprs=constants | {"stride_xd": 1}
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 8 if block * head_dim >= 8192 else 4},
    )
    assert_no_spills(triton, compiled, capability, tmp_path)


@pytest.mark.parametrize("by_mass", [False, True], ids=["topk", "cdfthreshd"])
@pytest.mark.parametrize("width", [512, 2048, 8192, 16384], ids=lambda width: f"N{width}")
@pytest.mark.parametrize("capability", [80, 89, 90], ids=["sm80", "sm89", "sm90"])
def test_selection_compiles_without_spilling(capability, width, by_mass, tmp_path):
    triton = pytest.importorskip("triton")
    from sparse_video_attention.sparge import triton_select
    from triton.backends.compiler import GPUTarget

    kernel = triton_select.select_kernel
    constants = {"BY_MASS": by_mass, "PER_HEAD": True, "SINK": True, "WIDTH": width}
    types = {"Scores": "*fp32", "QAlike": "*i8", "KAlike": "*i8", "Kept": "*i8", "limit": "fp32"}
    types["Limits"] = "*fp32" if by_mass else "*i64"
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    compiled = triton.compile(
        triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": triton_select._warps(width)},
    )
    assert_no_spills(triton, compiled, capability, tmp_path)


def assert_no_spills(triton, compiled, capability, tmp_path):
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    suffix = "a" if capability >= 90 else ""
    assembled = subprocess.run(
        [_ptxas(triton), f"-arch=sm_{capability}{suffix}", "-v", str(ptx), "-o", os.devnull],
        capture_output=True,
        text=True,
    )
    # On Windows it writes to the other one.
    said = assembled.stdout + assembled.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in said, said


def _ptxas(triton):
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = sorted(folder.glob("ptxas*"), key=lambda path: "blackwell" not in path.name)
    if not found:
        pytest.skip("this Triton brings no ptxas")
    return str(found[0])


@pytest.mark.gpu
def test_equals_the_published_map_on_a_gpu():
    import json

    import numpy as np
    import torch
    from sparse_video_attention.sparge import block_map

    golden = np.load(GOLDEN)
    for index, case in enumerate(json.loads(str(golden["cases"]))):
        q, k = (torch.from_numpy(golden[f"{name}_{index}"]).cuda() for name in "qk")
        kept = block_map(q, k, **case)
        assert torch.equal(kept.cpu(), torch.from_numpy(golden[f"map_{index}"])), index
