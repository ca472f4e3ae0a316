"""Animate 2: sparse over the video, or frame by frame where a pose guides it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.kernels.skipped import remainder
from sparse_video_attention.patching import AttentionSettings, Schedule, SparseChoice, install
from sparse_video_attention.patching.router import OVERRIDE_KEY

from .animate2_model import FRAME, LAYOUT, POSE, VIDEO, BandByFrames, animate2
from .conftest import relative_error
from .variant_model import MaskedAttention, Spy

pytestmark = pytest.mark.comfy

LAYERS = 3
ONLY_RADIAL = (
    "a pose guides this step frame by frame: only radial attention can be sparse in it, and only "
    "without another attention override before it"
)


@pytest.fixture(scope="module")
def model(comfyui):
    return animate2(comfyui)


@pytest.fixture(scope="module")
def pose():
    return torch.randn(POSE, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def patched(model, install_band):
    return install_band(model.patcher, dense_layers=(0,), dense_timesteps=0)


@pytest.fixture(scope="module")
def guided(model, pose):
    """The unpatched model with a pose."""
    return model.run(model.patcher, pose_latents=pose)[0]


def of_frames(record):
    """Calls of one frame each: those over the pose's own tokens left out."""
    return [call for call in record.calls if "240" not in (call.reason or "")]


def test_without_a_pose_it_is_sparse_over_the_video(model, patched):
    out, record = model.run(patched)
    assert record.layouts == [str(LAYOUT)]
    assert [call.layer for call in record.calls] == [0, 1, 2]
    assert [call.layer for call in record.calls if call.reason is None] == [1, 2]
    judge = model.with_override(MaskedAttention(LAYOUT, dense_layers=(0,)))
    assert relative_error(out, model.run(judge)[0]) < 1e-5
    assert relative_error(out, model.dense) > 1e-3


def test_with_a_pose_it_is_sparse_frame_by_frame(model, patched, pose, guided):
    out, record = model.run(patched, pose_latents=pose)
    judge = model.with_override(BandByFrames(dense_layers=(0,)))
    assert relative_error(out, model.run(judge, pose_latents=pose)[0]) < 1e-5
    assert relative_error(out, guided) > 1e-3
    sparse = [call.layer for call in record.calls if call.reason is None]
    assert sparse == [1] * LAYOUT.frames + [2] * LAYOUT.frames
    # The pose's own tokens attend to each other in calls that stay dense.
    assert all(call.reason is not None for call in record.calls if call not in of_frames(record))


def test_everything_kept_is_dense(model, pose, guided, install_band):
    everything = install_band(model.patcher, reach=10**6, dense_layers=(), dense_timesteps=0)
    out, record = model.run(everything, pose_latents=pose)
    assert relative_error(out, guided) < 1e-5
    assert record.sparse().calls == LAYERS * LAYOUT.frames and record.sparse().density == 1.0


def test_batch_of_two_is_two_of_one(model, patched, pose):
    generator = torch.Generator().manual_seed(8)
    x, context = (torch.randn(model.inputs[n].shape, generator=generator) for n in ("x", "context"))
    single = [
        model.run(patched, pose_latents=pose, x=one, context=text)[0]
        for one, text in ((model.inputs["x"], model.inputs["context"]), (x, context))
    ]
    both, record = model.run(
        patched,
        pose_latents=pose.repeat(2, 1, 1, 1, 1),
        x=torch.cat([model.inputs["x"], x]),
        context=torch.cat([model.inputs["context"], context]),
        timestep=model.inputs["timestep"].repeat(2),
    )
    assert record.sparse().calls == (LAYERS - 1) * LAYOUT.frames
    assert relative_error(both, torch.cat(single)) < 1e-4


