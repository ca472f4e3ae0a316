"""dense_vace_blocks: VACE's own blocks stay dense, whatever else touches the blocks.

What a VACE block is, is told here by hooks on the modules; the pack may not look at those.
"""

import pytest
import torch
from sparse_video_attention.patching import run_history
from sparse_video_attention.patching.router import OVERRIDE_KEY

from .conftest import relative_error
from .vace_model import MAIN, SHAPE, VACE_LAYERS, BandInMainBlocks, write_vace_checkpoint

pytestmark = pytest.mark.comfy


VACE = "a VACE block, and dense_vace_blocks is on"
SPARSE = None


@pytest.fixture(scope="module")
def model(comfyui, checkpoints, tmp_path_factory):
    path = tmp_path_factory.mktemp("vace") / "vace.safetensors"
    write_vace_checkpoint(checkpoints["wan"], path)
    model = comfyui.sd.load_diffusion_model(str(path))
    net = model.model.diffusion_model
    assert type(net).__name__ == "VaceWanModel"
    assert sorted(net.vace_layers_mapping) == list(VACE_LAYERS)
    return model


@pytest.fixture
def run(sample):
    return lambda model, **how: sample(model, **({"shape": SHAPE, "steps": 2, "cfg": 1.0} | how))


@pytest.fixture
def patch(install_band):
    """patch(model): band attention in every main block, none in VACE's."""

    def install(model, **how):
        settings = {"dense_layers": (), "dense_timesteps": 0, "dense_vace_blocks": True}
        return install_band(model, **(settings | how))

    return install


@pytest.fixture
def expected(run):
    """expected(model): what a run gives with the band in main blocks only."""

    def judge(model, **how):
        override = BandInMainBlocks()
        clone = model.clone()
        clone.model_options["transformer_options"][OVERRIDE_KEY] = override
        hooks = list(override.watch(clone.model.diffusion_model))
        try:
            return run(clone, **how)
        finally:
            for hook in hooks:
                hook.remove()

    return judge


def decisions(model):
    return [(call.layer, call.reason) for call in run_history(model).latest.calls]


def forward(main=MAIN, controls=1):
    """The decisions of one forward, in order."""
    calls = []
    for layer in MAIN:
        calls += [(layer, SPARSE)] if layer in main else []
        calls += [(layer, VACE)] * controls if layer in VACE_LAYERS else []
    return calls


def test_only_main_blocks_run_sparse(model, patch, run, expected):
    patched = patch(model)
    out = run(patched)
    assert decisions(patched) == forward() * 2
    assert relative_error(out, expected(model)) < 1e-5
    # VACE blocks matter: with them sparse too the result is another.
    everywhere = patch(model, dense_vace_blocks=False)
    assert relative_error(run(everywhere), out) > 1e-4
    assert {reason for _, reason in decisions(everywhere)} == {SPARSE}


def test_with_all_main_layers_dense_the_result_is_the_unpatched_one(model, patch, run):
    patched = patch(model, dense_layers=MAIN)
    assert torch.equal(run(patched), run(model))
    # And with everything kept.
    kept = patch(model, reach=10**6)
    assert relative_error(run(kept), run(model)) < 1e-5
    assert decisions(kept) == forward() * 2


def test_a_dense_layer_is_named_first(model, patch, run):
    patched = patch(model, dense_layers=(0,))
    run(patched)
    dense = [(0, "layer 0 is in dense_layers")] * 2
    assert decisions(patched) == (dense + forward()[2:]) * 2


@pytest.mark.parametrize("together", [True, False], ids=["one-batch", "two-forwards"])
def test_cond_and_uncond_in_one_forward_or_two(model, patch, run, expected, together):
    patched = patch(model)
    if not together:
        # Conditionings of unlike length cannot share a batch; this wrapper halves the batch.
        def split(apply_model, arguments):
            parts = [
                {k: v.chunk(2)[i] if torch.is_tensor(v) else v for k, v in arguments["c"].items()}
                for i in range(2)
            ]
            inputs, times = arguments["input"].chunk(2), arguments["timestep"].chunk(2)
            return torch.cat([apply_model(inputs[i], times[i], **parts[i]) for i in range(2)])

        patched.set_model_unet_function_wrapper(split)
    out = run(patched, cfg=3.0)
    assert decisions(patched) == forward() * (2 if together else 4)
    assert relative_error(out, expected(model, cfg=3.0)) < 1e-4


def test_two_controls(model, patch, run, monkeypatch):
    from comfy.model_base import WAN21_Vace

    extra_conds = WAN21_Vace.extra_conds

    def with_two(self, **inputs):
        size = (1, 32, *SHAPE[2:])
        return extra_conds(self, **inputs, vace_frames=[torch.zeros(size), torch.ones(size)])

    monkeypatch.setattr(WAN21_Vace, "extra_conds", with_two)
    patched = patch(model)
    run(patched)
    assert decisions(patched) == forward(controls=2) * 2


