"""What a library can be called with, as data: checked before a call, and described to people."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Capability = tuple[int, int]

# Softmax weight that zero keys may take at most: below what 8-bit logits cost.
MAX_ZERO_KEY_SHARE = 1e-3


def device_type(device: torch.device) -> str:
    """As torch names it, with "rocm" apart from "cuda": torch calls both "cuda"."""
    return "rocm" if device.type == "cuda" and torch.version.hip else device.type


@dataclass(frozen=True)
class Constraints:
    """Limits of one attention library. None means no limit.

    Attributes:
        device_types: "cuda", "rocm", "cpu", ...
        min_capability, max_capability: CUDA compute capability, both included.
        capabilities: the only ones, where support has holes.
        dtypes: of q, k and v, which always agree.
        head_dims: the only ones; or head_dim_multiple up to max_head_dim.
        min_tokens, max_tokens: of queries and of keys.
        unmasked_key_block: it fills keys up to a multiple of this with zeros and lets them take
            part in the softmax; calls where that could matter are refused.
        supports_mask: takes an attention mask.
        supports_scale: takes any scale of the logits, not only 1 / sqrt(head_dim).
        supports_grouped_heads: q may have a multiple of the heads of k and v.
        supports_value_dim: v may have another head dim than q and k.
        supports_grad: can be differentiated.
        is_low_precision: computes in 8 bits or less.
        is_4_bit: in 4 bits.
        in_place_inputs: names of inputs it overwrites; they are copied before the call.
    """

    device_types: tuple[str, ...] | None = ("cuda",)
    min_capability: Capability | None = None
    max_capability: Capability | None = None
    capabilities: tuple[Capability, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = (torch.float16, torch.bfloat16)
    head_dims: tuple[int, ...] | None = None
    head_dim_multiple: int = 1
    max_head_dim: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    unmasked_key_block: int | None = None
    supports_mask: bool = False
    supports_scale: bool = True
    supports_grouped_heads: bool = False
    supports_value_dim: bool = False
    supports_grad: bool = False
    is_low_precision: bool = False
    is_4_bit: bool = False
    in_place_inputs: tuple[str, ...] = ()

    def check(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
        low_precision_allowed: bool = True,
    ) -> str | None:
        """Why the library cannot serve a call with q, k, v [B, H, N, D], or None."""
        head_dim = q.shape[-1]
        if mask is not None and not self.supports_mask:
            return "it takes no attention mask"
        if self.is_low_precision and not low_precision_allowed:
            return "the call does not allow low precision"
        if not q.dtype == k.dtype == v.dtype:
            return f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}"
        if self.dtypes is not None and q.dtype not in self.dtypes:
            return f"it takes {_dtype_names(self.dtypes)}, not {_dtype_names((q.dtype,))}"
        if not (k.shape[-1] == head_dim and (v.shape[-1] == head_dim or self.supports_value_dim)):
            return f"q, k and v have head dims {head_dim}, {k.shape[-1]} and {v.shape[-1]}"
        if not self._takes_head_dim(head_dim):
            return f"it takes {self._describe_head_dims()}, not {head_dim}"
        if not self.supports_grouped_heads and not q.shape[1] == k.shape[1] == v.shape[1]:
            return f"q has {q.shape[1]} heads and k {k.shape[1]}"
        for what, tokens in (("queries", q.shape[2]), ("keys", k.shape[2])):
            if self.min_tokens is not None and tokens < self.min_tokens:
                return f"it needs at least {self.min_tokens} {what}, not {tokens}"
            if self.max_tokens is not None and tokens > self.max_tokens:
                return f"it takes at most {self.max_tokens} {what}, not {tokens}"
        if self.unmasked_key_block is not None:
            zero_keys = -k.shape[2] % self.unmasked_key_block
            if zero_keys > MAX_ZERO_KEY_SHARE * k.shape[2]:
                real = k.shape[2]
                return f"it would attend to {zero_keys} padding keys besides the {real} real ones"
        if not self.supports_scale and scale is not None:
            if abs(scale * head_dim**0.5 - 1.0) > 1e-4:
                return f"it scales logits by 1 / sqrt(head_dim) only, not {scale:g}"
        if not self.supports_grad and torch.is_grad_enabled():
            if q.requires_grad or k.requires_grad or v.requires_grad:
                return "it has no gradients"
        return self._check_device(q.device)

    def machine_reason(self) -> str | None:
        """Why no device of this machine will do, or None."""
        if self.device_types is None or "cpu" in self.device_types:
            return None
        if not torch.cuda.is_available():
            return f"it needs {self._describe_devices()}, which this machine does not have"
        reasons = [
            self._check_device(torch.device("cuda", index))
            for index in range(torch.cuda.device_count())
        ]
        return None if None in reasons else reasons[0]

    def describe(self) -> str:
        """The limits in one line."""
        parts = [self._describe_devices()]
        if self.dtypes is not None:
            parts.append(_dtype_names(self.dtypes))
        if self.head_dims or self.max_head_dim or self.head_dim_multiple > 1:
            parts.append(self._describe_head_dims())
        if self.min_tokens is not None:
            parts.append(f"at least {self.min_tokens} tokens")
        if self.max_tokens is not None:
            parts.append(f"at most {self.max_tokens} tokens")
        if self.unmasked_key_block is not None:
            parts.append(f"a multiple of {self.unmasked_key_block} keys, or very many")
        parts.append("masks" if self.supports_mask else "no mask")
        if not self.supports_scale:
            parts.append("scale 1 / sqrt(head_dim)")
        if self.is_low_precision:
            parts.append("low precision")
        if self.in_place_inputs:
            parts.append(f"copies {', '.join(self.in_place_inputs)}, which it overwrites")
        return "; ".join(parts)

    def _check_device(self, device: torch.device) -> str | None:
        found = device_type(device)
        if self.device_types is not None and found not in self.device_types:
            return f"it runs on {' or '.join(self.device_types)}, not on {found}"
        if found != "cuda" or not (self.min_capability or self.max_capability or self.capabilities):
            return None
        capability = torch.cuda.get_device_capability(device)
        too_low = self.min_capability is not None and capability < self.min_capability
        too_high = self.max_capability is not None and capability > self.max_capability
        missing = self.capabilities is not None and capability not in self.capabilities
        if too_low or too_high or missing:
            return f"it needs {self._describe_devices()}; this GPU has {_capability(capability)}"
        return None

    def _takes_head_dim(self, head_dim: int) -> bool:
        if self.head_dims is not None:
            return head_dim in self.head_dims
        fits = self.max_head_dim is None or head_dim <= self.max_head_dim
        return fits and head_dim % self.head_dim_multiple == 0

    def _describe_head_dims(self) -> str:
        if self.head_dims is not None:
            return f"head dim {' or '.join(str(dim) for dim in self.head_dims)}"
        step = f" in steps of {self.head_dim_multiple}" if self.head_dim_multiple > 1 else ""
        return f"head dims up to {self.max_head_dim}{step}"

    def _describe_devices(self) -> str:
        if self.device_types is None:
            return "any device"
        nvidia = "an NVIDIA GPU"
        if self.capabilities is not None:
            listed = ", ".join(map(_capability, self.capabilities))
            nvidia += f" of compute capability {listed}"
        elif self.min_capability and self.max_capability:
            span = f"{_capability(self.min_capability)} to {_capability(self.max_capability)}"
            nvidia += f" of compute capability {span}"
        elif self.min_capability:
            nvidia += f" of compute capability {_capability(self.min_capability)} or newer"
        names = {"cuda": nvidia, "rocm": "an AMD GPU", "cpu": "a CPU"}
        return " or ".join(names.get(name, name) for name in self.device_types)


def _capability(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


def _dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
