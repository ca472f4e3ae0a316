"""The counted speeds, against operations added up step by step and layer by layer."""

from dataclasses import replace

import pytest

from benchmarks.counted import counted_table, density, nodes, runs, speedup
from benchmarks.node_defaults import SPARGE_POLICY

# (layers, operations of a token besides attention) by model, from their configurations.
WIDTHS = {"WAN 14B": 5120, "WAN 2.1 1.3B": 1536, "WAN 2.2 5B": 3072, "CogVideoX 1.5 5B": 3072}
FFN = {"WAN 14B": 13824, "WAN 2.1 1.3B": 8960, "WAN 2.2 5B": 14336, "CogVideoX 1.5 5B": 4 * 3072}
LAYERS = {"WAN 14B": 40, "WAN 2.1 1.3B": 30, "WAN 2.2 5B": 30, "CogVideoX 1.5 5B": 42}
# Dense steps of 4, 20 and 30; one layer is dense.
DENSE_STEPS = {
    "Sparge at its defaults": {4: 1, 20: 1, 30: 1},
    "where smaller blocks are faster": {4: 1, 20: 1, 30: 1},
    "`topk` 0.3": {4: 1, 20: 1, 30: 1},
    "`topk` 0.5": {4: 1, 20: 1, 30: 1},
    "`topk` 0.3, no dense steps": {4: 0, 20: 0, 30: 0},
    "PSA, closest preset": {4: 1, 20: 5, 30: 7},
    "Radial at its defaults": {4: 1, 20: 5, 30: 7},
}


def operations(model, tokens, kept):
    """Multiply-adds of a layer."""
    width = WIDTHS[model]
    attention = 2 * tokens * tokens * width * kept
    own_projections = 4 * width * width
    feed_forward = 2 * width * FFN[model]
    cross = 0 if model.startswith("Cog") else 2 * width * width + 2 * 512 * width
    return attention + tokens * (own_projections + feed_forward + cross)


@pytest.mark.parametrize(
    "run", list(runs()), ids=lambda run: f"{run.model.name} {run.video} {run.steps}"
)
def test_a_speedup_is_the_quotient_of_all_operations(run):
    model, tokens = run.model.name, run.layout.num_tokens
    for node in nodes(run.model.family):
        policy = node.policy
        if node.in_halves and model != "WAN 2.2 5B":  # whose frames are small
            policy = replace(SPARGE_POLICY, topk=0.12, block_m=64, block_n=32)
            policy = replace(policy, halves_in_small_frames=False, halves_if_faster=False)
        kept, total = density(policy, run.layout), 0.0
        for step in range(run.steps):
            for layer in range(LAYERS[model]):
                whole = step < DENSE_STEPS[node.name][run.steps] or layer == 0
                total += operations(model, tokens, 1.0 if whole else kept)
        dense = run.steps * LAYERS[model] * operations(model, tokens, 1.0)
        assert speedup(run, node) == pytest.approx(dense / total, rel=1e-6)


def test_tokens_are_those_of_the_videos():
    for run in runs():
        width, height, frames = map(int, run.video.split("x"))
        patch = 32 if run.model.name == "WAN 2.2 5B" else 16
        of_cogvideox = run.model.name == "CogVideoX 1.5 5B"
        # Latent frames in pairs, one of which stands before those of the video.
        latent = (frames - 1) // 4 + 1
        tokens = (latent + 1) // 2 if of_cogvideox else latent
        video = tokens * (width // patch) * (height // patch)
        assert run.layout.num_tokens == video + (226 if of_cogvideox else 0)


def test_a_line_has_the_share_of_attention_and_every_node():
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in counted_table().splitlines()
    ]
    assert lines[0][3:] == list(DENSE_STEPS)
    (line,) = [line for line in lines if line[:2] == ["WAN 14B, 1280x720x81", "20"]]
    assert line[2] == "72 %" and line[3:5] == ["2.1x", "2.3x"]
