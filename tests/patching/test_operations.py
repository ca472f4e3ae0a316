"""Which layers may run sparse, as the preview counts them."""

from types import SimpleNamespace

import pytest
from sparse_video_attention.patching.operations import layer_calls
from sparse_video_attention.patching.schedule import Schedule

PLAIN = SimpleNamespace(blocks=range(4))
# Its own two blocks hang on layers 0 and 2.
VACE = SimpleNamespace(blocks=range(4), vace_layers_mapping={0: 0, 2: 1})


@pytest.mark.parametrize(
    ("net", "dense_layers", "dense_vace_blocks", "calls"),
    [
        (PLAIN, {0}, False, (3, 4)),
        (PLAIN, {0}, True, (3, 4)),
        (VACE, {0}, False, (4, 6)),
        (VACE, {1, 3}, False, (4, 6)),
        (VACE, {0, 2}, False, (2, 6)),
        (VACE, {0}, True, (3, 6)),
        (VACE, (), True, (4, 6)),
    ],
)
def test_vaces_own_blocks_are_dense_with_the_layer_they_hang_on_or_all(
    net, dense_layers, dense_vace_blocks, calls
):
    schedule = Schedule(frozenset(dense_layers), dense_vace_blocks=dense_vace_blocks)
    assert layer_calls(net, schedule) == calls
