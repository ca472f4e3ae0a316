"""PatchSpargeAttention in a real ComfyUI: plug-and-play, tuned checkpoints, refusals."""

import pytest
import torch

from .conftest import relative_error, sparse_calls

pytestmark = pytest.mark.comfy

HEADS = {"wan": 2, "cogvideox": 2}
PATHS = {"wan": "blocks.{}.self_attn", "cogvideox": "transformer_blocks.{}.attn1"}


@pytest.fixture(scope="module")
def patch(comfyui):
    from sparse_video_attention.nodes.sparge import PatchSpargeAttention

    defaults = {
        "min_tokens": 0,
        "dense_layers": "",
        "dense_timesteps": 1,
        "last_dense_timesteps": 0,
    }
    return lambda model, **inputs: PatchSpargeAttention.execute(
        model, **(defaults | inputs)
    ).result[0]


@pytest.fixture
def checkpoint_folder(comfyui, tmp_path, monkeypatch):
    import folder_paths

    names = dict(folder_paths.folder_names_and_paths)
    names["sparge"] = ([str(tmp_path)], set())
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", names)
    return tmp_path


def write_checkpoint(path, family, layers, heads, *, sparse=True, cdf=0.9):
    tensors = {}
    for layer in range(layers):
        module = PATHS[family].format(layer) + ".inner_attention."
        tensors[module + "is_sparse"] = torch.full((heads,), sparse)
        tensors[module + "cdfthreshd"] = torch.full((heads,), cdf if sparse else 1.0)
        tensors[module + "simthreshd1"] = torch.full((heads,), -1.0 if sparse else 1.0)
        tensors[module + "simthreshd2"] = torch.zeros(heads)
        tensors[module + "pvthreshd"] = torch.full((heads,), 20.0)
    torch.save(tensors, path)


@pytest.mark.core
@pytest.mark.parametrize(
    ("block_order", "block_scores"),
    [("auto", "auto"), ("raster", "group means"), ("Gilbert", "block means")],
)
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_plug_and_play_acts(models, patch, sample, name, block_order, block_scores):
    model = models(name)
    how = {"block_order": block_order, "block_scores": block_scores}
    patched = patch(model, topk=0.3, simthreshd1=-1.0, **how)
    out = sample(patched)
    assert 1e-6 < relative_error(out, sample(model)) < 1
    assert all(0 < call.density < 1 for call in sparse_calls(patched))


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_means_that_are_weighted_are_the_default_and_act(models, patch, sample, name):
    model = models(name)
    dense, default = sample(model), sample(patch(model))
    dropped, pooled, weighted = (
        sample(patch(model, topk=0.2, skipped_blocks=skipped))
        for skipped in ("drop", "pool", "weighted")
    )
    assert torch.equal(default, weighted) and bool(weighted.isfinite().all())
    assert 1e-6 < relative_error(weighted, dense) < relative_error(dropped, dense)
    assert relative_error(weighted, pooled) > 1e-6


@pytest.mark.parametrize("skipped", ["pool", "weighted"])
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_batch_two_is_two_runs_of_batch_one(models, patch, sample, name, skipped):
    patched = patch(models(name), skipped_blocks=skipped)
    noise = torch.randn(2, 16, 5, 16, 20, generator=torch.Generator().manual_seed(3))
    both = sample(patched, shape=(2, 16, 5, 16, 20), noise=noise)
    for i in range(2):
        assert relative_error(both[i : i + 1], sample(patched, noise=noise[i : i + 1])) < 1e-4


def test_auto_order_is_gilbert_but_for_what_belongs_to_the_models_own_order(
    models, patch, checkpoint_folder
):
    write_checkpoint(checkpoint_folder / "tuned.pt", "wan", 4, 2)

    def order(**inputs):
        options = patch(models("wan"), **inputs).model_options["transformer_options"]
        return options["sparse_video_attention"].sparse.policy.block_order

    assert order() == "Gilbert"
    assert order(attention_sink=True) == order(sparge_ckpt="tuned.pt") == "raster"
    assert order(attention_sink=True, block_order="Gilbert") == "Gilbert"
    assert order(block_order="raster") == "raster"
    with pytest.raises(ValueError, match="'hilbert': allowed are auto, raster, Gilbert"):
        order(block_order="hilbert")


