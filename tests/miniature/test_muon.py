"""Muon: what it makes of gradients, against the definition."""

import pytest
import torch

from miniature.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 48, 16), (2, 16, 48)], ids=str)
def test_singular_values_go_to_about_one_and_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    done = orthogonalise(matrices)
    turned = u.mT @ done @ vh.mT
    values = turned.diagonal(dim1=-2, dim2=-1)
    # Small ones take more steps.
    tenth = torch.linalg.svdvals(matrices) > 0.1 * torch.linalg.matrix_norm(matrices, 2)[:, None]
    assert values[tenth].min() > 0.5 and values.max() < 1.3
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-3


def test_momentum_is_nesterov_s_and_every_element_moves_alike():
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.zeros(32, 16))
    gradients = [torch.randn(32, 16, generator=generator) for _ in range(2)]
    muon = Muon([weight], lr=0.1, momentum=0.9)
    buffer, expected = torch.zeros(32, 16), torch.zeros(32, 16)
    for gradient in gradients:
        weight.grad = gradient.clone()
        muon.step()
        buffer = 0.9 * buffer + 0.1 * gradient
        expected -= 0.1 * 2**0.5 * orthogonalise(0.1 * gradient + 0.9 * buffer)
    assert torch.allclose(weight, expected, atol=1e-5)


def test_weights_decay_by_their_share():
    weight = torch.nn.Parameter(torch.ones(8, 8))
    weight.grad = torch.zeros(8, 8)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(weight, torch.tensor(0.95))
