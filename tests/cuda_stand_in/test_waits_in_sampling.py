"""Per attention call nothing is copied and nothing waited for, whatever node chooses its plan.

Once per forward the noise level is read, by which it is known which step it is, and then whether
the forward before gave a NaN, which by that time is known. All else is read at a run's beginning
and at its end, or in the first sparse call of a size: its plan, what runs it fastest, and whether
its output is right.
"""

from collections import Counter

import pytest
import torch
from sparse_video_attention.patching import run_history

from .waits import COPY_FROM_HOST, COPY_TO_HOST, ITEM

pytestmark = [pytest.mark.on_cards("sm_90"), pytest.mark.comfy, pytest.mark.slow]

NODES = ("PatchRadialAttention", "PatchPSA", "PatchSpargeAttention")
NOISE_LEVEL = (ITEM, "patching/forward.py", "_count_step")
EARLIER_OUTPUT = (ITEM, "patching/output_check.py", "read")
PER_FORWARD = Counter({NOISE_LEVEL: 1, EARLIER_OUTPUT: 1})
# Before the first step: its noise levels, most of which ComfyUI has on the host.
PER_RUN = Counter(
    {
        (COPY_TO_HOST, "patching/sampler_steps.py", "_schedule"): 1,
        (ITEM, "patching/run.py", "starts_inside"): 2,
        (ITEM, "patching/run.py", "goes_to_the_end"): 1,
    }
)
# After the last step: whether its output was finite, by what the latent is known again, densities.
AT_THE_END = Counter(
    {
        EARLIER_OUTPUT: 1,
        (ITEM, "patching/output_check.py", "finish"): 1,
        (COPY_FROM_HOST, "patching/history.py", "_mark"): 1,
        (COPY_TO_HOST, "patching/history.py", "_mark"): 1,
        (COPY_TO_HOST, "patching/record.py", "finish"): 1,
    }
)
STEPS = 3


@pytest.fixture(scope="module")
def models():
    """models(family): a MODEL, the same one all through."""
    from .sampling import load

    loaded = {}

    def get(family):
        if family not in loaded:
            with torch.inference_mode():
                loaded[family] = load(family)
        return loaded[family]

    return get


@pytest.mark.parametrize("guided", [False, True], ids=["B1", "B2"])
@pytest.mark.parametrize("family", ["wan", "cogvideox"])
@pytest.mark.parametrize("node", NODES)
def test_a_call_waits_for_nothing(node, family, guided, models, triton_is_fastest):
    from .sampling import patched, sample, undue

    with torch.inference_mode():
        model = patched(models(family), node, min_tokens=0)
        sample(model, 2, guided=guided)
        found = sample(model, STEPS, guided=guided)
    record = run_history(model).latest
    sparse = [call for call in record.calls if call.reason is None]
    # A step of three is dense: the first, or the last; and so is the first layer.
    assert record.forwards == STEPS and len({call.step for call in sparse}) == STEPS - 1
    assert {call.ran for call in sparse} == {"triton"}
    assert found.latent.isfinite().all()
    first, *others = found.steps
    assert undue(first, PER_RUN + PER_FORWARD) == []
    for waits in others:
        assert undue(waits, PER_FORWARD) == []
        # It was looked for where it is.
        assert undue(waits, Counter({EARLIER_OUTPUT: 1})) != []
    # The clock of every call is read, when all have ended.
    clocks = {("event.synchronize", "patching/timing.py", "seconds"): len(record.calls)}
    assert undue(found.end, AT_THE_END + Counter(clocks)) == []


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_a_call_in_halves_of_blocks_waits_for_nothing(family, models, monkeypatch):
    """Which serve where they are faster; here, by a clock that the second set of times goes by."""
    from sparse_video_attention.patching import timed_ways
    from sparse_video_attention.sparge import policy

    from .sampling import patched, sample, undue

    timed, time = Counter(), timed_ways.Stopwatches.time

    def faster_every_time(self, name, precision, run):
        way = time(self, name, precision, run)
        timed[name, precision] += 1
        return way and way._replace(ms=100.0 / timed[name, precision])

    monkeypatch.setattr(timed_ways.Stopwatches, "time", faster_every_time)
    monkeypatch.setattr(timed_ways, "RUNS", 0)
    monkeypatch.setattr(policy, "SMALL_FRAME", 0)
    with torch.inference_mode():
        model = patched(
            models(family), "PatchSpargeAttention", min_tokens=0, topk=0.3, last_dense_timesteps=0
        )
        sample(model, 2, guided=True)
        found = sample(model, STEPS, guided=True)
    record = run_history(model).latest
    assert "blocks 64x32 at topk 0.18, which is as close: triton 50.0 ms" in record.summary()
    assert timed["triton", "native"] == timed["triton", "int8"] == 2 == 2 * timed["dense", "native"]
    sparse = [call for call in record.calls if call.reason is None]
    assert sparse and {call.ran for call in sparse} == {"triton"}
    # Of whole blocks these videos have so few that 0.3 of them is 0.67 of the pairs, or all.
    least, most = {"wan": (0.1927, 0.1928), "cogvideox": (0.65, 0.8)}[family]
    assert all(least < float(call.density) < most for call in sparse)
    assert [undue(waits, PER_FORWARD) for waits in found.steps[1:]] == [[]] * (STEPS - 1)


def test_weighted_means_in_plain_pytorch_wait_for_nothing():
    """The part of a call without Triton that is made anew every time."""
    from sparse_video_attention.kernels.weighted_means import in_whole_blocks, weighted_means

    from .waits import WAITS

    k, v, queries = (torch.randn(1, 2, n, 16, device="cuda") for n in (150, 150, 5))
    whole = [in_whole_blocks(x, 64) for x in (k, v)]
    with WAITS.kept() as waits:
        keys, _ = weighted_means(*whole, queries, 64, 0.25, tokens=150)
    assert waits == [] and keys.shape == (1, 2, 5, 3, 16)


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_a_measured_call_waits_for_nothing(family, models, triton_is_fastest):
    from .sampling import patched, sample, undue

    with torch.inference_mode():
        model = patched(models(family), "PatchSpargeAttention", min_tokens=0)
        model = patched(model, "MeasureAttentionError")
        sample(model, 2, guided=True)
        found = sample(model, STEPS, guided=True)
    record = run_history(model).latest
    sparse = [call for call in record.calls if call.reason is None]
    assert sparse and {call.ran for call in sparse} == {"triton"}
    assert all(call.error < 1 for call in sparse)
    first, *others = found.steps
    assert undue(first, PER_RUN + PER_FORWARD) == []
    assert [undue(waits, PER_FORWARD) for waits in others] == [[]] * len(others)
    # Errors and densities are read together.
    clocks = {("event.synchronize", "patching/timing.py", "seconds"): len(record.calls)}
    assert undue(found.end, AT_THE_END + Counter(clocks)) == []


@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_a_dense_call_waits_for_nothing(family, models, triton_is_fastest):
    """Left to timing, which is done in the first run."""
    from .sampling import patched, sample, undue

    sites = dict.fromkeys(("self_attn_1_type", "cross_attn_1_type"), "fastest")
    with torch.inference_mode():
        model = patched(models(family), "SetAttentionBackend", **sites)
        sample(model, 2, guided=False)
        found = sample(model, STEPS, guided=False)
    assert run_history(model).latest.backend_calls
    for waits in found.steps:
        assert undue(waits, PER_RUN + PER_FORWARD) == []
