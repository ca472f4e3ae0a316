"""What is said of outputs that are not finite, and when calls are looked at."""

from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.kernels.first_output import makes_nan
from sparse_video_attention.patching import output_check
from sparse_video_attention.patching.attention_call import read_call
from sparse_video_attention.patching.call_record import CallRecord
from sparse_video_attention.patching.dense_calls import DENSE_BACKENDS, DenseCalls
from sparse_video_attention.patching.output_check import NanWatch, OutputCheck, handed_on
from sparse_video_attention.patching.record import RunRecord
from sparse_video_attention.patching.router import AttentionRouter
from sparse_video_attention.third_party.backend import has_no_nan

NAN = float("nan")
GOOD, BAD = torch.ones(2, 3), torch.full((2, 3), NAN)
RIGHT = torch.ones(1, 64, 32)
CALL = read_call((RIGHT, RIGHT, RIGHT, 2), {})


class Run:
    """One run of a MODEL, whose outputs and inputs are given."""

    def __init__(self, watch, reached=True):
        self.watch, self.record = watch, RunRecord("a method")
        if reached:
            self.record.count_backend("self_attn_1_type", "sage_attn2")
        self.check = OutputCheck(self.record)
        self.check.watched = watch.suspected > 0

    def forward(self, out, *inputs, looks=0, ran="triton", can_repeat=True, begun=None):
        begun = begun or self.check.begin()
        if self.check.watched:
            for _ in range(looks):
                self.check.look(GOOD, GOOD)
        calls = [CallRecord(0, 0, ran, None, None, None)]
        return self.check.forward_ran(
            begun, out, inputs or (GOOD,), calls, 0, self.watch, can_repeat=can_repeat
        )

    def finish(self, result=GOOD):
        self.check.finish(result, self.watch)
        return " | ".join(self.record.notes)


@pytest.fixture
def watch():
    return NanWatch()


def test_the_first_bad_forward_of_a_kind_is_run_again_and_only_that(watch):
    run = Run(watch)
    assert not run.forward(GOOD)
    assert not run.forward(BAD), "its kind was finite once: it is said afterwards"
    assert output_check.NEXT_TIME in run.finish() and watch.suspected
    for new in ({"ran": "triton int8"}, {"out": BAD[:1]}, {"out": BAD.half()}):
        watch.suspected = False
        assert Run(watch).forward(**{"out": BAD} | new), new
        assert not Run(watch).forward(**{"out": BAD} | new)


def test_what_has_no_output_to_look_at_is_left_alone(watch, monkeypatch):
    for out in (None, [BAD], torch.zeros(3, dtype=torch.int64)):
        assert not Run(watch).forward(out)
    monkeypatch.setattr(output_check, "is_captured", lambda device: True)
    run = Run(watch)
    assert not run.forward(BAD)
    run.check.look(BAD, GOOD)
    assert run.finish(BAD) == "" and watch.settled == set()


@pytest.mark.parametrize("inputs", [(BAD,), (GOOD, "text", None, BAD.half())])
def test_what_came_in_is_neither_run_again_nor_blamed_on_the_model(watch, inputs):
    run = Run(watch)
    assert not run.forward(BAD, *inputs)
    said = run.finish(BAD)
    assert said.endswith(output_check.CAME_IN) and not watch.suspected


def test_what_cannot_be_run_again_is_looked_at_in_the_next_run(watch):
    run = Run(watch)
    assert not run.forward(BAD, can_repeat=False)
    assert output_check.NEXT_TIME in run.finish()
    assert Run(watch).check.of_call is not None


def test_where_no_call_reaches_this_pack_none_is_promised_to_be_looked_at(watch):
    run = Run(watch, reached=False)
    assert "looks at every call" not in run.finish(BAD) and not watch.suspected


@pytest.mark.parametrize("suspected", [False, True])
def test_what_the_sampler_makes_of_finite_outputs_is_not_blamed_on_attention(watch, suspected):
    watch.suspected = suspected
    run = Run(watch)
    assert not run.forward(GOOD, looks=2) and not run.forward(GOOD, looks=2)
    assert run.finish(BAD).endswith(output_check.FROM_THE_SAMPLER)
    assert not watch.suspected and not watch.elsewhere


def cannot_look(x):
    raise torch.OutOfMemoryError("no memory left")


