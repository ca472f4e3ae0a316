"""What is fastest for a kind of call is timed once on a GPU, and every call then runs that way."""

from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, TokenLayout, registry
from sparse_video_attention.kernels.reference import reference_attention
from sparse_video_attention.kernels.registry import Kernel, register
from sparse_video_attention.patching import router as router_module
from sparse_video_attention.patching import speed
from sparse_video_attention.patching.forward_state import ForwardState
from sparse_video_attention.patching.layout import ForwardTokens
from sparse_video_attention.patching.record import RunRecord
from sparse_video_attention.patching.router import FORWARD_KEY, AttentionRouter
from sparse_video_attention.patching.run import RunState
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
        monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(speed, "INT8_MAX_ERROR", INT8 - NATIVE + 0.01)

    def _slowed(self, kernel, name):
        def run(call):
            self._tick(name)
            return kernel.run(call)

        return Kernel(**{**vars(kernel), "run": run})

    def _tick(self, name):
        first = name not in self.ran
        self.ran.append(name)
        took = self.took[name]
        if isinstance(took, Exception):
            raise took
        self.now += took + self.compiling * first

    def has_kernel(self, *precisions, name="fast", rank=9.0):
        """A kernel of some precisions, "auto" being the first; its times and values go by
        precision, or by its name if they have that."""

        def run(call):
            which = name if name in self.took else call.precision
            self._tick(which)
            return torch.full_like(call.q, self.value[which])

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

    def dense(self, q, k, v, heads, **kwargs):
        self._tick("dense")
        return torch.zeros_like(q)


class Runs:
    """Forwards of one call each through one router, as in runs of a patched MODEL."""

    def __init__(self, machine):
        self.machine = machine
        self.router = AttentionRouter(None)
        self.records = [RunRecord("method")]

    def next_run(self):
        self.records.append(RunRecord("method"))

    def call(self, tokens=64, *, policy=None, low_precision=True, **chosen):
        """What ran, by the record; the output says the same."""
        choice = SparseChoice(policy=policy, schedule=Schedule(), min_tokens=0, **chosen)
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
            SETTINGS_KEY: AttentionSettings(sparse=choice),
            "block_index": 0,
        }
        q = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(0))
        how = {"low_precision_attention": low_precision, "transformer_options": options}
        out = self.router(self.machine.dense, q, q, q, 2, **how)
        run.record.add_forward(None, state.calls)
        (record,) = state.calls
        expected = {"fast": NATIVE, "fast int8": INT8, "dense": DENSE}.get(record.ran)
        assert expected is None or bool((out == expected).all())
        assert (record.reason is None) == (record.ran != "dense")
        return record.ran

    def line(self):
        self.records[-1].finish()
        return self.records[-1].summary()


@pytest.fixture
def machine(monkeypatch):
    yield Machine(monkeypatch)
    registry.unavailable_reason.cache_clear()


@pytest.fixture
def runs(machine):
    return Runs(machine)


def policy(**has):
    """A policy that makes a plan for every call."""
    known = {"forecast": lambda layout: "it depends on q and k", "order": lambda layout: None}
    return type("Policy", (), {name: staticmethod(value) for name, value in (known | has).items()})


def test_int8_serves_from_the_first_call_on_where_it_is_faster(runs, machine, caplog):
    machine.has_kernel("native", "int8")
    with caplog.at_level("INFO"):
        assert [runs.call() for _ in range(3)] == ["fast int8"] * 3
    assert "fast 30.0 ms, fast int8 12.0 ms, dense 40.0 ms" in caplog.text
    assert caplog.text.count("timed once") == 1
    timing = len(machine.ran)
    runs.next_run()
    assert runs.call() == "fast int8" and len(machine.ran) == timing + 1
    said = "kernel fast int8 was timed to be faster: 12.0 ms a call, 30.0 ms by fast"
    assert said in runs.line() and said not in caplog.text, "it is nothing to warn of"


@pytest.mark.parametrize(("took", "serves"), [(0.0274, "fast"), (0.0271, "fast int8")])
def test_int8_has_to_be_a_tenth_faster(runs, machine, took, serves):
    machine.has_kernel("native", "int8")
    machine.took["int8"] = took
    assert [runs.call() for _ in range(2)] == [serves] * 2


