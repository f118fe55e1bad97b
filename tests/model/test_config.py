"""The dataclasses of settings: documented, and hashed as far as weights depend on them."""

import dataclasses
import inspect
from pathlib import Path

import pytest

from flashlm_numba.model import config
from flashlm_numba.model.config import Phase, RunConfig
from flashlm_numba.model.recipes import from_recipe
from flashlm_numba.model.settings import with_settings


def test_every_field_has_a_comment():
    for kind in (config.ModelConfig, config.HeadConfig, config.OptimizerConfig, config.TrainingConfig, Phase):
        lines = inspect.getsource(kind).splitlines()
        for item in dataclasses.fields(kind):
            assert any(line.startswith(f"    {item.name}: ") and "  # " in line for line in lines), item.name


def test_every_setting_is_in_the_manual():
    manual = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    for kind in (config.ModelConfig, config.HeadConfig, config.OptimizerConfig, config.TrainingConfig):
        for item in dataclasses.fields(kind):
            assert f"`{item.name}`" in manual, item.name


@pytest.mark.parametrize(("setting", "same"), [("adamw_lr=1", True), ("dim=32", False), ("tree_rank=5", False)])
def test_model_hash_covers_the_model_and_its_head(setting, same):
    run = from_recipe("default")
    assert (with_settings(run, [setting]).model_hash == run.model_hash) == same


def test_tokens_until_counts_every_phase():
    run = with_settings(RunConfig(), ["phases=10:2x8x2,20:2x16,4x16"])
    assert [run.tokens_until(step) for step in (0, 1, 10, 11, 20, 21)] == [0, 32, 320, 352, 640, 704]
    assert [run.phase_at(step).seq_len for step in (1, 10, 11, 21)] == [8, 8, 16, 16]