def test_an_output_that_nobody_could_look_at_may_be_the_bad_one(watch, monkeypatch):
    said = output_check.NEXT_TIME
    unseen = Run(watch)
    unseen.forward(GOOD)
    unseen.forward([GOOD])
    assert said in unseen.finish(BAD)
    watch.suspected = False
    failed = Run(watch)
    failed.forward(GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(output_check, "_finite", cannot_look)
        with pytest.raises(torch.OutOfMemoryError):
            failed.forward(BAD)
    assert said in failed.finish(BAD)


def test_a_forward_that_was_run_again_counts_once(watch):
    run = Run(watch)
    assert run.forward(BAD)
    assert not run.forward(GOOD, looks=1)
    assert run.finish(BAD).endswith(output_check.FROM_THE_SAMPLER)


def test_a_model_that_makes_nan_itself_is_looked_at_once(watch):
    first = Run(watch)
    assert first.forward(BAD)
    assert not first.forward(BAD, looks=4)
    assert output_check.FROM_ELSEWHERE in first.finish() and not watch.suspected
    again = Run(watch)
    assert not again.forward(BAD)
    assert output_check.FROM_ELSEWHERE in again.finish() and not watch.suspected
    assert Run(watch).finish() == ""
    later = Run(watch)
    later.forward(BAD)
    assert output_check.NEXT_TIME in later.finish(), "something has changed"


def test_of_two_samplers_the_right_one_says_nothing_of_the_other(watch):
    watch.settled.add((frozenset({"triton"}), BAD.shape, BAD.dtype, BAD.device))
    for queue in range(4):
        assert Run(watch).finish() == ""
        second = Run(watch)
        second.record.starts_inside = True
        second.forward(BAD, looks=4)
        said = output_check.NEXT_TIME if queue == 0 else output_check.FROM_ELSEWHERE
        assert said in second.finish()


def test_what_was_replaced_is_replaced_again_after_a_run_that_was_stopped(watch):
    run = Run(watch)
    assert run.forward(BAD)
    run.check.replaced = run.record.ended_early = True
    assert not run.forward(GOOD, looks=4)
    run.finish(None)
    assert Run(watch).check.watched


def test_a_right_sampler_before_the_bad_one_does_not_use_up_the_look(watch):
    """As of segments of one video: samplers that nothing tells apart."""
    watch.settled.add((frozenset({"triton"}), BAD.shape, BAD.dtype, BAD.device))
    assert Run(watch).finish() == ""
    bad = Run(watch)
    bad.forward(BAD)
    bad.finish()
    assert Run(watch).finish() == ""
    traced = Run(watch)
    assert traced.check.watched
    with pytest.raises(ArithmeticError):
        traced.check.look(BAD, GOOD)
    traced.finish()
    for _ in range(output_check.RUNS - 2):
        assert watch.suspected
        Run(watch).finish()
    assert not watch.suspected


def test_a_run_that_was_stopped_takes_nothing_back(watch):
    watch.suspected = 1
    run = Run(watch)
    watch.elsewhere.add(run.check._kind)
    run.forward(GOOD, looks=1)
    run.record.ended_early = True
    run.finish(None)
    assert watch.suspected == 1 and watch.elsewhere
    Run(watch).finish()
    assert watch.suspected == 0 and not watch.elsewhere


def test_where_a_cache_keeps_the_step_the_next_run_looks(watch):
    run = Run(watch)
    assert run.forward(BAD)
    assert not run.forward(BAD, looks=0)
    assert run.finish().endswith(output_check.FROM_A_CACHE) and watch.suspected


def test_a_forward_that_began_before_another_devices_was_bad_is_run_again_too(watch):
    run = Run(watch)
    begun = run.check.begin()
    assert run.forward(BAD)
    assert run.forward(BAD, begun=begun, ran="triton int8")


@pytest.mark.parametrize(
    ("out", "inputs", "found"),
    [
        (torch.full((4,), 3e38), [GOOD], False),  # their sum is infinite in fp32
        (torch.tensor([1.0, float("inf")]), [GOOD], True),
        (torch.tensor([float("inf"), float("-inf")]), [GOOD, GOOD], True),
        (BAD, [GOOD, torch.tensor([float("inf")])], False),
        (BAD, [GOOD, GOOD, BAD], False),
        (GOOD, [BAD], False),
    ],
)
def test_nan_is_made_where_finite_inputs_give_none(out, inputs, found):
    assert makes_nan(out, *inputs) == found


@pytest.fixture
def instead(monkeypatch):
    """instead(value): what torch_sdpa computes."""

    def add(value):
        backend = SimpleNamespace(
            unavailable=lambda: None,
            refuses=lambda *call: None,
            run=lambda q, k, v, *, scale, mask: torch.full_like(q, value),
            is_sound=has_no_nan,
        )
        monkeypatch.setitem(DENSE_BACKENDS, output_check.INSTEAD, backend)

    return add


def watched(watch):
    watch.suspected = True
    return Run(watch)


def hand_on(run, out, call=CALL):
    return handed_on(out, call, "somebody", DenseCalls(), run.check, replace=True)


@pytest.mark.parametrize("finite", [True, False])
def test_pytorch_computes_what_others_make_nan_of_if_it_does_better(watch, instead, finite):
    instead(0.5 if finite else NAN)
    run = watched(watch)
    out, ran = hand_on(run, RIGHT * NAN)
    assert ran == (output_check.INSTEAD if finite else "dense")
    assert bool(out.isfinite().all()) == finite
    (said,) = run.record.notes
    assert said.startswith("somebody: it makes NaN") and ("computes those" in said) == finite
    run.forward(GOOD)
    run.finish()
    assert bool(watch.suspected) == finite, "the next run has to look again"


def test_a_row_that_is_masked_out_whole_blames_nobody(watch, instead, monkeypatch):
    instead(NAN)
    monkeypatch.setattr("sparse_video_attention.patching.dense_calls.has_no_nan", lambda *_: True)
    run = watched(watch)
    masked = CALL._replace(mask=torch.full((64, 64), float("-inf")))
    assert hand_on(run, RIGHT * NAN, masked)[1] == "dense"
    out = DenseCalls().run(output_check.INSTEAD, masked, run.check.of_call)
    assert out.isnan().all() and run.record.notes == []


def test_what_fails_while_looking_leaves_the_output_as_it_is(watch, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(output_check, "makes_nan", fail)
    out, ran = hand_on(watched(watch), RIGHT)
    assert out is RIGHT and ran == "dense"


def test_routers_of_one_model_know_the_same():
    router = AttentionRouter(None)
    assert router.on_top_of(None).nan_watch is router.nan_watch
    assert AttentionRouter(None).nan_watch is not router.nan_watch
