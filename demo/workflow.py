"""Workflows in API form, and the changes that the demo makes to the shipped ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustomAdvanced")
PATCH = "PatchRadialAttention"
TEXT = "CLIPTextEncode"


class Workflow:
    """A graph of ComfyUI nodes by id; every change gives a new one.

    Attributes:
        nodes: what /prompt takes.
    """

    def __init__(self, nodes: dict[str, dict[str, Any]]) -> None:
        self.nodes = nodes

    @classmethod
    def load(cls, path: Path) -> Workflow:
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def _copy(self) -> Workflow:
        return Workflow(copy.deepcopy(self.nodes))

    def find(self, *class_types: str) -> str:
        """Id of the only node of these classes.

        Raises:
            KeyError: there is none, or more than one.
        """
        found = [name for name, node in self.nodes.items() if node["class_type"] in class_types]
        if len(found) != 1:
            raise KeyError(f"{len(found)} nodes of {' or '.join(class_types)} in the workflow")
        return found[0]

    @property
    def sampler(self) -> str:
        return self.find(*SAMPLERS)

    @property
    def samplers(self) -> frozenset[str]:
        """Ids of all of them: one schedule may be split."""
        return frozenset(n for n, node in self.nodes.items() if node["class_type"] in SAMPLERS)

    def value(self, name: str) -> Any:
        """The value of a widget that one node has.

        Raises:
            KeyError: no node has it.
        """
        for node in self.nodes.values():
            if name in node["inputs"]:
                return node["inputs"][name]
        raise KeyError(f"no node of the workflow has an input {name}")

    def linked_from(self, name: str) -> str:
        """Id of the node behind the linked input that one node has under this name."""
        return str(self.value(name)[0])

    def setting(self, **inputs: Any) -> Workflow:
        """With these widgets set on every node that has them."""
        new = self._copy()
        for node in new.nodes.values():
            for name in node["inputs"].keys() & inputs.keys():
                node["inputs"][name] = inputs[name]
        return new

    def without(self, *class_types: str) -> Workflow:
        """Without these nodes; what they fed gets what came into them under the same type.

        Only nodes with one linked input can be bypassed like this; others leave their
        consumers' inputs out.
        """
        new = self._copy()
        for name in [n for n, node in self.nodes.items() if node["class_type"] in class_types]:
            links = [v for v in new.nodes[name]["inputs"].values() if isinstance(v, list)]
            source = links[0] if len(links) == 1 else None
            for node in new.nodes.values():
                for key, value in list(node["inputs"].items()):
                    if isinstance(value, list) and value[0] == name:
                        if source is None:
                            del node["inputs"][key]
                        else:
                            node["inputs"][key] = source
            del new.nodes[name]
        return new

    def with_miniature_prompt(self, sentence: str) -> Workflow:
        """With what a miniature was trained on where the text encoder was."""
        new = self._copy()
        positive = self.linked_from("positive")
        for name in [n for n, node in self.nodes.items() if node["class_type"] == TEXT]:
            inputs = {"prompt": sentence if name == positive else ""}
            new.nodes[name] = {"class_type": "MiniaturePrompt", "inputs": inputs}
        return new.without("CLIPLoader")

    def with_seeded_conditioning(self, tokens: int, seed: int) -> Workflow:
        """With random text features where the text encoder was."""
        new = self._copy()
        texts = [n for n, node in self.nodes.items() if node["class_type"] == TEXT]
        for offset, name in enumerate(texts):
            inputs = {"tokens": tokens, "features": 4096, "seed": seed + offset}
            new.nodes[name] = {"class_type": "SeededConditioning", "inputs": inputs}
        return new.without("CLIPLoader")

    def saving_latent(self, prefix: str) -> Workflow:
        """Ending in SaveLatent, with no VAE and no video."""
        sampler = self.sampler
        new = self.without("SaveVideo", "CreateVideo", "VAEDecode", "VAELoader", "LatentCut")
        inputs = {"samples": [sampler, 0], "filename_prefix": prefix}
        new.nodes["latent"] = {"class_type": "SaveLatent", "inputs": inputs}
        return new

    def reporting(self, patch: str, prefix: str) -> Workflow:
        """With an AttentionReport of a patched model behind the sampler; its picture is saved.

        Args:
            patch: class of the node that patches the model.
        """
        new, sampler = self._copy(), self.sampler
        for node in new.nodes.values():
            for name, value in node["inputs"].items():
                if value == [sampler, 0]:
                    node["inputs"][name] = ["report", 0]
        inputs: dict[str, Any] = {"model": [self.find(patch), 0], "samples": [sampler, 0]}
        new.nodes["report"] = {"class_type": "AttentionReport", "inputs": inputs}
        inputs = {"images": ["report", 1], "filename_prefix": prefix}
        new.nodes["report_picture"] = {"class_type": "SaveImage", "inputs": inputs}
        return new

    def saving_frames(self, prefix: str) -> Workflow:
        """With SaveImage beside SaveVideo: every frame without loss."""
        new = self._copy()
        inputs = {"images": [self.find("VAEDecode"), 0], "filename_prefix": prefix}
        new.nodes["frames"] = {"class_type": "SaveImage", "inputs": inputs}
        return new
