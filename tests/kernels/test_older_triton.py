"""What Triton 3.1 cannot read, of all kernels: it has no more of Python than that."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(ROOT.glob("*/triton_*.py"))


def kernels(file):
    """Functions that Triton compiles."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and any(
            "jit" in ast.unparse(decorator) for decorator in node.decorator_list
        ):
            yield node


def test_there_are_kernels():
    assert sum(1 for file in FILES for _ in kernels(file)) > 20


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_kernel_has_what_triton_3_1_refuses(file):
    """It takes one `and` or `or`, and one comparison, at a time."""
    for kernel in kernels(file):
        for node in ast.walk(kernel):
            where = f"{file.name}:{getattr(node, 'lineno', 0)}"
            assert not (isinstance(node, ast.BoolOp) and len(node.values) > 2), where
            assert not (isinstance(node, ast.Compare) and len(node.ops) > 1), where