@pytest.mark.parametrize("node", ["radial", "psa", "sparge"])
def test_of_the_methods_radial_serves_it(model, pose, guided, node, run_lines):
    from sparse_video_attention.nodes.psa import PatchPSA
    from sparse_video_attention.nodes.radial import PatchRadialAttention
    from sparse_video_attention.nodes.sparge import PatchSpargeAttention

    nodes = {"radial": PatchRadialAttention, "psa": PatchPSA, "sparge": PatchSpargeAttention}
    inputs = {
        "radial": {"dense_timesteps": 0, "block_size": 64, "decay_factor": 0.0},
        "psa": {"warmup_steps": 0, "dense_layers": ""},
        "sparge": {"dense_timesteps": 0, "last_dense_timesteps": 0, "dense_layers": ""},
    }
    model.patcher.model.latent_format = SimpleNamespace(latent_channels=16)
    patched = nodes[node].execute(model.patcher, min_tokens=0, **inputs[node]).result[0]
    out, record = model.run(patched, pose_latents=pose)
    if node == "radial":
        sparse = [call.layer for call in of_frames(record) if call.reason is None]
        assert sparse == [1] * LAYOUT.frames + [2] * LAYOUT.frames
        assert 0.0 < relative_error(out, guided) < 0.5
    else:
        assert torch.equal(out, guided)
        assert {call.reason for call in of_frames(record)} == {ONLY_RADIAL}


