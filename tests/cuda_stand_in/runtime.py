"""torch.cuda without a GPU: cards, streams, events, memory and generators that answer as one's do.

Only what this pack, its benchmarks and ComfyUI ask for. Work is done when it is asked for, so a
stream has nothing to wait for, and an event is the clock of the host.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cards import Card
from .tensors import CudaTensor, current_device
from .waits import WAITS

Device = torch.device | str | int | None
HIP_VERSION = "6.4"
CLOCK_HZ = 1.7e9


class Generator(torch._C.Generator):
    """A generator of the host that says it is a GPU's, where one is asked for."""

    def __new__(cls, device: Device = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made._device = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self._device


class Stream:
    """A stream whose work is done."""

    cuda_stream = 0

    def __init__(self, device: Device = None, **_: Any) -> None:
        self.device = current_device() if device is None else torch.device(device)

    def synchronize(self) -> None:
        WAITS.add("stream.synchronize")

    def wait_stream(self, stream: Stream) -> None:
        """Does not make the host wait."""

    def wait_event(self, event: Event) -> None:
        """Does not make the host wait."""

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True


class Event:
    """An event that happens as soon as it is recorded."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._timed, self._at = enable_timing, None

    def record(self, stream: Stream | None = None) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        WAITS.add("event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        if not (self._timed and end._timed) or self._at is None or end._at is None:
            raise RuntimeError("Both events must be recorded, with enable_timing, to be timed")
        return 1000 * (end._at - self._at)

    def query(self) -> bool:
        return True


class Block:
    """A context on a device or a stream: a block of code that runs as it would without."""

    def __init__(self, value: Any = None) -> None:
        self._value = value

    def __enter__(self) -> Block:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to undo."""


class Cards:
    """torch.cuda's functions about a machine with these cards; the first is the current one."""

    def __init__(self, cards: Sequence[Card]) -> None:
        self.cards = tuple(cards)
        self.current = 0

    def index(self, device: Device) -> int:
        if device is None:
            return self.current
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return self.current if index is None else index

    def card(self, device: Device = None) -> Card:
        return self.cards[self.index(device)]

    def set_device(self, device: Device) -> None:
        self.current = self.index(device)

    def properties(self, device: Device = None) -> SimpleNamespace:
        card = self.card(device)
        major, minor = card.capability
        return SimpleNamespace(
            name=card.name,
            major=major,
            minor=minor,
            multi_processor_count=card.multiprocessors,
            total_memory=card.memory_bytes,
            gcnArchName=card.architecture,
            warp_size=card.warp_size,
            uuid=card.name,
        )

    def on_device(self) -> type[Block]:
        """torch.cuda.device, a context."""
        cards = self

        class OnDevice(Block):
            def __enter__(self) -> OnDevice:
                value = self._value
                value = value.device if isinstance(value, torch.Tensor) else value
                self._before, cards.current = cards.current, cards.index(value)
                return self

            def __exit__(self, *_: object) -> None:
                cards.current = self._before

        return OnDevice

    def functions(self) -> dict[str, Any]:
        """By their name in torch.cuda."""
        on_device = self.on_device()
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "init": lambda: None,
            "_lazy_init": lambda: None,
            "device_count": lambda: len(self.cards),
            "current_device": lambda: self.current,
            "set_device": self.set_device,
            "device": on_device,
            "device_of": on_device,
            "get_device_properties": self.properties,
            "get_device_capability": lambda device=None: self.card(device).capability,
            "get_device_name": lambda device=None: self.card(device).name,
            "is_bf16_supported": lambda including_emulation=True: True,
            "Stream": Stream,
            "stream": Block,
            "current_stream": Stream,
            "default_stream": Stream,
            "Event": Event,
            "is_current_stream_capturing": lambda: False,
            "synchronize": lambda device=None: WAITS.add("synchronize"),
            "set_sync_debug_mode": lambda mode: setattr(WAITS, "mode", mode),
            "default_generators": tuple(Generator("cuda") for _ in self.cards),
            "_sleep": lambda cycles: time.sleep(cycles / CLOCK_HZ),
            **self._memory(),
        }

    def _memory(self) -> dict[str, Callable[..., Any]]:
        """Memory is the host's, and not counted: all of the card's is free."""

        def free(device: Device = None) -> tuple[int, int]:
            return (self.card(device).memory_bytes,) * 2

        return {
            "mem_get_info": free,
            "memory_stats": lambda device=None: defaultdict(int),
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 0,
            "memory_reserved": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "empty_cache": lambda: None,
            "ipc_collect": lambda: None,
            "get_allocator_backend": lambda: "native",
        }


def attend_on_host(attend: Callable[..., Any]) -> Callable[..., Any]:
    """F.scaled_dot_product_attention, by what the host has instead of the card's own kernels."""

    def run(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(query, CudaTensor):
            return attend(query, *args, **kwargs)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return attend(query, *args, **kwargs)

    return run


def start_runtime(cards: Sequence[Card]) -> Cards:
    """Have torch.cuda answer for these cards, of one maker."""
    # Where there is a GPU it is left alone.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
    machine = Cards(cards)
    for name, value in machine.functions().items():
        setattr(torch.cuda, name, value)
    torch.Generator = Generator
    # A no-op in place of what would look for a driver; as PyTorch's own fake tensors have it.
    torch._C._ensureCUDADeviceGuardSet()
    # So torch.tensor(..., device="cuda") becomes a copy, as it is.
    torch._C._set_only_lift_cpu_tensors(True)
    # module.to("cuda") then makes new parameters: those there are keep their type.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    F.scaled_dot_product_attention = attend_on_host(F.scaled_dot_product_attention)
    torch.backends.cuda.SDPAParams = lambda *call: call
    torch.backends.cuda.can_use_cudnn_attention = lambda *call: True
    if cards[0].is_amd:
        torch.version.hip, torch.version.cuda = HIP_VERSION, None
    return machine
