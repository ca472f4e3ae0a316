"""Steps and layers that libraries of few bits leave to PyTorch's attention."""

from collections import Counter

import pytest
from sparse_video_attention.patching import run_history

from .conftest import SITES, relative_error

pytestmark = pytest.mark.comfy

LAYERS, STEPS = 4, 4


@pytest.fixture
def model(models):
    return models("wan")


@pytest.fixture
def in_bits(fake_backend):
    """in_bits(name, bits): a backend of as many bits; counts its calls by length of keys."""

    def add(name, bits):
        calls = fake_backend(name, is_low_precision=bits < 16, is_4_bit=bits == 4)
        return lambda: Counter(k[2] for _, k, _ in calls)

    return add


def ran(model):
    """How often each backend was called in self-attention, as the run's line has it."""
    counted = run_history(model).latest.backend_calls
    return {said: n for (site, said), n in counted.items() if site == SITES[0]}


@pytest.mark.core
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
@pytest.mark.parametrize(
    ("bits", "steps", "inputs", "first", "last"),
    [
        (4, 8, {}, 1, 1),
        (4, 7, {}, 0, 0),
        (4, 8, {"exact_timesteps": 0, "last_exact_timesteps": 0}, 0, 0),
        (4, 8, {"exact_timesteps": 2}, 2, 1),
        (4, 4, {"exact_timesteps": 1}, 1, 0),
        (8, 8, {}, 0, 0),
        (8, 4, {"exact_timesteps": 2}, 2, 0),
        (8, 4, {"last_exact_timesteps": 1}, 0, 1),
        (8, 4, {"exact_timesteps": 9}, 4, 0),
        (16, 4, {"exact_timesteps": 2, "exact_layers": "0"}, 0, 0),
    ],
)
def test_the_first_and_last_steps(
    models, set_backends, sample, in_bits, name, bits, steps, inputs, first, last
):
    model = models(name)
    calls = in_bits("sage_attn3", bits)
    patched = set_backends(model, self_attn_1_type="sage_attn3", **inputs)
    out = sample(patched, steps=steps)
    layers = len(model.model.diffusion_model.blocks)
    expected = {
        "sage_attn3": (steps - first - last) * layers,
        f"torch_sdpa (first {first} of {steps} steps)": first * layers,
        f"torch_sdpa (last {last} of {steps} steps)": last * layers,
    }
    assert ran(patched) == {said: n for said, n in expected.items() if n}
    assert sum(calls().values()) == expected["sage_attn3"]
    assert relative_error(out, sample(model, steps=steps)) < 1e-4


@pytest.mark.core
def test_layers_in_every_step_and_every_place(model, set_backends, sample, in_bits):
    calls = in_bits("sage_attn2", 8)
    backends = dict.fromkeys(SITES[:2], "sage_attn2")
    patched = set_backends(model, **backends, exact_layers="0, -1")
    sample(patched, steps=STEPS)
    assert set(calls().values()) == {2 * STEPS} and len(calls()) == 2
    exact = {f"torch_sdpa (layer {layer} is in exact_layers)": STEPS for layer in (0, 3)}
    assert ran(patched) == {"sage_attn2": 2 * STEPS} | exact


def test_layers_where_the_host_does_not_say_which_it_is_at(models, set_backends, sample, in_bits):
    """ComfyUI's CogVideoX does not."""
    in_bits("sage_attn2", 8)
    patched = set_backends(models("cogvideox"), self_attn_1_type="sage_attn2", exact_layers="1")
    sample(patched, steps=STEPS)
    layers = len(patched.model.diffusion_model.blocks)
    exact = {"torch_sdpa (layer 1 is in exact_layers)": STEPS}
    assert ran(patched) == {"sage_attn2": (layers - 1) * STEPS} | exact


