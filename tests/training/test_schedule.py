"""The schedule of the learning rates."""

from __future__ import annotations

import numpy as np
import pytest

from flashlm_numba.model.config import OptimizerConfig
from flashlm_numba.training.schedule import lr_scale


def test_lr_scale_warms_up_stays_and_decays():
    config = OptimizerConfig(warmup_steps=200, warmdown_ratio=0.1)
    scale = [lr_scale(step, 10_000, config) for step in range(10_001)]
    assert scale[0] == 1 / 200
    assert scale[198] < 1
    assert set(scale[199:9_001]) == {1.0}
    np.testing.assert_allclose(scale[9_001:], np.arange(999, -1, -1) / 1_000, atol=1e-12)
    assert lr_scale(10**9, 10_000, config) == 0


def test_lr_scale_without_ramps_is_one():
    config = OptimizerConfig(warmup_steps=0, warmdown_ratio=0.0)
    assert {lr_scale(step, 10, config) for step in (0, 5, 9, 10, 11)} == {1.0}


def test_lr_scale_of_ramps_that_meet_is_the_lower_one():
    config = OptimizerConfig(warmup_steps=8, warmdown_ratio=1.0)
    assert [lr_scale(step, 4, config) for step in range(5)] == [1 / 8, 2 / 8, 3 / 8, 1 / 4, 0]


def test_lr_scale_of_a_halved_cosine_is_halved_in_the_middle_and_ends_at_zero():
    config = OptimizerConfig(warmup_steps=10, schedule="halved-cosine")
    scale = [lr_scale(step, 1_000, config) for step in range(1_001)]
    np.testing.assert_allclose(scale[:10], np.arange(1, 11) / 10, atol=2e-4)
    cosine = 0.5 + 0.5 * np.cos(np.pi * np.arange(1_001) / 1_000)
    np.testing.assert_allclose(scale[10:500], cosine[10:500])
    np.testing.assert_allclose(scale[500:], cosine[500:] / 2, atol=1e-15)
    assert lr_scale(10**9, 1_000, config) == pytest.approx(0, abs=1e-15)
