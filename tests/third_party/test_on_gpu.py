"""Every installed library on this machine's GPU, against attention in float32."""

import pytest
import torch
from sparse_video_attention.kernels import block_sparse_attention
from sparse_video_attention.kernels.registry import KernelCall
from sparse_video_attention.third_party import DENSE_BACKENDS
from sparse_video_attention.third_party.sparse_kernels import SPARSE_BACKENDS

from .conftest import exact, random_plan

pytestmark = pytest.mark.gpu


def relative_error(out, truth):
    return float((out.double() - truth).norm() / truth.norm())


def allowed_error(constraints):
    return 0.1 if constraints.is_low_precision else 0.01


@pytest.mark.parametrize("name", DENSE_BACKENDS)
@pytest.mark.parametrize(
    ("tokens", "keys", "head_dim"),
    [(2048, 2048, 128), (1000, 1000, 64), (1560, 512, 128), (1560, 257, 128)],
    ids=str,
)
@pytest.mark.parametrize("memory", ["tokens", "heads"])
def test_a_dense_backend_is_attention(name, tokens, keys, head_dim, memory, qkv):
    backend = DENSE_BACKENDS[name]
    if backend.unavailable() is not None:
        pytest.skip(backend.unavailable())
    q, k, v = (x.cuda() for x in qkv(memory, 2, 3, tokens, keys, head_dim))
    before = [x.clone() for x in (q, k, v)]
    if backend.refuses(q, k, v) is not None:
        pytest.skip(backend.refuses(q, k, v))
    error = relative_error(backend.run(q, k, v), exact(*before))
    assert error < allowed_error(backend.constraints)
    assert all(torch.equal(x, was) for x, was in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("name", SPARSE_BACKENDS)
@pytest.mark.parametrize("blocks", [(128, 128), (128, 64), (64, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("tokens", [2048, 1900], ids=lambda n: f"N{n}")
def test_a_sparse_backend_attends_to_the_plan(name, blocks, head_dim, tokens, qkv):
    backend = SPARSE_BACKENDS[name]
    if backend.unavailable() is not None:
        pytest.skip(backend.unavailable())
    plan, mask = random_plan((tokens, tokens), blocks, 2, 3)
    plan, mask = plan.on_device("cuda"), mask.cuda()
    q, k, v = (x.cuda() for x in qkv("tokens", 2, 3, tokens, tokens, head_dim))
    call = KernelCall(q, k, v, plan, head_dim**-0.5, backend.precision)
    if backend.refuses(call) is not None:
        pytest.skip(backend.refuses(call))
    out = block_sparse_attention(q, k, v, plan, kernel=name, precision=backend.precision)
    assert relative_error(out, exact(q, k, v, mask=mask)) < allowed_error(backend.constraints)