def test_with_a_sparse_node_they_are_of_the_calls_that_it_leaves_dense(
    model, set_backends, install_band, sample, in_bits
):
    in_bits("sage_attn2", 8)
    inputs = {"self_attn_1_type": "sage_attn2", "exact_timesteps": 1, "last_exact_timesteps": 1}
    for patched in (
        install_band(set_backends(model, **inputs), dense_timesteps=2),
        set_backends(install_band(model, dense_timesteps=2), **inputs),
    ):
        sample(patched, steps=STEPS)
        calls = run_history(patched).latest.calls
        by_step = [{c.ran for c in calls if c.step == step and c.layer == 0} for step in range(4)]
        assert by_step == [{"torch_sdpa"}, {"sage_attn2"}, {"sage_attn2"}, {"torch_sdpa"}]
        assert {c.ran for c in calls if c.step == 1} == {"sage_attn2"}
        assert {c.ran for c in calls if c.step == 3 and c.layer} == {"torch"}, "sparse ones stay"


def test_of_several_nodes_each_place_has_the_exact_calls_of_the_one_that_chose_it(
    model, set_backends, sample, in_bits
):
    in_bits("sage_attn2", 8)
    first = f"torch_sdpa (first 3 of {STEPS} steps)"
    one = set_backends(model, self_attn_1_type="sage_attn2", exact_timesteps=3)
    for later in ({}, {"cross_attn_1_type": "sage_attn2"}):
        patched = set_backends(one, **later)
        sample(patched, steps=STEPS)
        assert ran(patched) == {first: 3 * LAYERS, "sage_attn2": LAYERS}, later
    counted = run_history(patched).latest.backend_calls
    assert counted[SITES[1], "sage_attn2"] == STEPS * LAYERS, "it has none of its own"
    again = set_backends(one, self_attn_1_type="sage_attn2")
    sample(again, steps=STEPS)
    assert ran(again) == {"sage_attn2": STEPS * LAYERS}
    kept = set_backends(set_backends(model, self_attn_1_type="sage_attn2"), exact_timesteps=3)
    sample(kept, steps=STEPS)
    assert ran(kept)[first] == 3 * LAYERS, "a node that chooses nothing but them"


def test_where_steps_cannot_be_told_only_what_was_asked_for_is_exact(
    model, set_backends, sample, in_bits
):
    in_bits("sage_attn2", 8)

    def hide(executor, *args, **kwargs):
        (options,) = (x for x in args if isinstance(x, dict) and "sigmas" in x)
        options.pop("sample_sigmas")
        return executor(*args, **kwargs)

    said = "the sampler's schedule is unknown, so exact steps cannot be counted"
    unknown = {f"torch_sdpa ({said})": STEPS * LAYERS}
    for inputs, expected in (
        ({}, {"sage_attn2": STEPS * LAYERS}),
        ({"exact_timesteps": 1}, unknown),
        ({"last_exact_timesteps": 1}, unknown),
    ):
        hidden = model.clone()
        hidden.add_wrapper_with_key("diffusion_model", "a_hides_it", hide)
        patched = set_backends(hidden, self_attn_1_type="sage_attn2", **inputs)
        sample(patched, steps=STEPS)
        assert ran(patched) == expected


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"exact_layers": "first"}, "exact_layers 'first': 'first' is not a layer"),
        ({"exact_layers": "4"}, "layer 4 is outside this model, whose 4 layers are 0 to 3"),
        ({"exact_timesteps": -2}, "exact_timesteps -2: allowed are whole numbers from -1 to 100"),
        ({"last_exact_timesteps": 1.5}, "last_exact_timesteps 1.5: allowed are whole numbers"),
    ],
)
def test_what_is_wrong_is_refused(model, set_backends, inputs, said):
    with pytest.raises(ValueError, match=said):
        set_backends(model, **inputs)


def test_a_layer_list_that_cannot_be_read_is_refused_before_the_graph_runs(comfyui):
    from sparse_video_attention.nodes.backend import SetAttentionBackend

    said = SetAttentionBackend.validate_inputs(exact_layers="one")
    assert said.startswith("exact_layers 'one': 'one' is not a layer")
    assert SetAttentionBackend.validate_inputs(exact_layers="-1, 0-2") is True


def test_layers_of_a_model_that_is_not_known_are_refused(model, set_backends, monkeypatch):
    from sparse_video_attention.patching import backend_choice

    monkeypatch.setattr(backend_choice, "model_family", lambda network: None)
    with pytest.raises(ValueError, match="the layers of a WanModel cannot be counted here"):
        set_backends(model, exact_layers="0")
    set_backends(model, exact_timesteps=1)
