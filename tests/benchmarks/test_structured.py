"""The inputs of python -m benchmarks.methods: heads of several kinds, content, text."""

import pytest
import torch
from sparse_video_attention.kernels import TokenLayout

from benchmarks.structured import HEAD_KINDS, structured_inputs


def mean_logits(head, chosen):
    """Mean logit over the pairs of tokens for which chosen(frames, rows, columns apart) holds."""
    layout = TokenLayout(8, 12, 16)
    q, k, _ = structured_inputs(layout, len(HEAD_KINDS), 64, seed=3).heads_first()
    place = torch.cartesian_prod(torch.arange(8), torch.arange(12), torch.arange(16))
    apart = (place[:, None] - place).abs().unbind(-1)
    logits = q[0, head] @ k[0, head].T / 8.0
    return float(logits[chosen(*apart)].mean())


NEAR_AND_FAR = {
    "local": (lambda t, y, x: t + y + x <= 1, lambda t, y, x: t + y + x >= 12),
    "spatial": (lambda t, y, x: (t == 0) & (y + x <= 2), lambda t, y, x: (t >= 3) & (y + x <= 2)),
    "temporal": (lambda t, y, x: (t >= 3) & (y + x == 0), lambda t, y, x: (t == 0) & (y + x >= 8)),
}


@pytest.mark.parametrize("kind", NEAR_AND_FAR)
def test_heads_see_what_their_kind_says(kind):
    near, far = NEAR_AND_FAR[kind]
    head = [found.name for found in HEAD_KINDS].index(kind)
    assert mean_logits(head, near) > mean_logits(head, far) + 2.0


def test_content_repeats_at_distant_places():
    layout = TokenLayout(8, 24, 32)
    q, k, _ = structured_inputs(layout, len(HEAD_KINDS), 64, seed=3).heads_first()
    head = [found.name for found in HEAD_KINDS].index("content")
    logits = (q[0, head] @ k[0, head].T / 8.0).view(8, 24, 32, 8, 24, 32)
    # The first rows against the last ones: places matter no more, alike content still does.
    # Noise alone comes to about 1.3.
    far = logits[:, :4, :, :, -4:].flatten(0, 2).flatten(1)
    assert float((far - far.mean(1, keepdim=True)).amax(1).mean()) > 2.3


def test_text_tokens_have_no_structure():
    layout = TokenLayout(2, 8, 8, prefix_tokens=200)
    q, k, _ = structured_inputs(layout, 1, 64).heads_first()
    text_q, text_k = q[0, 0, :200], k[0, 0, :200] - k[0, 0, :200].mean(0)
    cosines = torch.nn.functional.normalize(text_q, dim=-1) @ (
        torch.nn.functional.normalize(text_k, dim=-1).T
    )
    assert float(cosines.std()) == pytest.approx(64**-0.5, rel=0.1)
    assert abs(float(cosines.mean())) < 0.05