@pytest.mark.parametrize("value", [INT8 + 0.02, float("nan")])
def test_int8_that_is_off_is_not_taken(runs, machine, caplog, value):
    machine.has_kernel("native", "int8")
    machine.value["int8"] = value
    with caplog.at_level("INFO"):
        assert [runs.call() for _ in range(2)] == ["fast"] * 2
    if value == value:  # a NaN is the kernel's fault, and it is set aside before
        assert "int8 is faster, but not taken: it is off by 0.27" in caplog.text


@pytest.mark.parametrize("how", [{"precision": "native"}, {"low_precision": False}])
def test_where_8_bits_are_ruled_out_int8_does_not_run(runs, machine, how):
    machine.has_kernel("native", "int8")
    assert [runs.call(**how) for _ in range(2)] == ["fast"] * 2
    assert "int8" not in machine.ran and "dense" in machine.ran


def test_calls_that_allow_8_bits_say_nothing_of_those_that_do_not(runs, machine):
    machine.has_kernel("native", "int8")
    machine.took["dense"] = 0.020
    ran = [runs.call(low_precision=allowed) for allowed in (True, False, True, False)]
    assert ran == ["fast int8", "dense"] * 2


def test_int8_asked_for_by_name_is_only_held_against_dense(runs, machine):
    machine.has_kernel("native", "int8")
    machine.took["int8"] = 0.035
    assert [runs.call(precision="int8") for _ in range(2)] == ["fast int8"] * 2
    assert "native" not in machine.ran and machine.ran.count("dense") == 2


def test_a_kernel_without_int8_says_nothing_about_it(runs, machine, caplog):
    machine.has_kernel("native")
    with caplog.at_level("INFO"):
        assert [runs.call() for _ in range(2)] == ["fast"] * 2
    assert "int8" not in caplog.text and "int8" not in runs.line()


@pytest.mark.parametrize(("took", "serves"), [(0.0284, "library"), (0.0288, "fast"), (0.5, "fast")])
def test_another_kernel_of_the_same_precision_has_to_be_clearly_faster(runs, machine, took, serves):
    machine.has_kernel("native")
    machine.has_kernel("native", name="library", rank=7.0)
    machine.took["library"], machine.value["library"] = took, 2.0
    assert [runs.call() for _ in range(2)] == [serves] * 2
    assert runs.call(kernel="fast") == "fast", "a name is a name"


def test_a_library_of_8_bits_is_held_against_the_models_precision(runs, machine):
    machine.has_kernel("native", "int8")
    machine.has_kernel("int8", name="library", rank=20.0)
    machine.took["library"], machine.value["library"] = 0.011, INT8
    assert runs.call() == "library int8"
    machine.took["library"] = 0.0125
    # It goes first by its rank, and is left for who is clearly faster in the same precision.
    assert runs.call(128) == "library int8"
    machine.took["library"] = 0.013
    assert runs.call(192) == "fast int8"


def test_a_kernel_without_a_rank_is_not_tried(runs, machine):
    machine.has_kernel("native")
    machine.has_kernel("native", name="library", rank=0.0)
    machine.took["library"] = 0.001
    assert runs.call() == "fast" and "library" not in machine.ran


def test_a_kernel_that_fails_is_no_rival(runs, machine):
    machine.has_kernel("native")
    machine.has_kernel("native", name="library", rank=7.0)
    machine.took["library"] = RuntimeError("broken wheel")
    assert [runs.call() for _ in range(2)] == ["fast"] * 2
    assert machine.ran.count("library") == 1 and "library" not in runs.line()


def test_the_first_run_may_compile(runs, machine):
    machine.has_kernel("native", "int8")
    machine.compiling = 9.0
    assert runs.call() == "fast int8"


def test_after_one_comparison_calls_are_dense_where_that_is_faster(runs, machine):
    machine.has_kernel("native", "int8")
    machine.took["dense"] = 0.010
    assert [runs.call() for _ in range(3)] == ["dense"] * 3
    runs.next_run()
    assert runs.call() == "dense"
    reason = "1 x dense attention is faster here: 10.0 ms a call, 12.0 ms sparse by fast int8"
    assert reason in runs.line()


def test_plain_pytorch_is_held_against_dense(runs, machine):
    assert [runs.call() for _ in range(2)] == ["torch"] * 2
    assert runs.call(128) == "torch"
    machine.took["dense"] = 0.020
    assert [runs.call(192), runs.call(64)] == ["dense", "torch"], "every shape has its own"
    assert "20.0 ms a call, 30.0 ms sparse in plain PyTorch" in runs.line()


