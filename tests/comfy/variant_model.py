"""A model class of ComfyUI with random weights, called as a sampler calls it, and who watches."""

import torch
from sparse_video_attention.patching.record import RunRecord
from sparse_video_attention.patching.router import OVERRIDE_KEY
from sparse_video_attention.patching.run import RUN_KEY, RunState
from sparse_video_attention.patching.schedule import NoiseBounds

from .conftest import attention_in_band


class Model:
    """A variant's model as ComfyUI holds one, and its forward as a sampler calls it."""

    def __init__(self, comfyui, variant):
        import comfy.model_patcher

        base = torch.nn.Module()
        base.diffusion_model = variant.build()
        cpu = torch.device("cpu")
        self.variant = variant
        self.net = base.diffusion_model
        self.patcher = comfy.model_patcher.ModelPatcher(base, cpu, cpu)
        self.patcher.model_options.setdefault("transformer_options", {})
        self.inputs = variant.inputs()
        self.dense = self.run(self.patcher)[0]

    def with_override(self, override):
        clone = self.patcher.clone()
        clone.model_options["transformer_options"][OVERRIDE_KEY] = override
        return clone

    def run(self, patcher, *, options=None, **changed):
        """(output, record) of one forward at the second of two steps."""
        record = RunRecord(method="")
        options = patcher.model_options["transformer_options"] | (options or {})
        options |= {
            "wrappers": patcher.wrappers,
            "sigmas": torch.tensor([0.5]),
            "sample_sigmas": torch.tensor([1.0, 0.5, 0.0]),
            RUN_KEY: RunState(record, NoiseBounds()),
        }
        # Copies: some models write into their inputs.
        arguments = {
            name: value.clone() if torch.is_tensor(value) else value
            for name, value in (self.inputs | changed).items()
        }
        with torch.inference_mode():
            out = self.net(**arguments, transformer_options=options)
        record.finish()
        return out, record


class Spy:
    """An override that keeps the lengths of the calls it sees."""

    def __init__(self):
        self.lengths = []

    def __call__(self, func, q, k, v, heads, mask=None, *args, **kwargs):
        axis = 2 if kwargs.get("skip_reshape") else 1
        self.lengths.append((q.shape[axis], k.shape[axis]))
        return func(q, k, v, heads, mask, *args, **kwargs)


class FirstQueries(Exception):
    """An override that ends a forward at its first attention call."""

    def __call__(self, func, q, *args, **kwargs):
        raise FirstQueries(q)


class MaskedAttention:
    """What band attention with dense layers should do, as dense attention under a mask."""

    def __init__(self, layout, dense_layers):
        self.num_tokens = layout.num_tokens
        self.dense_layers = dense_layers
        self.calls = 0

    def __call__(self, func, q, k, v, heads, mask=None, *args, **kwargs):
        expected = (q.shape[0], self.num_tokens, q.shape[2])
        if kwargs.get("skip_reshape") or not q.shape == k.shape == v.shape == expected:
            return func(q, k, v, heads, mask, *args, **kwargs)
        layer = kwargs["transformer_options"].get("block_index", self.calls)
        self.calls += 1
        if layer in self.dense_layers:
            return func(q, k, v, heads, mask, *args, **kwargs)
        return attention_in_band(q, k, v, heads)
