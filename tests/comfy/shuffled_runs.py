"""A sparse method that shuffles tokens, and how it is run beside other packs' patches."""

from dataclasses import dataclass

import torch
from sparse_video_attention.patching import AttentionSettings, Schedule, SparseChoice, install

from .conftest import BandPolicy

STEPS = 2
FORWARDS = STEPS - 1  # both of guidance at once; the first step is dense
LAYERS = 4

# What is moved into the order and back: the tokens and the rotary positions once, or q, k, v and
# the output of each of three sparse layers.
WHOLE = {"reorder": 2 * FORWARDS, "restore": FORWARDS}
PER_CALL = {"reorder": 9 * FORWARDS, "restore": 3 * FORWARDS}


@dataclass(frozen=True)
class ShuffledBand(BandPolicy):
    """A band of tokens in an order that leaves no frame and no block together."""

    def order(self, layout):
        return torch.randperm(layout.num_tokens, generator=torch.Generator().manual_seed(1))


def shuffled(model):
    schedule = Schedule(frozenset({1}), dense_timesteps=1)
    choice = SparseChoice(ShuffledBand(), schedule, min_tokens=0)
    return install(model, AttentionSettings(sparse=choice))


def look_at_tokens(patched):
    """A patch of another pack, which does nothing but might."""
    patched.set_model_attn2_patch(lambda args: args["x"])


def inside(wrapper):
    """A wrapper of another pack that runs inside this pack's."""
    return lambda patched: patched.add_wrapper_with_key("diffusion_model", "zz_inside", wrapper)


def options_of(args):
    return next(value for value in args if isinstance(value, dict))