def test_auto_scores_are_of_group_means_but_for_thresholds_of_the_published_scores(
    models, patch, checkpoint_folder
):
    write_checkpoint(checkpoint_folder / "tuned.pt", "wan", 4, 2)
    tuned, by_sum = {"sparge_ckpt": "tuned.pt"}, {"cdfthreshd": 0.9}

    def policy(**inputs):
        options = patch(models("wan"), **inputs).model_options["transformer_options"]
        return options["sparse_video_attention"].sparse.policy

    def scores(**inputs):
        return policy(**inputs).block_scores

    for inputs in ({}, {"topk": 0.5}, {"attention_sink": True}, {"skipped_blocks": "drop"}):
        assert scores(**inputs) == scores(**inputs, block_scores="auto") == "group means"
        assert scores(**inputs, block_scores="block means") == "block means"
    for inputs in (tuned, by_sum, tuned | by_sum):
        assert scores(**inputs) == scores(**inputs, block_scores="auto") == "block means"
        assert scores(**inputs, block_scores="group means") == "group means"
    # Nor are a checkpoint's for smaller blocks.
    assert policy().halves_in_small_frames and policy().halves_if_faster
    found = policy(**tuned, block_scores="group means")
    assert not found.halves_in_small_frames and not found.halves_if_faster
    for wrong in ("means", "Group means", None, 1):
        with pytest.raises(ValueError) as refusal:
            scores(block_scores=wrong)
        allowed = "allowed are auto, block means, group means"
        assert str(refusal.value).endswith(f"block_scores {wrong!r}: {allowed}")
        assert "\n" not in str(refusal.value)


@pytest.mark.core
@pytest.mark.parametrize("skipped", ["pool", "weighted"])
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_everything_kept_is_dense(models, patch, sample, name, skipped):
    model = models(name)
    patched = patch(model, topk=1.0, skipped_blocks=skipped)
    assert relative_error(sample(patched), sample(model)) < 1e-4
    assert {call.density for call in sparse_calls(patched)} == {1.0}


@pytest.mark.core
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_a_tuned_checkpoint_decides_per_layer_and_head(
    models, patch, sample, checkpoint_folder, name
):
    model = models(name)
    layers = len(model.model.diffusion_model.blocks)
    heads = HEADS[name]
    write_checkpoint(checkpoint_folder / "dense.pt", name, layers, heads, sparse=False)
    write_checkpoint(checkpoint_folder / "sparse.pt", name, layers, heads, cdf=0.3)
    dense = patch(model, sparge_ckpt="dense.pt")
    assert relative_error(sample(dense), sample(model)) < 1e-4
    sparse = patch(model, sparge_ckpt="sparse.pt")
    sample(sparse)
    assert all(call.density < 1 for call in sparse_calls(sparse))


@pytest.mark.parametrize(
    ("layers", "heads", "said"),
    [(40, 2, ("40", "4")), (4, 40, ("40", "2"))],
    ids=["layers", "heads"],
)
def test_a_checkpoint_for_another_model_is_refused_with_both_numbers(
    models, patch, checkpoint_folder, layers, heads, said
):
    write_checkpoint(checkpoint_folder / "other.pt", "wan", layers, heads)
    with pytest.raises(ValueError, match="other.pt") as refusal:
        patch(models("wan"), sparge_ckpt="other.pt")
    assert all(number in str(refusal.value) for number in said)


@pytest.mark.core
def test_a_checkpoint_that_is_not_there_is_refused(models, patch, checkpoint_folder):
    with pytest.raises(ValueError, match=r"sparge_ckpt 'gone.pt': no such file"):
        patch(models("wan"), sparge_ckpt="gone.pt")


def test_a_replaced_checkpoint_is_read_again(comfyui, checkpoint_folder):
    from sparse_video_attention.nodes.sparge import PatchSpargeAttention

    write_checkpoint(checkpoint_folder / "tuned.pt", "wan", 4, 2)
    # None: the name comes from another node.
    first = [PatchSpargeAttention.fingerprint_inputs(sparge_ckpt=n) for n in ("tuned.pt", None)]
    write_checkpoint(checkpoint_folder / "tuned.pt", "wan", 8, 2)
    second = [PatchSpargeAttention.fingerprint_inputs(sparge_ckpt=n) for n in ("tuned.pt", None)]
    assert all(before != after for before, after in zip(first, second, strict=True))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_replaced_checkpoint_of_a_file_is_read_again(
    comfyui, checkpoint_folder, tmp_path, encoding
):
    from sparse_video_attention.nodes.backend import SetAttentionBackend

    config = tmp_path / "config.json"
    config.write_text('{"sparge": true, "sparge_ckpt": "tuned.pt"}', encoding=encoding)
    write_checkpoint(checkpoint_folder / "tuned.pt", "wan", 4, 2)
    first = SetAttentionBackend.fingerprint_inputs(config_file=str(config))
    write_checkpoint(checkpoint_folder / "tuned.pt", "wan", 8, 2)
    assert SetAttentionBackend.fingerprint_inputs(config_file=str(config)) != first


