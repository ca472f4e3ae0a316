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
