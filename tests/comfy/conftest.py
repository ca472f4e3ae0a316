"""Fixtures for tests of the patching layer in a real ComfyUI."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from sparse_video_attention.kernels import BlockPlan
from sparse_video_attention.patching import (
    AttentionSettings,
    Schedule,
    SparseChoice,
    install,
    run_history,
)
from sparse_video_attention.patching.plans import TokenOrder
from sparse_video_attention.third_party import DENSE_BACKENDS, Constraints, DenseBackend
from sparse_video_attention.third_party.backend import Loaded

from .schedule_runs import LATENT, Run

# Inputs of SetAttentionBackend.
SITES = ("self_attn_1_type", "cross_attn_1_type", "cross_attn_2_type")


@dataclass(frozen=True)
class BandPolicy:
    """A sparse method as small as can be: blocks within `reach` of the diagonal."""

    reach: int = 1
    reverse: bool = False
    name = "band"
    is_static = True

    def describe(self):
        return f"band (reach {self.reach})"

    def pooling_reason(self):
        return None

    def dense_reason(self, layout):
        return None

    def order(self, layout):
        return torch.arange(layout.num_tokens).flip(0) if self.reverse else None

    def static_plan(self, layout, device):
        block = torch.arange(-(-layout.num_tokens // 64))
        return BlockPlan.from_mask(
            (block[:, None] - block).abs() <= self.reach,
            block_m=64,
            block_n=64,
            q_len=layout.num_tokens,
            k_len=layout.num_tokens,
        ).on_device(device)


def attention_in_band(q, k, v, heads):
    """Dense attention [B, N, heads * D] under the mask of BandPolicy(reach=1)."""
    block = torch.arange(q.shape[1]) // 64
    band = (block[:, None] - block).abs() <= 1
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=band)
    return out.transpose(1, 2).flatten(2)


def relative_error(a, b):
    return float((a - b).norm() / b.norm())


def sparse_calls(model):
    """Of the latest run: those that ran sparse."""
    return [call for call in run_history(model).latest.calls if call.reason is None]


@pytest.fixture(scope="module")
def models(load_model):
    """models(name): a MODEL, the same one all through a file."""
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = load_model(name)
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def band():
    return BandPolicy


@pytest.fixture(scope="session")
def model_of(comfyui):
    from .model_variants import VARIANTS
    from .variant_model import Model

    models = {}

    def load(name):
        if name not in models:
            models[name] = Model(comfyui, VARIANTS[name])
        return models[name]

    return load


@pytest.fixture(scope="session")
def install_band(comfyui):
    """install_band(model, reach=..., **schedule): band attention on a clone of the model."""

    def run(model, *, reach=1, reverse=False, kernel="auto", dense_layers=(0,), **schedule):
        choice = SparseChoice(
            policy=BandPolicy(reach, reverse),
            schedule=Schedule(frozenset(dense_layers), **({"dense_timesteps": 1} | schedule)),
            kernel=kernel,
            min_tokens=0,
        )
        return install(model, AttentionSettings(sparse=choice))

    return run


@pytest.fixture(scope="session")
def patch_radial(comfyui):
    """patch_radial(model, **inputs): the radial node's output, small videos allowed."""
    from sparse_video_attention.nodes.radial import PatchRadialAttention

    def run(model, **inputs):
        inputs = {"min_tokens": 0, "dense_timesteps": 0, "block_size": 64} | inputs
        return PatchRadialAttention.execute(model, **inputs).result[0]

    return run


@pytest.fixture(scope="session")
def set_backends(comfyui):
    """set_backends(model, **inputs): SetAttentionBackend's output."""
    from sparse_video_attention.nodes.backend import SetAttentionBackend

    return lambda model, **inputs: SetAttentionBackend.execute(model, **inputs).result[0]


@pytest.fixture
def fake_backend(monkeypatch):
    """fake_backend(name, **constraints): a backend that computes with torch and keeps its calls."""

    def add(name, attend=None, **constraints):
        calls = []

        def run(q, k, v, *, scale, mask):
            calls.append((q.shape, k.shape, mask))
            if attend is not None:
                return attend(q, k, v)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

        declared = Constraints(**({"device_types": None, "dtypes": None} | constraints))
        backend = DenseBackend(name=name, declared=declared, load=lambda: Loaded(run))
        monkeypatch.setitem(DENSE_BACKENDS, name, backend)
        return calls

    return add


