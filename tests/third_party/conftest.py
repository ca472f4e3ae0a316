"""Stand-ins for libraries that need a GPU: their call, layout, return and faults, on the CPU.

Signatures are those of the libraries; each stand-in computes the attention its library would,
so that a wrong layout, scale or argument gives wrong numbers or a TypeError.
"""

import sys
import types
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from sparse_video_attention.kernels import BlockPlan

# Their asserts then say what was compared, as those of tests do.
pytest.register_assert_rewrite(f"{__package__}.dense_libraries", f"{__package__}.sparse_libraries")


@dataclass
class Calls:
    """What a stand-in was given: its tensors and its other arguments."""

    tensors: list = field(default_factory=list)
    arguments: list = field(default_factory=list)

    def add(self, *tensors, **arguments):
        self.tensors.append(tensors)
        self.arguments.append(arguments)


def exact(q, k, v, scale=None, mask=None):
    """[B, H, N, D] attention in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def tokens_first(q, k, v, scale):
    """[B, N, H, D] attention."""
    out = exact(*(x.transpose(1, 2) for x in (q, k, v)), scale)
    return out.transpose(1, 2).to(q.dtype).contiguous()


def random_plan(tokens=(300, 333), blocks=(128, 64), batch=1, heads=2, packed=True, seed=0, **how):
    """A plan with about half of the blocks, and its mask over tokens [B, H, N, N']."""
    gen = torch.Generator().manual_seed(seed)
    rows, columns = (-(-n // size) for n, size in zip(tokens, blocks, strict=True))
    mask = torch.rand(batch, heads, rows, columns, generator=gen) > 0.5
    mask.scatter_(3, torch.randint(columns, (batch, heads, rows, 1), generator=gen), True)
    plan = BlockPlan.from_mask(
        mask,
        block_m=blocks[0],
        block_n=blocks[1],
        q_len=tokens[0],
        k_len=tokens[1],
        packed=packed,
        **how,
    )
    return plan, over_tokens(mask, blocks, tokens)


def over_tokens(mask, blocks, tokens):
    for dim, size, length in zip((2, 3), blocks, tokens, strict=True):
        mask = mask.repeat_interleave(size, dim).narrow(dim, 0, length)
    return mask.bool()


@pytest.fixture
def calls():
    return Calls()


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in("a.b", name=value): importing a.b finds a module with these attributes."""

    made = {}

    def install(module, **attributes):
        parent = None
        for end, part in enumerate(module.split("."), start=1):
            name = ".".join(module.split(".")[:end])
            if name not in made:
                made[name] = types.ModuleType(name)
                made[name].__path__ = []
                monkeypatch.setitem(sys.modules, name, made[name])
            if parent is not None:
                setattr(parent, part, made[name])
            parent = made[name]
        vars(parent).update(attributes)

    return install


@pytest.fixture
def broken_wheel(tmp_path, monkeypatch):
    """broken_wheel("a.b", code): a package on disk whose import runs this code."""

    def install(package, code):
        folder = tmp_path / "site"
        for part in package.split("."):
            folder = folder / part
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").write_text("")
        (folder / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        for name in [name for name in sys.modules if name.split(".")[0] == package.split(".")[0]]:
            monkeypatch.delitem(sys.modules, name)

    return install


@pytest.fixture
def qkv():
    """qkv(memory, ...): q, k, v [B, H, N, D] laid out heads-first or tokens-first in memory."""

    def make(memory="tokens", batch=2, heads=3, tokens=130, keys=130, head_dim=64, seed=0):
        gen = torch.Generator().manual_seed(seed)

        def one(length):
            if memory == "tokens":
                x = torch.randn(batch, length, heads, head_dim, generator=gen).transpose(1, 2)
            else:
                x = torch.randn(batch, heads, length, head_dim, generator=gen)
            return (x + 0.5).to(torch.bfloat16)

        return one(tokens), one(keys), one(keys)

    return make


def close(out, truth):
    torch.testing.assert_close(out.double(), truth.double(), atol=2e-2, rtol=2e-2)
