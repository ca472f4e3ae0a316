"""The Triton statistics: equal to torch in the interpreter, and compiled for every architecture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "sparge_maps.npz"

IN_THE_INTERPRETER = """
import json
import sys

import numpy as np
import torch
from sparse_video_attention.sparge import dynamic_map, statistics
from sparse_video_attention.sparge.triton_map import block_statistics

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

golden = np.load(sys.argv[1])
dynamic_map.block_statistics = block_statistics
for index, case in enumerate(json.loads(str(golden["cases"]))):
    q, k = (torch.from_numpy(golden[f"{name}_{index}"]) for name in "qk")
    kept = dynamic_map.block_map(q, k, **case)
    assert torch.equal(kept, torch.from_numpy(golden[f"map_{index}"])), index
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
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    suffix = "a" if capability >= 90 else ""
    assembled = subprocess.run(
        [_ptxas(triton), f"-arch=sm_{capability}{suffix}", "-v", str(ptx), "-o", os.devnull],
        capture_output=True,
        text=True,
    )
    assert "0 bytes spill stores, 0 bytes spill loads" in assembled.stderr, assembled.stderr


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
