"""Which frame a call is of, where attention comes frame by frame."""

from dataclasses import dataclass

import pytest
import torch
from sparse_video_attention.kernels import BlockPlan, TokenLayout
from sparse_video_attention.patching.frame_calls import FrameCalls, frame_plans
from sparse_video_attention.radial_attn import RadialPolicy

LAYOUT = TokenLayout(4, 10, 20)
FRAME, VIDEO = 200, 800


def plans():
    return frame_plans(RadialPolicy(skipped_blocks="drop"), LAYOUT, torch.device("cpu"))


def test_a_plan_per_frame_keeps_what_radial_keeps_and_all_of_the_pose():
    found = plans().calls
    assert [(plan.q_len, plan.k_len) for plan in found] == [(FRAME, VIDEO)] + [
        (FRAME, VIDEO + FRAME)
    ] * 3
    whole = RadialPolicy(skipped_blocks="drop").static_plan(LAYOUT, "cpu").to_levels()[0, 0] > 0
    for frame, plan in enumerate(found):
        kept = plan.to_levels()[0, 0] > 0
        # Key blocks without a token of the pose are as in the whole mask, by rows that overlap.
        inside = VIDEO // 128
        rows = {(frame * FRAME + at) // 128 for at in range(128)}
        assert torch.equal(kept[0, :inside], whole[sorted(rows), :inside].any(0))
        if frame:
            assert kept[:, inside:].all()


def test_frames_come_in_order_layer_by_layer():
    made = plans()
    calls, found = FrameCalls(made), made.calls
    for layer in (0, 1, 5):
        assert calls.plan(layer, VIDEO) is found[0]
        for plan in found[1:]:
            assert calls.plan(layer, VIDEO + FRAME) is plan
    # Again the same layer: a second forward of the model inside one.
    assert calls.plan(5, VIDEO) is found[0]
    assert calls.plan(5, VIDEO + FRAME) is found[1]


def test_calls_that_come_otherwise_have_no_plan():
    calls = FrameCalls(plans())
    assert calls.plan(0, VIDEO + FRAME) is None, "the first frame has no pose"
    assert calls.plan(0, VIDEO + FRAME) is None, "whose frame this is, is not known"
    assert calls.plan(1, VIDEO) is not None
    assert calls.plan(1, VIDEO + 1) is None
    calls.plan(2, VIDEO)
    for _ in range(3):
        assert calls.plan(2, VIDEO + FRAME) is not None
    assert calls.plan(2, VIDEO + FRAME) is None, "a frame too many"


def test_frames_behind_the_first_keep_what_is_pooled_layer_by_layer():
    calls, found = FrameCalls(plans()), []
    for layer in (0, 1, 1):
        calls.plan(layer, VIDEO)
        assert calls.kept is None, "the first frame's keys are in a place of their own"
        calls.plan(layer, VIDEO + FRAME)
        found.append(calls.kept)
        for _ in range(2):
            calls.plan(layer, VIDEO + FRAME)
            assert calls.kept is found[-1] is not None
        calls.plan(layer, VIDEO + FRAME)
        assert calls.kept is None, "a frame too many"
    assert len(set(map(id, found))) == 3


def test_nothing_is_kept_where_the_pose_may_be_pooled():
    made = plans()
    assert not made.pools_pose
    calls = FrameCalls(made._replace(pools_pose=True))
    calls.plan(0, VIDEO)
    assert calls.plan(0, VIDEO + FRAME) is made.calls[1]
    assert calls.kept is None


@dataclass(frozen=True)
class PoolsOneBlock(RadialPolicy):
    """Everything but one key block, and that by its mean."""

    column: int = 0

    def static_plan(self, layout, device):
        blocks = -(-layout.num_tokens // 128)
        mask = torch.arange(blocks).expand(blocks, -1) != self.column
        tokens = {"q_len": layout.num_tokens, "k_len": layout.num_tokens}
        return BlockPlan.from_mask(mask, block_m=128, block_n=128, pooled_remainder=True, **tokens)


# Video and pose meet in block 6, of tokens 768 to 895; the pose ends in block 7.
@pytest.mark.parametrize("column, pools_pose", [(0, False), (5, False), (6, True), (7, True)])
def test_a_policy_that_pools_the_pose_is_seen(column, pools_pose):
    made = frame_plans(PoolsOneBlock(column=column), LAYOUT, torch.device("cpu"))
    assert made.pools_pose == pools_pose


@pytest.mark.parametrize("skipped", ["pool", "weighted"])
def test_radial_does_not_pool_the_pose(skipped):
    for block in (64, 128):
        policy = RadialPolicy(block_size=block, skipped_blocks=skipped)
        assert not frame_plans(policy, LAYOUT, torch.device("cpu")).pools_pose


def test_frames_have_means_weighted_for_their_own_queries():
    plain, weighted = (
        frame_plans(RadialPolicy(64, skipped_blocks=skipped), LAYOUT, torch.device("cpu")).calls
        for skipped in ("pool", "weighted")
    )
    assert [plan.pool_rows for plan in plain] == [0] * 4
    assert [plan.pool_rows for plan in weighted] == [4] * 4
    for one, other in zip(plain, weighted, strict=True):
        assert torch.equal(one.to_levels(), other.to_levels())
