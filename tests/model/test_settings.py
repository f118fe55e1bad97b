"""`--set` and config.json: typed, checked, and read back as written."""

import json
from dataclasses import replace

import pytest

from flashlm_numba.model.config import Phase, Plan
from flashlm_numba.model.recipes import RECIPES, from_recipe
from flashlm_numba.model.settings import run_from_json, with_settings
from flashlm_numba.system.errors import UserError


@pytest.mark.parametrize("name", RECIPES)
def test_config_json_round_trip(name):
    run = replace(from_recipe(name), plan=Plan(7, 7, 0.5, (0.25,)))
    assert run_from_json(run.to_json()) == run


def test_settings_are_typed_and_take_dotted_or_plain_names():
    run = from_recipe(
        "default", ["adamw_lr=1e-3", "head.soft_cap=15", "log_prior=yes", "groups=4", "dim=20", "dilations=1,2"]
    )
    assert run.optimizer.adamw_lr == 1e-3
    assert run.head.soft_cap == 15.0
    assert run.head.log_prior is True
    assert (run.model.dim, run.model.groups, run.model.dilations) == (20, 4, (1, 2))
    assert with_settings(run, ["soft_cap=none"]).head.soft_cap is None
    phases = with_settings(run, ["phases=5:2x8x3:frozen,4x16", "embedding_init=hf:x/y"]).training.phases
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
        ("activations=int4", "model.activations must be one of float, int8, got 'int4'."),
        ("normuon=v4", "optimizer.normuon must be one of published, v3, got 'v4'."),
        ("groups=7", "model.groups must divide model.dim, got 7 and 256."),
        ("phases=16by128", "A phase is written LAST_STEP:BATCH_SIZExSEQ_LENxGRAD_ACCUM"),
        ("phases=9:2x8,5:2x8", "increasing last steps"),
        ("phases=0x8", "training.phases.batch_size must be at least 1, got 0."),
    ],
)
def test_settings_reject_with_a_sentence(setting, sentence):
    with pytest.raises(UserError) as caught:
        from_recipe("default", [setting])
    assert sentence in str(caught.value)


def _edited(path, value):
    values = json.loads(from_recipe("default").to_json())
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
        (
            _edited(["training", "phases", 0, "batch_size"], True),
            "phases[0].batch_size must be a whole number",
        ),
    ],
)
def test_config_json_is_validated(text, sentence):
    with pytest.raises(UserError) as caught:
        run_from_json(text)
    assert sentence in str(caught.value)
