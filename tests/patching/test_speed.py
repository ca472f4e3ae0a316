"""What is fastest for a kind of call is timed once on a GPU, and every call then runs that way."""

import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, TokenLayout, registry
from sparse_video_attention.kernels.fallback import KernelFallback, KernelRun
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
    AttentionSite,
    DenseChoice,
    Schedule,
    SparseChoice,
)
from sparse_video_attention.psa import PsaPolicy, load_presets
from sparse_video_attention.radial_attn import RadialPolicy
from sparse_video_attention.sparge import SpargePolicy

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
        if isinstance(took, list):
            took = took.pop(0) if len(took) > 1 else took[0]
        if isinstance(took, Exception):
            raise took
        self.now += took + self.compiling * first

    def has_kernel(self, *precisions, name="fast", rank=9.0):
        """A kernel of some precisions, "auto" being the first; its times and values go by
        precision, or by its name if they have that."""

        def run(call):
            which = name if name in self.took else call.precision
            self._tick(which)
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
            SETTINGS_KEY: AttentionSettings(sparse=choice, dense=dense),
            "block_index": 0,
        }
        q = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(0))
        q = q if x is None else x
        how = {"low_precision_attention": low_precision, "transformer_options": options}
        out = self.router(func or self.machine.dense, q, q, q, 2, **how)
        run.record.add_forward(None, state.calls)
        record = state.calls[-1]
        expected = {"fast": NATIVE, "fast int8": INT8, "dense": DENSE}.get(record.ran)
        assert expected is None or bool((out == expected).all())
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


def a_policy(**has):
    """A policy that makes a plan for every call, each of another density."""
    known = {"density_is_fixed": False, "order": staticmethod(lambda layout: None)}
    return type("Policy", (), known | has)


FIXED = a_policy(density_is_fixed=True)


def test_int8_serves_from_the_first_call_on_where_it_is_faster(runs, machine, caplog):
    machine.has_kernel("native", "int8")
    with caplog.at_level("INFO", logger="sparse_video_attention"):
        assert [runs.call() for _ in range(3)] == ["fast int8"] * 3
    assert "fast 30.0 ms, fast int8 12.0 ms, dense 40.0 ms" in caplog.text
    assert caplog.text.count("timed once") == 1 and "WARNING" not in caplog.text
    timing = len(machine.ran)
    runs.next_run()
    assert runs.call() == "fast int8" and len(machine.ran) == timing + 1
    assert "calls of 64 tokens were timed once: fast 30.0 ms, fast int8 12.0 ms" in runs.line()


@pytest.mark.parametrize(("took", "serves"), [(0.0274, "fast"), (0.0271, "fast int8")])
def test_int8_has_to_be_a_tenth_faster(runs, machine, took, serves):
    machine.has_kernel("native", "int8")
    machine.took["int8"] = took
    assert [runs.call() for _ in range(2)] == [serves] * 2


@pytest.mark.parametrize("value", [INT8 + 0.02, float("nan")])
def test_int8_that_is_off_is_not_taken(runs, machine, caplog, value):
    machine.has_kernel("native", "int8")
    machine.value["int8"] = value
    with caplog.at_level("INFO", logger="sparse_video_attention"):
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
    assert "native" not in machine.ran and machine.ran.count("dense") == 3


def test_a_kernel_without_int8_says_nothing_about_it(runs, machine, caplog):
    machine.has_kernel("native")
    with caplog.at_level("INFO", logger="sparse_video_attention"):
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


@pytest.mark.parametrize("near", ["library", "int8"])
def test_every_8_bit_kernel_is_held_against_the_models_precision(runs, machine, near):
    """Also the second one, which has only an 8-bit one to beat."""
    machine.has_kernel("native", "int8")
    machine.has_kernel("int8", name="library", rank=7.0)
    machine.took |= {"library": 0.010, "int8": 0.013}
    machine.value["library"] = 2.0
    machine.value[near] = INT8
    far = {"library": "int8", "int8": "library"}[near]
    machine.value[far] = 2.0
    machine.took[far], machine.took[near] = 0.010, 0.013
    assert runs.call() == {"library": "library int8", "int8": "fast int8"}[near]


def test_a_single_token_that_is_near_is_not_enough(runs, machine):
    machine.has_kernel("native", "int8")
    ramp = torch.ones(64, 1)
    ramp[1:] = 2.0
    machine.value["int8"] = ramp
    assert runs.call() == "fast"


NO_MEMORY = torch.OutOfMemoryError("no memory left")


