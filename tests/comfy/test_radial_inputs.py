"""PatchRadialAttention's refusals: inputs and models that it does not take."""

import pytest
import torch

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"dense_layers": "a,b"}, "dense_layers 'a,b': 'a' is not a layer"),
        ({"dense_layers": "3-1"}, "dense_layers '3-1': the range '3-1' runs backwards"),
        ({"dense_layers": "4"}, "layer 4 is outside this model, whose 4 layers are 0 to 3"),
        ({"dense_layers": "-5"}, "layer -5 is outside this model"),
        ({"decay_factor": 2.5}, "decay_factor"),
        ({"decay_factor": float("nan")}, "decay_factor"),
        ({"block_size": 100}, "block_size 100: allowed are 128 and 64"),
        ({"block_size": 64.5}, "block_size 64.5: allowed are 128 and 64"),
        ({"block_size": "128"}, "block_size '128': allowed are 128 and 64"),
        ({"block_size": [128]}, "block_size [128]: allowed are 128 and 64"),
        ({"kernel": "nope"}, "kernel 'nope'"),
        ({"kernel": ["nope"]}, "kernel ['nope']: allowed are auto"),
        ({"kernel": "triton"}, "kernel 'triton' cannot run here"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_bad_input_is_refused_with_one_sentence(models, patch_radial, inputs, said):
    model = models("wan")
    options = repr(model.model_options)
    with pytest.raises(ValueError) as refusal:
        patch_radial(model, **inputs)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert repr(model.model_options) == options


@pytest.mark.parametrize(
    ("node", "inputs", "reason"),
    [
        ("PatchRadialAttention", {}, "skipped_blocks is pool: set it to drop, or kernel to auto"),
        ("PatchRadialAttention", {"skipped_blocks": "drop"}, None),
        (
            "PatchRadialAttention",
            {"skipped_blocks": "weighted"},
            "skipped_blocks is weighted: set it to drop, or kernel to auto",
        ),
        (
            "PatchSpargeAttention",
            {},
            "skipped_blocks is weighted: set it to drop, or kernel to auto",
        ),
        (
            "PatchSpargeAttention",
            {"skipped_blocks": "pool"},
            "skipped_blocks is pool: set it to drop, or kernel to auto",
        ),
        ("PatchSpargeAttention", {"skipped_blocks": "drop"}, None),
        (
            "PatchPSA",
            {"preset": "Wan2.1_14b/psa_balanced", "skipped_blocks": "drop"},
            "preset Wan2.1_14b/psa_balanced has levels 2, 4, 8: set kernel to auto",
        ),
        ("PatchPSA", {"preset": "Wan2.1_14b/baseline"}, None),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("kernel", ["flash_attn4", "spas_sage_attn", "sparse_sageattn", "flex"])
def test_kernels_of_whole_blocks_are_refused_where_blocks_are_pooled(
    models, monkeypatch, kernel, node, inputs, reason
):
    from sparse_video_attention.kernels import registry
    from sparse_video_attention.nodes.extension import NODES

    # As on a machine that has them all; what registers afterwards would want the real one.
    assert kernel in registry.kernels()
    monkeypatch.setattr(registry, "unavailable_reason", lambda name: None)
    (patch,) = [each.execute for each in NODES if each.__name__ == node]
    if reason is None:
        (patched,) = patch(models("wan"), kernel=kernel, **inputs).result
        settings = patched.model_options["transformer_options"]["sparse_video_attention"]
        assert settings.sparse.kernel == kernel
        return
    with pytest.raises(ValueError) as refusal:
        patch(models("wan"), kernel=kernel, **inputs)
    assert f"kernel {kernel!r} cannot pool blocks, but {reason}" in str(refusal.value)


@pytest.mark.parametrize("skipped", ["pool", "weighted"])
@pytest.mark.parametrize("kernel", ["auto", "torch", "triton", "hopper"])
def test_the_pack_s_own_kernels_pool(models, monkeypatch, patch_radial, kernel, skipped):
    from sparse_video_attention.kernels import registry

    assert kernel in ("auto", *registry.kernels())
    monkeypatch.setattr(registry, "unavailable_reason", lambda name: None)
    assert patch_radial(models("wan"), kernel=kernel, skipped_blocks=skipped) is not None


@pytest.mark.parametrize("given", [64, 64.0])
def test_a_block_size_linked_from_a_float_is_a_block_size(models, patch_radial, given):
    patched = patch_radial(models("wan"), block_size=given)
    settings = patched.model_options["transformer_options"]["sparse_video_attention"]
    assert repr(settings.sparse.policy.block_size) == "64"


@pytest.mark.core
def test_bad_layer_lists_are_refused_before_the_graph_runs(comfyui):
    from sparse_video_attention.nodes.radial import PatchRadialAttention

    assert PatchRadialAttention.validate_inputs(dense_layers="0-2, -1") is True
    assert PatchRadialAttention.validate_inputs(dense_layers="") is True
    assert "'5-2' runs backwards" in PatchRadialAttention.validate_inputs(dense_layers="5-2")


@pytest.mark.core
def test_other_models_are_refused_by_name(comfyui, patch_radial):
    import comfy.model_patcher

    class Flux(torch.nn.Module):
        pass

    class Base(torch.nn.Module):
        diffusion_model = Flux()

    model = comfy.model_patcher.ModelPatcher(Base(), torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(ValueError, match="this model is a Flux; .* supports WAN and CogVideoX"):
        patch_radial(model)