def test_means_are_weighted_in_a_frames_call_too(model, pose, guided, band):
    class Skipping(band):
        """Each block itself and the pose; what becomes of the others is asked for."""

        def static_plan(self, layout, device):
            block = torch.arange(-(-layout.num_tokens // 64))
            mask = (block[:, None] == block) | (block >= VIDEO // 64)
            tokens = {"q_len": layout.num_tokens, "k_len": layout.num_tokens}
            rest = remainder(self.skipped_blocks, len(block))
            return BlockPlan.from_mask(mask, block_m=64, block_n=64, **tokens, **rest)

    def run(skipped):
        policy = Skipping()
        policy.skipped_blocks = skipped
        choice = SparseChoice(policy, Schedule(dense_timesteps=0), min_tokens=0)
        patched = install(model.patcher, AttentionSettings(sparse=choice))
        return model.run(patched, pose_latents=pose)[0]

    dropped, pooled, weighted = map(run, ("drop", "pool", "weighted"))
    assert bool(weighted.isfinite().all())
    assert relative_error(weighted, pooled) > 1e-6
    assert 1e-6 < relative_error(weighted, guided) < relative_error(dropped, guided)


def test_frames_are_not_counted_behind_another_override(model, patched, pose, guided):
    """It may take some of the calls, and those that are left do not say whose they are."""
    counted = []

    class TakesTheSecondFrame:
        previous = patched.model_options["transformer_options"][OVERRIDE_KEY]

        def __call__(self, func, q, k, v, heads, *args, **kwargs):
            if q.shape[1] == FRAME and k.shape[1] >= VIDEO:
                counted.append(k.shape[1])
                if len(counted) % LAYOUT.frames == 2:
                    return func(q, k, v, heads, *args, **kwargs)
            return self.previous(func, q, k, v, heads, *args, **kwargs)

    behind = patched.clone()
    behind.model_options["transformer_options"][OVERRIDE_KEY] = TakesTheSecondFrame()
    out, record = model.run(behind, pose_latents=pose)
    assert len(counted) == LAYERS * LAYOUT.frames
    assert torch.equal(out, guided)
    assert {call.reason for call in of_frames(record)} == {
        ONLY_RADIAL,
        "layer 0 is in dense_layers",
    }


def test_a_call_that_is_missing_makes_its_layer_dense(model, patched, pose):
    """Taken by a block's own options, where the forward cannot see it."""
    blocks = []

    def takes_the_first_frame(args, extra):
        options = dict(args["transformer_options"])
        router = options[OVERRIDE_KEY]

        class Before:
            previous = router

            def __call__(self, func, q, k, v, heads, *rest, **kwargs):
                if (q.shape[1], k.shape[1]) == (FRAME, VIDEO):
                    return func(q, k, v, heads, *rest, **kwargs)
                return router(func, q, k, v, heads, *rest, **kwargs)

        options[OVERRIDE_KEY] = Before()
        blocks.append(options["block_index"])
        return extra["original_block"](args | {"transformer_options": options})

    replaced = patched.clone()
    replaced.set_model_patch_replace(takes_the_first_frame, "dit", "double_block", 1)
    _, record = model.run(replaced, pose_latents=pose)
    assert blocks == [1]
    sparse = [call.layer for call in record.calls if call.reason is None]
    assert sparse == [2] * LAYOUT.frames


def test_what_one_frame_pools_is_right_for_the_frames_it_is_kept_for(
    model, pose, band, monkeypatch
):
    """A kernel that keeps pooled keys may use them in every call that it is handed them in."""
    from sparse_video_attention.kernels import registry

    torch_kernel = registry.kernels()["torch"]
    handed = []

    class Pooling(band):
        """Each block itself and the pose, the others by their means."""

        def static_plan(self, layout, device):
            block = torch.arange(-(-layout.num_tokens // 64))
            mask = (block[:, None] == block) | (block >= VIDEO // 64)
            tokens = {"q_len": layout.num_tokens, "k_len": layout.num_tokens}
            return BlockPlan.from_mask(
                mask, block_m=64, block_n=64, pooled_remainder=True, **tokens
            ).on_device(device)

    def pooled(call):
        """[keys] bool: those in a block that some row of the call's plan pools."""
        columns = (call.plan.to_levels() > 1).any(2).flatten(0, 1).any(0)
        return columns.repeat_interleave(call.plan.block_n)[: call.plan.k_len]

    def run(call):
        handed.append((call.kept, call.k.data_ptr(), torch.stack([call.k, call.v]), pooled(call)))
        return torch_kernel.run(call)

    keeper = replace(torch_kernel, name="keeper", run=run, rank=lambda call: 9.0)
    monkeypatch.setattr(registry, "_KERNELS", {"keeper": keeper})
    registry.unavailable_reason.cache_clear()
    choice = SparseChoice(Pooling(), Schedule(dense_timesteps=0), min_tokens=0)
    model.run(install(model.patcher, AttentionSettings(sparse=choice)), pose_latents=pose)

    layers = [handed[at : at + LAYOUT.frames] for at in range(0, len(handed), LAYOUT.frames)]
    assert len(layers) == LAYERS
    for (first, *_), *others in layers:
        assert first is None, "the first frame has no pose behind its keys"
        assert len({id(kept) for kept, *_ in others}) == 1 and others[0][0] is not None
        if model.is_comfyuis_own:
            assert len({address for _, address, *_ in others}) == 1, "would be pooled every time"
        _, _, there, columns = others[0]
        assert any(columns.any() for *_, columns in others), "nothing is pooled"
        # Whoever is handed it first may pool any block for all of them.
        for _, _, keys, columns in others[1:]:
            assert torch.equal(keys[..., columns, :], there[..., columns, :])
    assert len({id(layer[1][0]) for layer in layers}) == LAYERS
    registry.unavailable_reason.cache_clear()


@pytest.mark.parametrize("node", ["radial", "psa"])
def test_a_preview_says_what_is_otherwise_where_a_pose_guides(model, node):
    from sparse_video_attention.nodes.psa import PatchPSA
    from sparse_video_attention.nodes.radial import PatchRadialAttention
    from sparse_video_attention.patching import preview

    model.patcher.model.latent_format = SimpleNamespace(latent_channels=16)
    node = PatchRadialAttention if node == "radial" else PatchPSA
    patched = node.execute(model.patcher, min_tokens=0).result[0]
    net = model.patcher.model.diffusion_model
    choice = patched.model_options["transformer_options"]["sparse_video_attention"].sparse
    (said,) = preview._where_guided(net, choice, LAYOUT)
    if node is PatchPSA:
        assert said.endswith("runs frame by frame and stays dense.")
    else:
        _, record = model.run(
            node.execute(model.patcher, min_tokens=0, dense_timesteps=0).result[0],
            pose_latents=torch.ones(POSE),
        )
        assert said.endswith(f"frame by frame, at density {record.sparse().density:.3f}.")


def test_its_frames_go_to_the_backend_chosen_for_self_attention(model, pose, guided):
    from sparse_video_attention.nodes.backend import SetAttentionBackend

    spy = Spy()
    chosen = SetAttentionBackend.execute(model.with_override(spy), self_attn_1_type="torch_sdpa")
    out, record = model.run(chosen.result[0], pose_latents=pose)
    assert relative_error(out, guided) < 1e-5
    # What reaches the override beneath is cross-attention alone.
    keys = {k for _, k in spy.lengths}
    assert keys == {model.inputs["context"].shape[1]}
    assert "torch_sdpa" in record.summary()
