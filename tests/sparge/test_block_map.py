"""The block map against the published one and against its definition written out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sparse_video_attention.sparge import block_map
from sparse_video_attention.sparge.statistics import torch_block_statistics

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "sparge_maps.npz")
CASES = json.loads(str(GOLDEN["cases"]))


def tokens(batch, heads, length, head_dim, seed, dtype=torch.float32, blocks_alike=0.7):
    """Tokens that change slowly, so that some blocks are self-similar and some are not."""
    gen = torch.Generator().manual_seed(seed)
    walk = torch.randn(batch, heads, length // 32 + 2, head_dim, generator=gen)
    slow = torch.nn.functional.interpolate(walk.flatten(0, 1).mT, size=length, mode="linear").mT
    slow = slow.reshape(batch, heads, length, head_dim)
    noise = torch.randn(batch, heads, length, head_dim, generator=gen)
    noisy = (torch.rand(batch, heads, length // 64 + 1, 1, generator=gen) > blocks_alike).float()
    noisy = noisy.repeat_interleave(64, dim=2)[:, :, :length]
    return (2 * slow + noise * (0.3 + 6 * noisy)).to(dtype)


def is_self_similar(block, block_size, threshold):
    if len(block) < block_size:
        return False
    cosines = torch.nn.functional.cosine_similarity(block[:, None], block[None], dim=-1)
    return bool(cosines.mean() > threshold)


def map_by_definition(q, k, block_q, block_k, simthreshd1, cdfthreshd=None, topk=None, sink=False):
    """One sample and head, q and k [N, D] in float64, block by block."""
    q_blocks, k_blocks = q.split(block_q), k.split(block_k)
    k_alike = [is_self_similar(block, block_k, simthreshd1) for block in k_blocks]
    kept = torch.zeros(len(q_blocks), len(k_blocks), dtype=torch.bool)
    for i, q_block in enumerate(q_blocks):
        scores = {
            j: float(q_block.mean(0) @ k_block.mean(0)) / q.shape[1] ** 0.5
            for j, k_block in enumerate(k_blocks)
            if k_alike[j]
        }
        ranked = sorted(scores, key=lambda j: -scores[j])
        if topk is not None:
            count = int(topk * len(k_blocks))
        else:
            weights = torch.tensor([scores[j] for j in ranked]).double().softmax(0)
            count = int((weights.cumsum(0) <= cdfthreshd).sum())
        kept[i, ranked[: max(1, count)]] = True
        if not is_self_similar(q_block, block_q, simthreshd1):
            kept[i] = True
    kept[:, [j for j, alike in enumerate(k_alike) if not alike]] = True
    if sink:
        kept[:, 0] = True
    return kept


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: f"published-{i}")
def test_equals_the_published_map(index):
    q, k = (torch.from_numpy(GOLDEN[f"{name}_{index}"]) for name in "qk")
    kept = block_map(q, k, **CASES[index])
    assert torch.equal(kept, torch.from_numpy(GOLDEN[f"map_{index}"]))


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: f"published-{i}")
def test_needs_no_contiguous_input(index):
    q, k = (torch.from_numpy(GOLDEN[f"{name}_{index}"]) for name in "qk")
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    assert torch.equal(block_map(*token_major, **CASES[index]), block_map(q, k, **CASES[index]))


@pytest.mark.parametrize(
    ("q_len", "k_len", "blocks", "how"),
    [
        (512, 512, (128, 64), {"topk": 0.3}),
        (777, 1000, (64, 64), {"topk": 0.5}),
        (640, 640, (64, 128), {"cdfthreshd": 0.6}),
        (500, 1111, (128, 32), {"cdfthreshd": 0.9}),
        (100, 100, (128, 64), {"topk": 0.01}),
        (512, 700, (128, 64), {"topk": 0.2, "sink": True}),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_equals_its_definition(q_len, k_len, blocks, how):
    q, k = tokens(2, 3, q_len, 32, seed=1), tokens(2, 3, k_len, 32, seed=2)
    thresholds = [0.2, -0.5, 0.6]
    arguments = {"attention_sink" if key == "sink" else key: value for key, value in how.items()}
    kept = block_map(
        q, k, block_q=blocks[0], block_k=blocks[1], simthreshd1=thresholds, **arguments
    )
    for b in range(2):
        for h, threshold in enumerate(thresholds):
            truth = map_by_definition(q[b, h].double(), k[b, h].double(), *blocks, threshold, **how)
            assert torch.equal(kept[b, h], truth), (b, h)
    if q_len > 500:
        assert 0 < kept.float().mean() < 1  # the comparison saw both kept and skipped blocks


@pytest.mark.parametrize("how", [{"topk": [0.1, 0.8]}, {"cdfthreshd": [0.3, 0.95]}], ids=str)
def test_thresholds_per_head_are_those_of_each_head_alone(how):
    q, k = tokens(2, 2, 1024, 32, seed=3), tokens(2, 2, 1024, 32, seed=4)
    together = block_map(q, k, simthreshd1=[0.1, -0.9], **how)
    ((name, values),) = how.items()
    for h in range(2):
        alone = block_map(
            q[:, h : h + 1], k[:, h : h + 1], simthreshd1=(0.1, -0.9)[h], **{name: values[h]}
        )
        assert torch.equal(together[:, h], alone[:, 0])
    as_tensors = block_map(
        q, k, simthreshd1=torch.tensor([0.1, -0.9]), **{name: torch.tensor(values)}
    )
    assert torch.equal(as_tensors, together)


@pytest.mark.parametrize("how", [{"topk": 0.4}, {"cdfthreshd": 0.7}], ids=str)
def test_small_chunks_change_nothing(how, monkeypatch):
    q, k = tokens(1, 2, 2000, 32, seed=5), tokens(1, 2, 2000, 32, seed=6)
    whole = block_map(q, k, simthreshd1=0.2, **how)
    monkeypatch.setattr("sparse_video_attention.sparge.dynamic_map.CHUNK_SCORES", 100)
    monkeypatch.setattr("sparse_video_attention.sparge.statistics.CHUNK_ELEMENTS", 1000)
    assert torch.equal(block_map(q, k, simthreshd1=0.2, **how), whole)


@pytest.mark.parametrize("how", [{"topk": 0.4}, {"cdfthreshd": 0.7}], ids=str)
def test_a_host_under_autocast_gets_the_same_map(how):
    q, k = tokens(1, 2, 6400, 64, seed=5).bfloat16(), tokens(1, 2, 6400, 64, seed=6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = block_map(q, k, simthreshd1=-1.0, **how)
    assert torch.equal(found, block_map(q, k, simthreshd1=-1.0, **how))


@pytest.mark.parametrize("shape", [(1, 2, 300, 64), (2, 1, 256, 24)], ids=str)
def test_statistics_are_the_mean_and_the_mean_pairwise_cosine(shape):
    x = tokens(*shape, seed=7)
    center = x.mean(dim=2, keepdim=True)
    found = torch_block_statistics(x, 64, center)
    for n, block in enumerate((x - center).double().split(64, dim=2)):
        torch.testing.assert_close(found.mean[:, :, n], block.mean(2).float())
        if block.shape[2] < 64:
            assert found.similarity[:, :, n].isnan().all()
            continue
        cosines = torch.nn.functional.cosine_similarity(
            block[:, :, :, None], block[:, :, None], dim=-1
        )
        torch.testing.assert_close(found.similarity[:, :, n], cosines.mean((2, 3)).float())


@pytest.mark.parametrize("groups", [None, (16, 8)], ids=["block-means", "group-means"])
def test_key_mean_changes_what_is_self_similar_but_not_how_blocks_rank(groups):
    q, k = tokens(1, 1, 1024, 32, seed=8), tokens(1, 1, 1024, 32, seed=9)
    shifted = k + 50  # keys that all point one way: every block looks self-similar
    how = {"simthreshd1": 0.3, "topk": 0.25, "groups": groups}
    kept = block_map(q, shifted, **how, subtract_key_mean=True)
    center = shifted.mean(dim=2, keepdim=True)
    assert torch.equal(kept, block_map(q, shifted - center, **how))
    assert not torch.equal(kept, block_map(q, shifted, **how))


def test_a_nan_token_keeps_its_row_and_column():
    q, k = tokens(1, 1, 512, 32, seed=10), tokens(1, 1, 512, 32, seed=11)
    q[0, 0, 130], k[0, 0, 200] = torch.nan, torch.nan
    kept = block_map(q, k, simthreshd1=-1.0, topk=0.01)[0, 0]
    assert kept[1].all() and kept[:, 3].all()
    assert not kept.all()


def test_scratch_does_not_grow_with_the_sequence():
    """A map of 32768 tokens; N x N of anything would be 4 GiB."""
    import resource

    q = tokens(1, 1, 32768, 16, seed=12, dtype=torch.bfloat16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = block_map(q, q, simthreshd1=-1.0, cdfthreshd=0.5)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kept.shape == (1, 1, 256, 512) and grown < 400 * 1024


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"simthreshd1": 0.1}, "exactly one of cdfthreshd and topk; got neither"),
        ({"simthreshd1": 0.1, "topk": 0.5, "cdfthreshd": 0.5}, "exactly one of"),
        ({"simthreshd1": float("nan"), "topk": 0.5}, "simthreshd1 is between -inf and inf"),
        ({"simthreshd1": 0.1, "topk": 1.5}, "topk is between 0 and 1; got 1.5"),
        ({"simthreshd1": 0.1, "cdfthreshd": [0.5, -1.0]}, "cdfthreshd is between 0 and 1; got -1"),
        ({"simthreshd1": [0.1], "topk": 0.5}, "simthreshd1 has 1 values where the call has 2"),
        ({"simthreshd1": torch.zeros(3), "topk": 0.5}, "each of the 2 heads"),
        ({"simthreshd1": torch.zeros(2, dtype=torch.int64), "topk": 0.5}, "float tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_thresholds_are_a_sentence(arguments, sentence):
    x = tokens(1, 2, 256, 16, seed=13)
    with pytest.raises(ValueError, match=sentence):
        block_map(x, x, **arguments)


def test_a_sum_of_one_keeps_every_block():
    """Also where the weights of a row add up to a little more, as they do in float32."""
    gen = torch.Generator().manual_seed(5)
    q, k = (torch.randn(2, 3, n, 32, generator=gen) * 3 for n in (512, 1024))
    assert block_map(q, k, block_q=64, block_k=32, simthreshd1=-1.0, cdfthreshd=1.0).all()
