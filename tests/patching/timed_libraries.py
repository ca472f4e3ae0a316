"""Libraries of dense attention by a clock that only attention moves, and calls of a router."""

from types import SimpleNamespace

import torch
from sparse_video_attention.patching import dense_calls, exact_calls, fastest_dense, timed_ways
from sparse_video_attention.patching import router as router_module
from sparse_video_attention.patching.record import RunRecord
from sparse_video_attention.patching.router import AttentionRouter
from sparse_video_attention.patching.run import RUN_KEY, RunState
from sparse_video_attention.patching.settings import (
    SETTINGS_KEY,
    AttentionSettings,
    AttentionSite,
    DenseChoice,
)
from sparse_video_attention.third_party.backend import has_no_nan

EXACT = 1.0
FASTEST = DenseChoice(tuple((site, "fastest") for site in AttentionSite))


class Libraries:
    """A clock that only attention moves, ComfyUI's attention, and libraries with outputs that
    tell who ran. Times are in seconds."""

    def __init__(self, monkeypatch):
        self.now, self.ran, self.took, self.known = 0.0, [], {"comfyui": 0.040}, {}
        monkeypatch.setattr(router_module, "can_be_timed", lambda device: True)
        monkeypatch.setattr(timed_ways, "time", SimpleNamespace(perf_counter=lambda: self.now))
        for module in (dense_calls, fastest_dense, exact_calls):
            monkeypatch.setattr(module, "DENSE_BACKENDS", self.known)
        self.has("torch_sdpa", 0.038)

    def has(self, name, took, *, out=EXACT, low=False, unavailable=None, refuses=None):
        self.took[name] = took

        def run(q, k, v, *, scale, mask):
            self._tick(name)
            return torch.full_like(q, out)

        self.known[name] = SimpleNamespace(
            unavailable=lambda: unavailable,
            refuses=lambda *call: refuses,
            run=run,
            is_sound=has_no_nan,
            constraints=SimpleNamespace(is_low_precision=low, is_4_bit=False),
        )

    def _tick(self, name):
        self.ran.append(name)
        took = self.took[name]
        took = took.pop(0) if isinstance(took, list) and len(took) > 1 else took
        took = took[0] if isinstance(took, list) else took
        if isinstance(took, Exception):
            raise took
        self.now += took

    def comfyui(self, q, k, v, heads, **kwargs):
        self._tick("comfyui")
        return torch.full_like(q, EXACT)


def asking(libraries):
    """Who ran a call of a router with everything at "fastest", by the record and the clock."""
    router = AttentionRouter(None)
    record = RunRecord("")

    state = RunState(record, None)

    def run(
        tokens=64,
        keys=None,
        *,
        router=router,
        dtype=torch.float32,
        dense=FASTEST,
        state=state,
        **how,
    ):
        options = {
            RUN_KEY: state,
            SETTINGS_KEY: AttentionSettings(dense=dense),
            router_module.OVERRIDE_KEY: router,
        }
        q = torch.zeros(1, tokens, 64, dtype=dtype)
        k = q if keys is None else torch.zeros(1, keys, 64, dtype=dtype)
        router(libraries.comfyui, q, k, k, 2, transformer_options=options, **how)
        return libraries.ran[-1]

    run.router, run.record = router, record
    run.another = lambda: RunState(record, None)
    return run