@pytest.fixture(scope="module")
def comfy_nodes(comfyui):
    """ComfyUI's own nodes by the names they have in graphs."""
    from comfy_extras import nodes_custom_sampler as custom

    import nodes

    class Nodes:
        KSamplerAdvanced = nodes.KSamplerAdvanced
        SplitSigmas = custom.SplitSigmas
        FlipSigmas = custom.FlipSigmas
        BasicScheduler = custom.BasicScheduler
        KSamplerSelect = custom.KSamplerSelect
        CFGGuider = custom.CFGGuider
        RandomNoise = custom.RandomNoise
        DisableNoise = custom.DisableNoise
        SamplerCustomAdvanced = custom.SamplerCustomAdvanced

    return Nodes


@pytest.fixture(scope="module")
def conditioning():
    """One prompt's, as nodes hand it on."""
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(1, 20, 4096, generator=generator), {}]]


@pytest.fixture
def sample_custom(comfyui, conditioning):
    """sample_custom(model, sigmas): sampler "euler" or another on a schedule; the Run."""
    from comfy.samplers import ksampler

    def sample(model, sigmas, sampler="euler", **options):
        run = Run(model)
        comfyui.sample.sample_custom(
            run.model,
            torch.randn(LATENT, generator=torch.Generator().manual_seed(1)),
            1.0,
            ksampler(sampler, options),
            torch.tensor(sigmas),
            conditioning,
            conditioning,
            torch.zeros(LATENT),
            disable_pbar=True,
            seed=3,
        )
        return run

    return sample


@pytest.fixture
def moves(monkeypatch):
    """How often tokens were moved, into a method's order and back, since the last time asked."""
    counts = {"reorder": 0, "restore": 0}
    for name in counts:
        original = getattr(TokenOrder, name)

        def counted(self, x, name=name, original=original):
            counts[name] += 1
            return original(self, x)

        monkeypatch.setattr(TokenOrder, name, counted)

    def since():
        found = dict(counts)
        counts.update(reorder=0, restore=0)
        return found

    return since


@pytest.fixture
def run_shuffled(sample, moves):
    """run_shuffled(model, prepare...): (video, moves, MODEL), its tokens shuffled."""
    from .shuffled_runs import STEPS, shuffled

    def run(model, *prepare, **how):
        moves()
        patched = shuffled(model)
        for step in prepare:
            patched = step(patched) or patched
        return sample(patched, steps=STEPS, **how), moves(), patched

    return run


@pytest.fixture
def run_per_call(run_shuffled):
    """run_per_call(model, prepare...): the video where the tokens of each call are shuffled."""
    from .shuffled_runs import PER_CALL, look_at_tokens

    def run(model, *prepare, **how):
        out, moved, _ = run_shuffled(model, look_at_tokens, *prepare, **how)
        assert moved == PER_CALL
        return out

    return run


def patch(model, name, **inputs):
    """The output of one of this pack's nodes, by its name."""
    from sparse_video_attention.nodes.extension import NODES

    (node,) = [node for node in NODES if node.__name__ == name]
    return node.execute(model, **inputs).result[0]


@pytest.fixture
def preview(comfyui, tmp_path, monkeypatch):
    """preview(model, shape or samples, **inputs): (picture uint8 [H, W, 3], density, gain, text)"""
    import folder_paths
    from sparse_video_attention.nodes.preview import PreviewAttentionMask

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))

    def run(model, given, **inputs):
        samples = given if isinstance(given, dict) else {"samples": torch.zeros(given)}
        out = PreviewAttentionMask.execute(model, samples, **inputs)
        (shown,) = out.ui["images"]
        assert (tmp_path / shown["subfolder"] / shown["filename"]).is_file()
        picture, density, gain = out.result
        assert picture.dtype == torch.float32 and picture.shape[0] == 1 and picture.shape[3] == 3
        (text,) = out.ui["text"]
        return (picture[0] * 255).round().byte().numpy(), density, gain, text

    return run
