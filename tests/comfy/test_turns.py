"""Methods that choose their blocks take turns with the mirrored token order, step by step."""

from dataclasses import dataclass

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.kernels.orders import mirrored_in_turn, video_order
from sparse_video_attention.patching import AttentionSettings, Schedule, SparseChoice, install
from sparse_video_attention.patching.plans import TokenOrder

from .conftest import BandPolicy, relative_error, sparse_calls
from .model_variants import VARIANTS
from .variant_model import Model

pytestmark = pytest.mark.comfy

STEPS = 4
VIDEO = 5 * 8 * 10  # tokens; the mirrored order begins with the last one


@dataclass(frozen=True)
class Chosen(BandPolicy):
    """Every block, or a band of them, in Gilbert's order; made anew for every call."""

    alternate: bool = True
    is_static = False

    def order(self, layout):
        return video_order(layout, "Gilbert")

    def orders(self, layout):
        return mirrored_in_turn(self.order(layout), layout, self.alternate)

    def plan(self, q, k, layout, *, layer, scale):
        block = torch.arange(-(-layout.num_tokens // 64))
        kept = (block[:, None] - block).abs() <= self.reach
        tokens = {"q_len": layout.num_tokens, "k_len": layout.num_tokens}
        return BlockPlan.from_mask(kept, block_m=64, block_n=64, **tokens)


@pytest.fixture
def install_chosen():
    def run(model, reach, alternate=True, **schedule):
        schedule = Schedule(**{"dense_layers": frozenset(), "dense_timesteps": 0} | schedule)
        choice = SparseChoice(Chosen(reach, alternate=alternate), schedule, min_tokens=0)
        return install(model, AttentionSettings(sparse=choice))

    return run


@pytest.fixture
def first_tokens(monkeypatch):
    """Which of the video's tokens came first in each order that tokens were moved into."""
    found = []
    reorder = TokenOrder.reorder

    def watched(self, x):
        text = len(self.forward) - VIDEO
        found.append(int(self.forward[text]) - text)
        return reorder(self, x)

    monkeypatch.setattr(TokenOrder, "reorder", watched)
    return found


@pytest.mark.core
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_with_everything_kept_both_orders_are_dense_attention(models, install_chosen, sample, name):
    for batch in (1, 2):
        how = {"steps": STEPS, "shape": (batch, 16, 5, 16, 20)}
        patched = install_chosen(models(name), reach=1000)
        assert relative_error(sample(patched, **how), sample(models(name), **how)) < 1e-4
        assert {call.step for call in sparse_calls(patched)} == set(range(STEPS))


@pytest.mark.core
@pytest.mark.parametrize("cfg", [1.0, 5.0])
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_steps_take_turns_and_a_step_has_one_order(
    models, install_chosen, sample, first_tokens, name, cfg
):
    sample(install_chosen(models(name), 1, dense_timesteps=1), steps=6, cfg=cfg)
    per_forward = len(first_tokens) // 5
    assert per_forward >= 2
    turns = [set(first_tokens[i * per_forward : (i + 1) * per_forward]) for i in range(5)]
    first, last = {0}, {VIDEO - 1}
    assert turns == [last, first, last, first, last]


def test_a_forward_outside_a_run_has_the_first_order(comfyui, install_chosen, first_tokens):
    variant = Model(comfyui, VARIANTS["t2v"])
    patched = install_chosen(variant.patcher, 1)
    options = patched.model_options["transformer_options"] | {"wrappers": patched.wrappers}
    with torch.inference_mode():
        out = variant.net(**variant.inputs, transformer_options=options)
    assert first_tokens
    assert relative_error(out, variant.dense) > 1e-4


def test_turns_are_the_same_in_every_run_and_differ_from_none(models, install_chosen, sample):
    model = models("wan")
    out = sample(install_chosen(model, 1), steps=STEPS)
    assert torch.equal(out, sample(install_chosen(model, 1), steps=STEPS))
    assert (
        relative_error(sample(install_chosen(model, 1, alternate=False), steps=STEPS), out) > 1e-4
    )


@pytest.mark.parametrize("sampler", ["euler", "ddim", "euler_ancestral", "lcm", "heun", "dpm_2"])
def test_single_steps_take_turns(models, install_chosen, sample, first_tokens, sampler):
    sample(install_chosen(models("wan"), 1), steps=5, sampler=sampler)
    assert set(first_tokens) == {0, VIDEO - 1}


@pytest.mark.core
@pytest.mark.parametrize("sampler", ["uni_pc", "uni_pc_bh2", "dpmpp_2m", "res_multistep", "lms"])
def test_samplers_that_extrapolate_over_steps_keep_one_order(
    models, install_chosen, sample, first_tokens, sampler
):
    """They would multiply what differs from one step to the next."""
    # As ComfyUI runs nodes: old ones' uni_pc asks for gradients otherwise.
    with torch.inference_mode():
        sample(install_chosen(models("wan"), 1), steps=5, sampler=sampler)
    assert set(first_tokens) == {0}
