"""Sources and poses that a model has behind the video, in ComfyUI's own models."""

import dataclasses

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout
from sparse_video_attention.patching import layout as layout_module
from sparse_video_attention.patching.install import install
from sparse_video_attention.patching.preview import not_counted
from sparse_video_attention.patching.schedule import Schedule
from sparse_video_attention.patching.settings import AttentionSettings, SparseChoice, advice_of
from sparse_video_attention.psa import PsaPolicy
from sparse_video_attention.radial_attn import RadialPolicy
from sparse_video_attention.sparge import SpargePolicy

from benchmarks.node_defaults import SPARGE_POLICY

from .conftest import relative_error
from .model_variants import VARIANTS
from .variant_model import FirstQueries

pytestmark = pytest.mark.comfy

# Blocks as small as these videos.
SPARGE = SpargePolicy(
    topk=0.2, block_order="Gilbert", skipped_blocks="weighted", block_m=16, block_n=16
)
PSA = PsaPolicy(
    ((1, (0.0, 0.2)),), "topk", block_m=16, block_n=16, tile_n=16, rearrange_method="Gilbert"
)
WITH_VIDEOS = [name for name, variant in VARIANTS.items() if variant.layout.suffix_grids]
every_one = pytest.mark.parametrize("name", WITH_VIDEOS)


def with_policy(model, policy):
    schedule = Schedule(frozenset(), dense_timesteps=0)
    choice = SparseChoice(policy, schedule, min_tokens=0)
    return install(model.patcher, AttentionSettings(sparse=choice))


def test_bernini_and_scail_have_some():
    assert WITH_VIDEOS == ["bernini", "scail", "scail2"]


@every_one
def test_their_tokens_are_where_the_layout_says(model_of, name):
    model = model_of(name)

    def queries(**changed):
        with pytest.raises(FirstQueries) as stopped:
            model.run(model.with_override(FirstQueries()), **changed)
        return stopped.value.args[0]

    before = queries()
    which = "context_latents" if name == "bernini" else "pose_latents"
    videos = model.inputs[which] if name == "bernini" else [model.inputs[which]]
    for index, (first, (frames, height, width)) in enumerate(model.variant.layout.grids()[1:]):
        for frame, y, x in ((0, 1, 2), (frames - 1, height - 1, width - 1)):
            changed = [video.clone() for video in videos]
            changed[index][0, :, frame, 2 * y, 2 * x] += 1.0
            now = queries(**{which: changed if name == "bernini" else changed[0]})
            moved = (before != now).any(dim=2).nonzero().tolist()
            assert moved == [[0, first + (frame * height + y) * width + x]]


@every_one
@pytest.mark.parametrize(
    "everything",
    [
        dataclasses.replace(SPARGE, topk=1.0),
        dataclasses.replace(PSA, mask_ratios=((1, (0.0, 1.0)),), rearrange_method="STA"),
    ],
    ids=["sparge", "psa"],
)
def test_tokens_are_put_back_where_everything_is_kept(model_of, name, everything):
    model = model_of(name)
    out, record = model.run(with_policy(model, everything))
    assert record.sparse().calls == len(model.variant.layers) and record.sparse().density == 1.0
    assert relative_error(out, model.dense) < 1e-5


@every_one
@pytest.mark.parametrize("policy", [SPARGE, PSA], ids=["sparge", "psa"])
def test_choosing_among_them_keeps_less(model_of, name, policy, monkeypatch):
    model = model_of(name)
    density = model.run(with_policy(model, policy))[1].sparse().density
    monkeypatch.setattr(layout_module, "_LARGE_SHARE", 2.0)
    _, record = model.run(with_policy(model, policy))
    assert record.layouts == [str(dataclasses.replace(model.variant.layout, suffix_grids=()))]
    assert density < 0.9 * record.sparse().density


def test_radial_attends_to_all_of_them_and_says_so():
    layout = TokenLayout(31, 30, 52, suffix_tokens=48360, suffix_grids=((31, 30, 52),))
    policy = RadialPolicy()
    said = advice_of(policy, layout, policy.static_plan(layout, torch.device("cpu")))
    assert advice_of(policy, TokenLayout(31, 30, 52, suffix_tokens=48)) is None
    assert said == (
        "radial attends in full to the 48360 tokens after the video; Patch Sparge Attention "
        "chooses among them"
    )
    assert advice_of(SPARGE_POLICY, layout) is None
    density = SPARGE_POLICY.forecast(layout)[0].density()
    assert density == pytest.approx(SPARGE_POLICY.forecast(TokenLayout(62, 30, 52))[0].density())
    assert density < 0.22


@pytest.mark.parametrize("name", VARIANTS)
def test_the_preview_says_what_conditioning_may_add(model_of, name):
    """A plain WanModel may get Bernini's sources, and VACE's and Animate's are frames of it."""
    made_for_them = name.startswith(("fun-control", "s2v", "humo", "scail"))
    (said,) = not_counted(model_of(name).net) or (None,)
    assert (said is not None) == made_for_them
    assert said is None or said.startswith("Reference and pose tokens of the conditioning are not")