def test_a_way_that_could_not_be_timed_is_not_judged(runs, machine):
    """Out of memory when its turn came: the others say nothing about it."""
    machine.has_kernel("native", "int8")
    machine.took |= {"native": [0.030, NO_MEMORY, 0.030], "int8": 0.050, "dense": 0.045}
    assert [runs.call() for _ in range(2)] == ["fast"] * 2


@pytest.mark.parametrize("what", ["native", "int8", "dense"])
def test_what_a_want_of_memory_leaves_out_is_tried_again(runs, machine, what):
    """In the first run, say, or beside another program."""
    machine.has_kernel("native", "int8")
    took = machine.took[what] = 0.001
    machine.took[what] = [NO_MEMORY] * (2 if what == "native" else 1) + [took]
    runs.call()
    assert runs.call() == {"native": "fast", "int8": "fast int8", "dense": "dense"}[what]
    runs.next_run()
    runs.call()
    assert "memory" not in runs.line()


def test_what_never_has_memory_is_left_out_in_the_end(runs, machine):
    machine.has_kernel("native", "int8")
    machine.took["dense"] = NO_MEMORY
    assert [runs.call() for _ in range(9)] == ["fast"] * 3 + ["fast int8"] * 6
    assert machine.ran.count("dense") == 4


@pytest.mark.parametrize("error", [NO_MEMORY, RuntimeError("broken")])
def test_8_bits_are_not_taken_where_there_is_nothing_to_hold_them_against(runs, machine, error):
    machine.has_kernel("native", name="exact", rank=8.0)
    machine.has_kernel("int8", "native")
    machine.took |= {"exact": error, "native": error, "int8": 0.030, "dense": 0.040}
    machine.has_kernel("int8", name="library", rank=5.0)
    machine.took["library"], machine.value["library"] = 0.001, INT8
    assert "library int8" not in [runs.call() for _ in range(6)]


def test_a_precision_that_fails_is_not_timed_as_another(runs, machine, caplog):
    machine.has_kernel("native", "int8")
    machine.took["int8"] = RuntimeError("broken")
    with caplog.at_level("INFO", logger="sparse_video_attention"):
        assert [runs.call() for _ in range(2)] == ["fast"] * 2
    assert "timed once: fast 30.0 ms, dense 40.0 ms" in caplog.text


def test_what_ran_out_of_memory_is_no_hint_in_later_runs(runs, machine):
    machine.has_kernel("native")
    machine.took |= {"native": [NO_MEMORY, 0.030], "dense": 0.010}
    assert runs.call() == "dense"
    runs.next_run()
    assert runs.call() == "dense" and "memory" not in runs.line()


def test_8_bits_that_make_a_nan_are_not_near(runs, machine):
    """Not in the first output, which KernelFallback looks at."""
    machine.has_kernel("native", "int8")
    machine.value["int8"] = [INT8, float("nan")]
    assert [runs.call() for _ in range(2)] == ["fast"] * 2


def test_a_first_run_that_fails_is_not_the_last_word(runs, machine):
    """Sparse calls that fail twice in a row are not tried again; this one comes back."""
    machine.has_kernel("native", "int8")
    machine.took |= {"native": [ValueError("no luck"), 0.030]}
    machine.took["torch"] = [ValueError("no luck"), 0.030]
    runs.call()
    runs.router.kernels = KernelFallback()
    assert runs.call() == "fast int8"


def test_an_override_that_calls_attention_anew_is_answered(runs, machine):
    """It splits the batch, say; timed as dense attention it comes back into the comparison."""

    def halves(func, q, k, v, heads, **kwargs):
        if len(q) == 1:
            return func(q, k, v, heads, **kwargs)
        again = kwargs["transformer_options"]
        parts = [runs.router(func, x, x, x, heads, transformer_options=again) for x in q.split(1)]
        return torch.cat(parts)

    runs.router.previous = halves
    x = torch.randn(2, 64, 32)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(runs.call(x=x)), daemon=True)
    asking.start()
    asking.join(timeout=20)
    assert answers == ["torch"]


def test_fp8_is_nothing_that_auto_takes(runs, machine):
    machine.has_kernel("native", "int8", "fp8")
    machine.took["fp8"], machine.value["fp8"] = 0.001, NATIVE
    assert runs.call() == "fast int8" and "fp8" not in machine.ran


def test_a_kernel_by_name_has_no_other_kernel_for_a_rival(runs, machine):
    machine.has_kernel("native", "int8")
    machine.has_kernel("native", name="library", rank=7.0)
    machine.took["library"] = 0.001
    assert runs.call(kernel="fast") == "fast int8" and "library" not in machine.ran


