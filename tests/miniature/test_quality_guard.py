"""On trained attention the nodes' defaults stay as close to dense attention as they were."""

import json

import pytest

from .defaults_quality import (
    FAMILIES,
    METHODS,
    RECORD,
    SEEDS,
    DefaultsQuality,
    ShiftedSetting,
    digest,
)

pytestmark = pytest.mark.comfy

TOLERANCE_DB = 1.0
RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def quality(comfyui, family):
    return DefaultsQuality(comfyui, family)


def test_what_is_recorded_is_of_these_weights(family):
    again = "python -m tests.miniature.defaults_quality records it anew"
    assert RECORDED[family]["weights"] == digest(family), again


@pytest.mark.parametrize("method", METHODS)
def test_defaults_stay_as_close_to_dense_as_they_were(quality, family, method):
    recorded = RECORDED[family]["psnr_db"][method]
    for seed in SEEDS:
        assert quality.psnr(method, seed) > recorded[str(seed)] - TOLERANCE_DB


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_that_is_a_block_off_does_not_pass(quality, family, method):
    recorded = RECORDED[family]["psnr_db"][method][str(SEEDS[0])]
    assert quality.psnr(method, SEEDS[0], ShiftedSetting) < recorded - TOLERANCE_DB
