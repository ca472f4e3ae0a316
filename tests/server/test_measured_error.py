"""Measure Attention Error in a graph of the server."""

import re

import torch

from demo.comparison import pack_lines
from demo.frames import load_latent
from demo.workflow import PATCH

# A few hundred tokens, sparse nevertheless.
QUICK = {"steps": 3, "min_tokens": 0, "dense_timesteps": 1, "block_size": 64}


def test_errors_come_with_the_same_latent(run, tiny):
    plain = tiny(**QUICK, seed=31)
    measured = plain.setting()
    patch = measured.nodes[measured.find(PATCH)]["inputs"]
    inputs = {"model": patch["model"]}
    measured.nodes["measure"] = {"class_type": "MeasureAttentionError", "inputs": inputs}
    patch["model"] = ["measure", 0]
    done, expected = run(measured), run(plain)
    latents = [load_latent(each.files["latent"][0]) for each in (done, expected)]
    assert torch.equal(*latents)
    (line,), (without,) = pack_lines(done.log), pack_lines(expected.log)
    (error,) = re.findall(r"error against full attention (0\.\d{3}) \(largest: layer 1 ", line)
    assert 0.001 < float(error) < 1 and "error" not in without