def test_no_output_is_held_while_the_next_one_is_made(runs, machine):
    """Each is as large as q: 738 MiB for 14B at 720p."""
    machine.has_kernel("native", "int8")
    alive, most = weakref.WeakSet(), []

    def made(x):
        most.append(len(alive))
        alive.add(x)
        return x

    machine.made = made
    assert runs.call() == "fast int8"
    assert len(most) > 9 and max(most) == 0


def test_another_kernel_in_its_place_is_not_what_was_timed(runs, machine, caplog):
    machine.has_kernel("native")
    machine.has_kernel("native", name="library", rank=7.0)
    machine.took |= {"library": RuntimeError("broken wheel"), "native": [0.030] * 4 + [0.001] * 9}
    with caplog.at_level("INFO", logger="sparse_video_attention"):
        assert runs.call() == "fast"
    assert "kernel library native was not timed: kernel library is set aside" in caplog.text
    assert "library" not in runs.line()


def test_nothing_of_the_comparison_ends_a_run(runs, machine, monkeypatch):
    machine.has_kernel("native", "int8")

    def broken(*args):
        raise RuntimeError("no luck")

    monkeypatch.setattr(speed, "_fastest", broken)
    assert [runs.call() for _ in range(2)] == ["fast"] * 2
    assert len(machine.ran) < 15, "it is not tried again"


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


def test_the_better_of_two_runs_counts(runs, machine):
    machine.has_kernel("native", "int8")
    machine.took["int8"] = [0.012, 0.012, 0.012, 0.090]
    assert runs.call() == "fast int8"
    machine.took["int8"] = [0.012, 0.012, 0.090, 0.012]
    assert runs.call(128) == "fast int8"


def test_dense_has_to_be_clearly_faster(runs, machine):
    machine.has_kernel("native")
    machine.took["dense"] = 0.0288
    assert runs.call() == "fast"
    machine.took["dense"] = 0.0284
    assert runs.call(128) == "dense"


def test_what_else_times_depend_on(runs, machine, monkeypatch):
    machine.has_kernel("native", "int8")
    assert runs.call() == "fast int8"
    machine.took["dense"] = 0.001
    x = torch.randn(1, 64, 32)
    assert runs.call(x=x) == "fast int8", "the same kind as before"
    assert runs.call(x=x.expand(2, -1, -1)) == "dense", "another batch"
    assert runs.call(x=x.double()) == "dense", "another dtype"
    assert runs.call(x=torch.randn(1, 64, 64)) == "dense", "other channels"
    assert runs.call(policy=a_policy(density_is_fixed=True)) == "dense", "another method"
    monkeypatch.setattr(router_module, "machine_of", lambda device: "another card")
    assert runs.call(x=x) == "dense"


