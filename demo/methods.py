"""The sparse methods that the demo shows, and the workflows that ship with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .workflow import Workflow


@dataclass(frozen=True)
class Method:
    """One node of the pack.

    Attributes:
        key: in file names.
        title: in captions.
        node: class of its node.
    """

    key: str
    title: str
    node: str


RADIAL = Method("radial", "radial", "PatchRadialAttention")
PSA = Method("psa", "PSA", "PatchPSA")
SPARGE = Method("sparge", "Sparge", "PatchSpargeAttention")
METHODS = (RADIAL, PSA, SPARGE)
PATCHES = tuple(method.node for method in METHODS)


def method_workflow(folder: Path, stem: str, method: Method) -> Workflow:
    """The shipped workflow of a family with a method's node.

    Args:
        folder: with API forms.
        stem: of the family's file names: "wan_t2v" or "cogvideox".
    """
    return Workflow.load(folder / f"{stem}_{method.key}.json")