def test_main_blocks_that_slg_skips_leave_the_vace_blocks_dense(model, patch, run, expected):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    def guided(model):
        settings = {"start_percent": 0.0, "end_percent": 1.0, "double_layers": "0, 2, 3"}
        return SkipLayerGuidanceDiT.execute(model, scale=2.0, **settings).result[0]

    patched = patch(guided(model))
    out = run(patched)
    assert decisions(patched) == (forward() + forward(main=(1,))) * 2
    assert relative_error(out, expected(guided(model))) < 1e-4


def test_a_block_that_another_pack_runs_twice_is_a_main_block_twice(model, patch, run):
    def twice(args, extra):
        extra["original_block"](args)
        return extra["original_block"](args)

    patched = patch(model)
    patched.set_model_patch_replace(twice, "dit", "double_block", 2)
    run(patched)
    once = forward()
    assert decisions(patched) == (once[:3] + [(2, SPARSE)] + once[3:]) * 2


def test_a_wrapper_that_runs_the_model_twice(model, patch, run):
    def twice(executor, *args, **kwargs):
        executor(*args, **kwargs)
        return executor(*args, **kwargs)

    patched = patch(model)
    patched.add_wrapper_with_key("diffusion_model", "zz_twice", twice)
    run(patched)
    assert decisions(patched) == forward() * 4


def test_a_host_that_calls_no_patches_after_blocks(model, patch, run, expected):
    """ComfyUI 0.9.2 and older: VaceWanModel does not know "double_block" patches."""

    def as_older(executor, *args, **kwargs):
        args[5]["patches"] = {}
        return executor(*args, **kwargs)

    patched = patch(model)
    patched.add_wrapper_with_key("diffusion_model", "zz_older", as_older)
    out = run(patched)
    assert decisions(patched) == forward() * 2
    assert relative_error(out, expected(model)) < 1e-5


def test_a_compiled_model_tells_them_apart(model, patch, run):
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    torch._dynamo.reset()
    patched = patch(model)
    # eager runs what Dynamo traces as it is: tracing and guards are what is tested here.
    options = {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(model=patched, backend="eager", options=options)
    out = run(patched)
    assert decisions(patched) == forward() * 2
    assert relative_error(out, run(patch(model))) < 1e-4


def test_other_patches_after_blocks_are_still_called_and_nothing_is_left(model, patch, run):
    seen = []

    def theirs(args):
        seen.append(args["block_index"])
        return args

    left = []

    def look(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        left.append(args[5]["patches"])
        return out

    first = model.clone()
    first.set_model_double_block_patch(theirs)
    # Added first, so around this pack's own.
    first.add_wrapper_with_key("diffusion_model", "look", look)
    patched = patch(first)
    out = run(patched)
    assert left == [{"double_block": [theirs]}] * 2
    assert seen == [*MAIN] * 2
    assert decisions(patched) == forward() * 2
    patches = patched.model_options["transformer_options"]["patches"]
    assert patches == {"double_block": [theirs]}
    assert torch.equal(out, run(patch(model)))


def test_other_models_have_no_vace_blocks(load_model, patch, run):
    for name in ("wan", "cogvideox"):
        model = load_model(name)
        patched = patch(model)
        assert torch.equal(run(patched), run(patch(model, dense_vace_blocks=False)))
        assert {reason for _, reason in decisions(patched)} == {SPARSE}
        assert "patches" not in patched.model_options["transformer_options"]


@pytest.mark.parametrize("node", ["radial", "psa", "sparge"])
def test_every_sparse_node_has_the_input(model, run, node):
    from sparse_video_attention.nodes import psa, radial, sparge

    nodes = {
        "radial": radial.PatchRadialAttention,
        "psa": psa.PatchPSA,
        "sparge": sparge.PatchSpargeAttention,
    }
    steps = "warmup_steps" if node == "psa" else "dense_timesteps"
    inputs = {steps: 0, "last_dense_timesteps": 0, "min_tokens": 0, "dense_layers": "1"}
    inputs |= {"block_size": 64} if node == "radial" else {}
    patched = nodes[node].execute(model, dense_vace_blocks=True, **inputs).result[0]
    run(patched)
    by_layer = (1, "layer 1 is in dense_layers")
    assert decisions(patched) == [by_layer if call[0] == 1 else call for call in forward()] * 2
    with pytest.raises(ValueError, match="dense_vace_blocks 'yes': allowed are true and false"):
        nodes[node].execute(model, dense_vace_blocks="yes", **inputs)