def test_of_kernels_dense_is_a_rival_only_where_all_calls_keep_as_much(runs, machine):
    machine.has_kernel("native")
    machine.took["dense"] = 0.010
    assert runs.call(policy=policy()) == "fast" and "dense" not in machine.ran
    steady = policy(forecast=lambda layout: (None, "topk"))
    assert runs.call(policy=steady) == "dense"


def test_plain_pytorch_gives_way_also_where_calls_differ(runs, machine):
    machine.took["dense"] = 0.010
    assert [runs.call(policy=policy()) for _ in range(2)] == ["dense"] * 2


def test_what_to_install_is_said_in_every_run(runs, machine, monkeypatch):
    hint = "plain PyTorch serves on this GPU, slowly; kernel triton does not: pip install triton"
    kernels_run = runs.router.kernels.run
    monkeypatch.setattr(
        runs.router.kernels, "run", lambda *a, **how: kernels_run(*a, **how)._replace(notes=(hint,))
    )
    machine.took["dense"] = 0.010
    runs.call()
    runs.next_run()
    assert runs.call() == "dense"
    assert hint in runs.line()


def test_dense_attention_that_fails_in_the_comparison_changes_nothing(runs, machine, caplog):
    machine.took["dense"] = torch.OutOfMemoryError("no memory left")
    assert [runs.call() for _ in range(2)] == ["torch", "torch"]
    assert "dense attention was not timed: ran out of memory" in caplog.text


def test_a_sparse_call_that_fails_is_told_as_without_a_comparison(runs, machine):
    machine.took["torch"] = ValueError("no luck")
    assert runs.call() == "dense"
    assert "no luck" in runs.line()


def test_what_was_asked_for_by_name_is_not_questioned(runs, machine):
    machine.has_kernel("native", "int8")
    machine.took["dense"] = 0.001
    assert runs.call(kernel="torch", precision="native") == "torch"
    assert machine.ran == ["torch"]
    assert runs.call(kernel="fast") == "fast int8"
    assert "dense" not in machine.ran


def test_on_cpus_nothing_is_timed(runs, machine, monkeypatch):
    monkeypatch.setattr(router_module, "can_be_timed", speed.can_be_timed)
    assert [runs.call() for _ in range(2)] == ["torch", "torch"]
    assert machine.ran == ["torch"] * 2


def test_while_a_graph_is_captured_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not speed.can_be_timed(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert speed.can_be_timed(torch.device("cuda"))
    assert speed.can_be_timed(torch.device("mps"))


@pytest.mark.gpu
def test_timed_on_a_gpu_every_call_runs_the_same_way():
    """Real kernels: one answer, the first call's too, near the definition."""
    tokens, heads, head_dim = 2500, 4, 128
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads * head_dim, generator=generator).half().cuda()
        for _ in range(3)
    )
    mask = torch.rand(20, 20, generator=generator) < 0.3
    mask.fill_diagonal_(True)
    sizes = {"block_m": 128, "block_n": 128, "q_len": tokens, "k_len": tokens}
    choice = SparseChoice(policy=policy(), schedule=Schedule(), min_tokens=0)
    router, record = AttentionRouter(None), RunRecord("method")
    outs, ran = [], []
    for _ in range(3):
        run, layout = RunState(record, None), TokenLayout(1, 50, 50)
        state = ForwardState(router, choice, 0, run, tokens=ForwardTokens(layout), step=0)
        state.plan = BlockPlan.from_mask(mask.cuda(), **sizes)
        options = {
            FORWARD_KEY: state,
            SETTINGS_KEY: AttentionSettings(sparse=choice),
            "block_index": 0,
        }
        outs.append(router(slow_attention, q, k, v, heads, transformer_options=options))
        ran.append(state.calls[0].ran)
    assert len(set(ran)) == 1 and ran[0] not in ("dense", "torch")
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    by_heads = (x.cpu().view(1, tokens, heads, head_dim).transpose(1, 2) for x in (q, k, v))
    want = (
        reference_attention(*by_heads, BlockPlan.from_mask(mask, **sizes))
        .transpose(1, 2)
        .flatten(2)
    )
    assert (outs[0].cpu() - want).norm() < 0.05 * want.norm()


def slow_attention(q, k, v, heads, **kwargs):
    torch.cuda._sleep(1_000_000_000)
    return torch.zeros_like(q)
