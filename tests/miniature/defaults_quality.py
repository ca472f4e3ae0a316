"""How close the nodes' defaults stay to dense attention on the trained miniatures.

`python -m tests.miniature.defaults_quality` writes down what test_quality_guard.py holds against,
after weights or defaults have changed.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from sparse_video_attention.kernels import BlockPlan

from benchmarks.fine_blocks import SCALE
from benchmarks.quality_metrics import psnr
from benchmarks.quality_sampling import Miniature, Shot
from benchmarks.quality_setting import Setting
from benchmarks.quality_settings import METHODS
from miniature.prompts import PROMPTS
from miniature.weights import weights_path

RECORD = Path(__file__).with_name("defaults_quality.json")
FAMILIES = ("wan", "cogvideox")
SEEDS = (11, 12)
SIZE = (7, 24, 40)
# Where a block is a frame, so that one block off is wrong for radial's mask.
RADIAL_SIZE = (13, 16, 32)
HOW = {"steps": 6, "guidance": 3.0}
PROMPT = PROMPTS[0]
# Over a single disc a block off is lost: among PSA's errors, and in all that Sparge keeps.
BUSY_PROMPT = PROMPTS[3]


@dataclass(frozen=True)
class ShiftedByABlock:
    """A method whose every block of queries gets the key blocks of another one's."""

    own: object

    def __getattr__(self, name):
        return getattr(self.own, name)

    def _shifted(self, plan):
        levels = plan.to_levels().roll(1, -1)
        pooled = plan.block_n in plan.levels and plan.block_n > 8
        return BlockPlan.from_levels(
            levels.masked_fill(levels == plan.block_n, 0) if pooled else levels,
            block_m=plan.block_m,
            block_n=plan.block_n,
            q_len=plan.q_len,
            k_len=plan.k_len,
            pooled_remainder=pooled,
        )

    def static_plan(self, *args, **kwargs):
        return self._shifted(self.own.static_plan(*args, **kwargs))

    def plan(self, *args, **kwargs):
        return self._shifted(self.own.plan(*args, **kwargs))


class ShiftedSetting(Setting):
    def choice(self, model):
        choice = super().choice(model)
        return replace(choice, policy=ShiftedByABlock(choice.policy))


class DefaultsQuality:
    """PSNR in dB of a method at its node's defaults, against dense attention."""

    def __init__(self, comfy, family):
        self._miniature = Miniature(comfy, family, weights_path(family), torch.float32)
        self._dense = {}

    def psnr(self, method, seed, kind=Setting):
        shot = Shot(BUSY_PROMPT, seed, SIZE)
        if method == "radial":
            shot = Shot(PROMPT, seed, RADIAL_SIZE)
        if shot not in self._dense:
            self._dense[shot] = self._miniature.sample(shot, setting=None, **HOW).video
        # Of large blocks so few are left out that their means hide one that is off.
        setting = kind(method, "defaults", block_scale=SCALE if method == "sparge" else 1)
        result = self._miniature.sample(shot, setting=setting, **HOW)
        assert result.sparse_calls and result.density < 1
        return psnr(self._dense[shot], result.video)


def digest(family):
    return hashlib.sha256(weights_path(family).read_bytes()).hexdigest()


def main():
    from benchmarks.wan_model import start_comfyui

    comfy = start_comfyui(None, torch.device("cpu"))
    recorded = {}
    for family in FAMILIES:
        if weights_path(family).is_file():
            quality = DefaultsQuality(comfy, family)
            psnrs = {m: {str(s): round(quality.psnr(m, s), 2) for s in SEEDS} for m in METHODS}
            recorded[family] = {"weights": digest(family), "psnr_db": psnrs}
    RECORD.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
