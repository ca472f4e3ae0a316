"""A clock that only attention moves, and calls of a router by it."""

from types import SimpleNamespace

import torch
from sparse_video_attention.kernels import BlockPlan, TokenLayout, registry
from sparse_video_attention.kernels.registry import Kernel, register
from sparse_video_attention.patching import router as router_module
from sparse_video_attention.patching import timed_ways
from sparse_video_attention.patching.forward_state import ForwardState
from sparse_video_attention.patching.layout import ForwardTokens
from sparse_video_attention.patching.record import RunRecord
from sparse_video_attention.patching.router import FORWARD_KEY, AttentionRouter
from sparse_video_attention.patching.run import RUN_KEY, RunState
from sparse_video_attention.patching.settings import (
    SETTINGS_KEY,
    AttentionSettings,
    Schedule,
    SparseChoice,
)

NATIVE, INT8, DENSE = 1.0, 1.25, 0.0


class Machine:
    """A clock that only attention moves, and a kernel "fast" before "torch": outputs are
    constants that tell who ran, times are in seconds."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.took = {"torch": 0.030, "native": 0.030, "int8": 0.012, "dense": 0.040}
        self.value = {"native": NATIVE, "int8": INT8}
        self.ran = []
        self.compiling = 0.0
        self.torch_kernel = registry.kernels()["torch"]
        monkeypatch.setattr(
            registry, "_KERNELS", {"torch": self._slowed(self.torch_kernel, "torch")}
        )
        monkeypatch.setattr(router_module, "can_be_timed", lambda device: True)
        monkeypatch.setattr(timed_ways, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(timed_ways, "INT8_MAX_ERROR", INT8 - NATIVE + 0.01)

    def _slowed(self, kernel, name):
        def run(call):
            self._tick(self._by_blocks(name, call))
            return kernel.run(call)

        return Kernel(**{**vars(kernel), "run": run})

    def _by_blocks(self, name, call):
        by_blocks = f"{name} {call.plan.block_m}"
        return by_blocks if by_blocks in self.took else name

    def _tick(self, name):
        first = name not in self.ran
        self.ran.append(name)
        took = self.took[name]
        if isinstance(took, list):
            took = took.pop(0) if len(took) > 1 else took[0]
        if isinstance(took, Exception):
            raise took
        self.now += took + self.compiling * first

    def has_kernel(self, *precisions, name="fast", rank=9.0):
        """A kernel of some precisions, "auto" being the first; its times and values go by
        precision, or by its name if they have that, and by the plan's blocks if they have those."""

        def run(call):
            which = name if name in self.took else call.precision
            self._tick(self._by_blocks(which, call))
            value = self.value[which]
            if isinstance(value, list):
                value = value.pop(0) if len(value) > 1 else value[0]
            return self.made(torch.ones_like(call.q) * value)

        register(
            Kernel(
                name=name,
                unavailable=lambda: None,
                refuses=lambda call: None if call.precision in precisions else "not in that",
                run=run,
                auto_precision=lambda call: precisions[0],
                rank=lambda call: rank,
            )
        )

    def made(self, out):
        return out

    def dense(self, q, k, v, heads, **kwargs):
        self._tick("dense")
        return self.made(torch.zeros_like(q))

    def preferred_attention(self, q, k, v, heads, **kwargs):
        self._tick("preferred")
        return torch.zeros_like(q)


class Runs:
    """Forwards of one call each through one router, as in runs of a patched MODEL."""

    def __init__(self, machine):
        self.machine = machine
        self.router = AttentionRouter(None)
        self.records = [RunRecord("method")]

    def next_run(self):
        self.records.append(RunRecord("method"))

    def call(
        self, tokens=64, *, policy=None, low_precision=True, dense=None, x=None, func=None, **chosen
    ):
        """What ran, by the record; the output says the same.

        policy: of a plan per call; None for a static plan. dense: a backend chosen for it. x: q, k
        and v [B, tokens, 32].
        """
        choice = SparseChoice(policy or FIXED, schedule=Schedule(), min_tokens=0, **chosen)
        run = RunState(self.records[-1], None)
        layout = TokenLayout(1, 8, tokens // 8)
        state = ForwardState(self.router, choice, 0, run, tokens=ForwardTokens(layout), step=0)
        mask = torch.ones(tokens // 64, tokens // 64, dtype=torch.bool)
        plan = BlockPlan.from_mask(mask, block_m=64, block_n=64, q_len=tokens, k_len=tokens)
        if policy is None:
            state.plan = plan
        else:
            policy.plan = lambda *args, **kwargs: plan
        options = {
            FORWARD_KEY: state,
            RUN_KEY: run,
            SETTINGS_KEY: AttentionSettings(sparse=choice, dense=dense),
            "block_index": 0,
        }
        q = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(0))
        q = q if x is None else x
        how = {"low_precision_attention": low_precision, "transformer_options": options}
        out = self.router(func or self.machine.dense, q, q, q, 2, **how)
        run.record.add_forward(None, state.calls, state.step)
        record = state.calls[-1]
        expected = {"fast": NATIVE, "fast int8": INT8, "dense": DENSE}.get(record.ran)
        assert expected is None or bool((out == expected).all())
        return record.ran

    def line(self):
        self.records[-1].finish()
        return self.records[-1].summary()


def a_policy(**has):
    """A policy that makes a plan for every call, each of another density."""
    known = {"density_is_fixed": False, "order": staticmethod(lambda layout: None)}
    return type("Policy", (), known | has)


FIXED = a_policy(density_is_fixed=True)