@pytest.mark.parametrize(
    ("kernel", "capability", "blocks"),
    [
        ("spas_sage_attn", (9, 0), (64, 128)),
        ("spas_sage_attn", (8, 9), (128, 64)),
        ("auto", (9, 0), (128, 64)),
    ],
    ids=str,
)
def test_maps_have_the_block_size_of_spargeattn_where_it_is_asked_for(
    models, monkeypatch, kernel, capability, blocks
):
    """Its Hopper kernel takes 64 x 128 alone, into which 128 x 64 does not split."""
    from sparse_video_attention.kernels import TokenLayout
    from sparse_video_attention.patching.sparge_choice import sparge_choice
    from sparse_video_attention.third_party.plan_blocks import conversion_refused
    from sparse_video_attention.third_party.spas_sage_attn import block_size_on

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model = models("wan").clone()
    model.load_device = torch.device("cuda", 0)
    policy = sparge_choice(
        model,
        sparge_ckpt="none",
        topk=0.5,
        simthreshd1=-0.1,
        cdfthreshd=0.0,
        attention_sink=False,
        block_order="raster",
        skipped_blocks="drop",
        kernel=kernel,
    ).policy
    assert (policy.block_m, policy.block_n) == blocks
    q = torch.randn(1, 2, 300, 64, generator=torch.Generator().manual_seed(0))
    plan = policy.plan(q, q, TokenLayout(3, 10, 10), layer=0, scale=0.1)
    taken = conversion_refused(plan, *block_size_on(model.load_device)) is None
    assert taken == (kernel == "spas_sage_attn")


@pytest.mark.parametrize(
    ("heads", "layers", "said"),
    [
        (30, 30, None),
        (48, 42, "it has 30 layers (CogVideoX) where this model has 42"),
        (48, 30, "it has 30 heads a layer (CogVideoX) where this model has 48"),
    ],
    ids=["2B", "5B", "30x48"],
)
def test_the_published_checkpoint_is_for_cogvideox_2b_alone(comfyui, golden, heads, layers, said):
    """Sizes alone: 2B is the model that SpargeAttn's authors tuned it for."""
    import comfy.model_patcher
    import comfy.ops
    from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel
    from sparse_video_attention.nodes.sparge import PatchSpargeAttention

    with torch.device("meta"):
        network = CogVideoXTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=64,
            num_layers=layers,
            time_embed_dim=64,
            text_embed_dim=64,
            device="meta",
            operations=comfy.ops.disable_weight_init,
        )
    base = torch.nn.Module()
    base.diffusion_model = network
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(base, cpu, cpu)
    path = str(golden / "sparge_cogvideox_2b.pt")
    if said is not None:
        with pytest.raises(ValueError) as refusal:
            PatchSpargeAttention.execute(model, sparge_ckpt=path)
        assert said in str(refusal.value) and path in str(refusal.value)
        assert "sparse_video_attention" not in model.model_options["transformer_options"]
        return
    patched = PatchSpargeAttention.execute(model, sparge_ckpt=path).result[0]
    options = patched.model_options["transformer_options"]
    checkpoint = options["sparse_video_attention"].sparse.policy.checkpoint
    assert (len(checkpoint), checkpoint.num_heads) == (30, 30)
    stored = torch.load(path, weights_only=True)
    for layer in (0, 17, 29):
        name = f"transformer_blocks.{layer}.attn1.inner_attention."
        sim, cdf = checkpoint.on_device(cpu)[layer]
        is_sparse = stored[name + "is_sparse"]
        assert torch.equal(cdf, stored[name + "cdfthreshd"].float())
        assert torch.equal(sim[is_sparse], stored[name + "simthreshd1"][is_sparse].float())
        assert bool((sim[~is_sparse] == float("inf")).all())