def test_two_cards_of_one_kind_get_one_answer(monkeypatch):
    names = {0: "card", 1: "card", 2: "another card"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    speed.machine_of.cache_clear()
    kinds = [speed.machine_of(torch.device("cuda", index)) for index in names]
    assert kinds == ["card", "card", "another card"]
    speed.machine_of.cache_clear()
    assert speed.machine_of(torch.device("mps")) == "mps"


def test_two_threads_time_once():
    """Conditionings that MultiGPU CFG Split gives to two cards of one kind."""
    check, started, answers = speed.SpeedCheck(), threading.Barrier(2), []
    ran = []

    def sparse(way):
        ran.append(threading.get_ident())
        time.sleep(0.01)
        return KernelRun(torch.ones(1, 4, 8), "fast", "native", (), (("fast", "native"),))

    def ask():
        started.wait()
        dense = speed.Asked(sparse, lambda: torch.ones(1, 4, 8), 4, True, True)
        answers.append(check.compare("kind", dense))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers[0] == answers[1] and answers[0].dense_reason and len(set(ran)) == 1


def test_a_router_on_top_of_another_override_asks_anew(runs, machine):
    """How long dense attention takes depends on the other."""
    machine.has_kernel("native", "int8")
    machine.took["dense"] = 0.001
    assert runs.call() == "dense"
    below = runs.router

    def slow_override(func, *args, **kwargs):
        return func(*args, **kwargs)

    runs.router = below.on_top_of(slow_override)
    assert runs.call() == "fast int8"
    ran = len(machine.ran)
    runs.router = below.on_top_of(slow_override)
    assert runs.call() == "fast int8" and len(machine.ran) == ran + 1
    runs.router = below
    assert runs.call() == "dense"


def test_dense_is_timed_as_it_would_run(runs, machine, monkeypatch):
    """By the backend chosen for self-attention, else by this pack's default on the GPU."""
    machine.has_kernel("native")

    def ran_by(name):
        def run(self, asked, call):
            machine._tick(asked)
            return torch.zeros_like(call.q)

        machine.took[name] = 0.001
        monkeypatch.setattr(router_module.DenseCalls, "run", run)

    ran_by("torch_sdpa")
    chosen = DenseChoice(((AttentionSite.SELF, "torch_sdpa"),))
    assert runs.call(dense=chosen) == "torch_sdpa"
    assert "dense" not in machine.ran
    monkeypatch.setattr(router_module, "faster_default", lambda func, call: "sage_attn2")
    ran_by("sage_attn2")
    assert runs.call(128) == "sage_attn2" and "dense" not in machine.ran
    monkeypatch.setattr(
        AttentionRouter, "_preferred", lambda self, call, site: machine.preferred_attention
    )
    machine.took["preferred"] = 0.001
    before = len(machine.ran)
    assert runs.call(192) == "dense"
    asked = set(machine.ran[before:])
    assert "preferred" in asked and not asked & {"dense", "sage_attn2"}
    # Beneath another pack's override this pack has no default of its own.
    monkeypatch.setattr(AttentionRouter, "_preferred", lambda self, call, site: None)
    runs.router.previous = lambda func, *args, **kwargs: func(*args, **kwargs)
    machine.took["dense"] = 0.001
    registry.kernels().pop("fast")
    before = len(machine.ran)
    assert runs.call(256) == "dense"
    assert set(machine.ran[before:]) == {"torch", "dense"}


def test_not_more_than_so_many_kinds_are_remembered(runs, machine, monkeypatch):
    monkeypatch.setattr(speed, "MAX_SHAPES", 3)
    machine.has_kernel("native")
    for tokens in range(64, 64 * 6, 64):
        runs.call(tokens)
    assert len(runs.router.speed._found) <= 3


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
    assert runs.call(policy=a_policy()) == "fast" and "dense" not in machine.ran
    assert runs.call() == "dense"


@pytest.mark.parametrize(
    ("policy", "fixed"),
    [
        (RadialPolicy(), True),
        (SpargePolicy(topk=0.5, simthreshd1=-0.1), True),
        # Blocks that are unlike themselves are kept as well.
        (SpargePolicy(topk=0.5, simthreshd1=0.1), False),
        (SpargePolicy(cdfthreshd=0.9, simthreshd1=-0.1), False),
        (PsaPolicy.from_preset(load_presets()["Wan2.1_1.3b"]["psa_topk"]), True),
        (PsaPolicy.from_preset(load_presets()["Wan2.1_14b"]["psa_balanced"]), False),
    ],
    ids=["radial", "topk", "topk-unlike", "cdf", "psa-topk", "psa-thresholds"],
)
def test_which_methods_keep_as_much_in_every_call(policy, fixed):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 2, 1024, 64, generator=generator)
    smooth = 1 + 0.3 * noise + 5 * torch.linspace(-1, 1, 1024)[:, None]
    how = {"layout": TokenLayout(4, 16, 16), "layer": 0, "scale": 0.125}
    densities = {round(policy.plan(x, x, **how).density(), 4) for x in (noise, smooth)}
    assert policy.density_is_fixed == fixed == (len(densities) == 1)


def test_a_policy_that_does_not_say_is_not_held_against_dense(runs, machine):
    machine.has_kernel("native")
    machine.took["dense"] = 0.010
    theirs = type("Theirs", (), {"order": staticmethod(lambda layout: None)})
    assert runs.call(policy=theirs) == "fast" and "dense" not in machine.ran


def test_frames_of_one_call_each_are_not_held_against_dense(runs, machine, monkeypatch):
    """They keep more or less, and what their kind is does not say which."""
    machine.has_kernel("native")
    machine.took["dense"] = 0.010
    monkeypatch.setattr(ForwardTokens, "is_one_frame", lambda self, q_len, k_len: True)
    monkeypatch.setattr(ForwardState, "plan_of", lambda self, call, layer: self.plan)
    monkeypatch.setattr(ForwardState, "kept_for", lambda self, call: None)
    assert runs.call() == "fast" and "dense" not in machine.ran


def test_another_packs_override_is_called_as_often_as_without(runs, machine):
    machine.has_kernel("native")
    calls = []

    def override(func, q, *args, **kwargs):
        calls.append(1)
        return torch.zeros_like(q)

    runs.router.previous = override
    assert [runs.call() for _ in range(2)] == ["fast"] * 2 and not calls


def test_plain_pytorch_gives_way_also_where_calls_differ(runs, machine):
    machine.took["dense"] = 0.010
    assert [runs.call(policy=a_policy()) for _ in range(2)] == ["dense"] * 2


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
    choice = SparseChoice(FIXED, schedule=Schedule(), min_tokens=0)
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
