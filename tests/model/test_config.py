"""Settings: recipes, --set, config.json, plans in steps."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.model import config
from flashlm_numba.model.config import RECIPES, Phase, RunConfig, plan_for
from flashlm_numba.system.errors import UserError


def test_v3_recipe_is_the_published_one():
    v3 = RunConfig.recipe_named("v3")
    shape = [(p.last_step, p.rows, p.length, p.grad_accum, p.frozen) for p in v3.training.phases]
    assert shape == [
        (1_000, 4, 64, 4, True),
        (4_000, 4, 128, 4, False),
        (7_000, 4, 256, 8, False),
        (10_000, 4, 512, 8, False),
    ]
    assert (v3.head.name, v3.head.loss_fraction, v3.head.label_smoothing, v3.head.z_loss) == (
        "dense",
        0.25,
        0.1,
        1e-4,
    )
    assert (v3.optimizer.normuon, v3.optimizer.normuon_lr, v3.optimizer.adamw_lr) == ("v3", 0.02, 3e-4)
    assert (v3.optimizer.weight_decay, v3.optimizer.clip, v3.optimizer.warmup_steps) == (0.1, 1.0, 200)
    assert v3.training.ema == 0.999
    plan = plan_for(v3, steps=50).plan
    assert (plan.steps, plan.schedule_steps) == (50, 10_000)
    assert plan.schedule_steps * v3.optimizer.warmdown_ratio == 1_000
    assert v3.tokens_until(2_000) == 1_000 * 4 * 64 * 4 + 1_000 * 4 * 128 * 4


@pytest.mark.parametrize("name", RECIPES)
def test_config_json_round_trip(name):
    run = plan_for(RunConfig.recipe_named(name), steps=7)
    assert RunConfig.from_json(run.to_json()) == run


def test_settings_are_typed_and_take_dotted_or_plain_names():
    run = RunConfig.recipe_named("default").with_settings(
        ["adamw_lr=1e-3", "head.soft_cap=15", "log_prior=yes", "groups=4", "dim=20", "dilations=1,2"]
    )
    assert run.optimizer.adamw_lr == 1e-3
    assert run.head.soft_cap == 15.0
    assert run.head.log_prior is True
    assert (run.model.dim, run.model.groups, run.model.dilations) == (20, 4, (1, 2))
    assert run.with_settings(["soft_cap=none"]).head.soft_cap is None
    phases = run.with_settings(["phases=5:2x8x3:frozen,4x16"]).training.phases
    assert phases == (Phase(5, 2, 8, 3, True), Phase(None, 4, 16, 1))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("adamw_lrr=1", "There is no setting 'adamw_lrr'; did you mean 'adamw_lr'?"),
        ("optimiser.clip=1", "did you mean 'optimizer.clip'?"),
        ("clip", "--set takes key=value"),
        ("warmup_steps=many", "optimizer.warmup_steps must be a whole number, got 'many'."),
        ("dilations=1,x", "model.dilations must be whole numbers with commas between them, got '1,x'."),
        ("ngram_copy_reach=9000", "model.ngram_copy_reach must be at least 1 and at most 8192, got 9000."),
        ("clip=0", "optimizer.clip must be above 0, got 0."),
        ("loss_fraction=1.5", "head.loss_fraction must be above 0 and at most 1, got 1.5."),
        ("adamw_lr=nan", "optimizer.adamw_lr must be a finite number, got nan."),
        ("adamw_lr=1e400", "optimizer.adamw_lr must be a finite number, got inf."),
        ("log_prior=maybe", "head.log_prior must be true or false, got 'maybe'."),
        ("normuon=v4", "optimizer.normuon must be one of published, v3, got 'v4'."),
        ("groups=7", "model.groups must divide model.dim, got 7 and 256."),
        ("phases=16by128", "A phase is written LAST_STEP:ROWSxLENGTHxMICRO_BATCHES"),
        ("phases=9:2x8,5:2x8", "rising last steps"),
        ("phases=0x8", "training.phases.rows must be at least 1, got 0."),
    ],
)
def test_settings_reject_with_a_sentence(setting, sentence):
    with pytest.raises(UserError) as caught:
        RunConfig.recipe_named("default").with_settings([setting])
    assert sentence in str(caught.value)


def _edited(path, value):
    values = json.loads(RunConfig.recipe_named("default").to_json())
    *parents, last = path
    at = values
    for key in parents:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "must be an object"),
        (_edited(["optimizer", "clip"], None), "optimizer.clip is missing."),
        (_edited(["optimizer", "clip"], "1"), "optimizer.clip must be a number, got '1'."),
        (_edited(["optimizer", "clip"], -1.0), "optimizer.clip must be above 0, got -1."),
        (_edited(["optimizer", "clipp"], 1.0), "there is no setting 'optimizer.clipp'; did you mean 'clip'?"),
        (_edited(["model", "groups"], 7), "model.groups must divide model.dim"),
        (_edited(["training", "phases", 0, "rows"], True), "training.phases[0].rows must be a whole number"),
    ],
)
def test_config_json_is_validated(text, sentence):
    with pytest.raises(UserError) as caught:
        RunConfig.from_json(text)
    assert sentence in str(caught.value)


@given(st.integers(1, 3_500_000))
def test_plan_for_tokens_takes_the_fewest_steps(tokens):
    run = plan_for(RunConfig.recipe_named("v3"), tokens=tokens)
    assert run.tokens_until(run.plan.steps) >= tokens
    assert run.tokens_until(run.plan.steps - 1) < tokens


def test_plan_refuses_more_than_the_phases_hold():
    v3 = RunConfig.recipe_named("v3")
    with pytest.raises(UserError, match="end at step 10,000, but 10,001 steps"):
        plan_for(v3, steps=10_001)
    with pytest.raises(UserError, match="tokens"):
        plan_for(v3, tokens=v3.tokens_until(10_000) + 1)
    with pytest.raises(UserError, match="at least one step"):
        plan_for(v3, steps=0)
    assert plan_for(RunConfig.recipe_named("default"), steps=10**6).plan.schedule_steps == 10**6


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


def test_settings_that_came_later_mean_what_was_done_before():
    old = json.loads(RunConfig.recipe_named("default").to_json())
    for name in (
        "activations",
        "mixer_residual_scale",
        "ffn_residual_scale",
        "leaky_decay",
        "ternary_threshold",
        "ngram_copy_orders",
    ):
        del old["model"][name]
    for name in ("sparse_adamw", "rowwise_exp_avg_sq", "normuon_iterations", "nonembedding_lr_scale"):
        del old["optimizer"][name]
    run = RunConfig.from_json(json.dumps(old))
    assert run.model.activations == "float"
    assert (run.model.mixer_residual_scale, run.model.ffn_residual_scale, run.optimizer.nonembedding_lr_scale) == (
        1,
        1,
        1,
    )
    assert (run.model.leaky_decay, run.model.ternary_threshold, run.model.ngram_copy_orders) == (0, 1, ())
    assert not run.optimizer.sparse_adamw
    assert not run.optimizer.rowwise_exp_avg_sq
    assert run.optimizer.normuon_iterations == 5
    with pytest.raises(UserError, match=r"model\.activations must be one of float, int8"):
        RunConfig.recipe_named("default").with_settings(["activations=int4"])
