"""The warm-down that begins when validation stops improving: it gives the bits of a run planned shorter."""

import contextlib
import signal
from dataclasses import replace

import pytest
from helpers import TINY
from run_helpers import read_bits, read_log, read_losses, resume, start

from flashlm_numba.data.prepare import prepare
from flashlm_numba.data.shards import open_tokens
from flashlm_numba.model import build
from flashlm_numba.model.checkpoint import Validation
from flashlm_numba.model.config import OptimizerConfig, Plan
from flashlm_numba.model.recipes import RECIPES, from_recipe
from flashlm_numba.model.settings import with_settings
from flashlm_numba.training import loop
from flashlm_numba.training.inputs import with_vocabulary_of
from flashlm_numba.training.schedule import PATIENCE, lr_scale, shortened

CONFIG = OptimizerConfig(warmup_steps=100, warmdown_ratio=0.4, early_warmdown=True)
LONG = Plan(10_000, 10_000, 40.0, (0.1,))
SETTINGS = ("head.name=dense", "phases=32x32")  # the text is read once before step 16
# by step: the best at a constant rate is 12, and 16 is too late after it
NLLS = {4: 5.0, 8: 4.0, 12: 3.5, 16: 3.6, 20: 3.7, 24: 3.3, 27: 3.2, 28: 3.1, 30: 3.0}


@contextlib.contextmanager
def known_losses():
    """The losses of NLLS at every validation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_validation_nll", lambda session: NLLS[session.clock.step])
        yield


@pytest.fixture(scope="module")
def tokens(corpus_files, tmp_path_factory):
    """The corpus in a vocabulary of 300 tokens, with which a step is quick."""
    out = tmp_path_factory.mktemp("small")
    prepare(str(corpus_files), out, vocab=300, progress=False)
    return out


@pytest.fixture(scope="module")
def run(tokens):
    return with_vocabulary_of(open_tokens(tokens), from_recipe("default", [*TINY, *SETTINGS]), any_head=True)


@pytest.fixture(scope="module")
def whole(run, tokens, tmp_path_factory):
    """A run that is planned too long: its folder."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with known_losses():
        start(run, tokens, folder, steps=60)
    return folder


def plan_of(folder):
    return build.read_config(folder).plan


# --- the rule ---


@pytest.mark.parametrize("step", [500, 1_001, 2_999, 4_500, 5_690])
def test_the_shorter_plan_has_the_same_rates_so_far_and_then_falls(step):
    plan = shortened(LONG, CONFIG, step, Validation(step // 2, 4.5, step), 3.0)
    assert plan.steps == plan.schedule_steps < LONG.steps
    assert plan.asked_steps == LONG.steps
    assert (plan.minutes, plan.step_seconds) == (LONG.minutes, LONG.step_seconds)
    before = [[lr_scale(at, p.schedule_steps, CONFIG) for at in range(step)] for p in (plan, LONG)]
    assert before[0] == before[1]
    assert lr_scale(step + 1, plan.schedule_steps, CONFIG) < 1
    # a run of this length does not become shorter still
    assert shortened(plan, CONFIG, step, Validation(step // 2, 4.5, step), 3.0) == plan


def test_the_steps_asked_for_first_are_remembered():
    once = shortened(LONG, CONFIG, 4_000, Validation(2_000, 4.5, 4_000), 3.0)
    assert shortened(once, CONFIG, 3_000, Validation(1_000, 4.5, 3_000), 3.0).asked_steps == LONG.steps


def test_patience_grows_with_the_run():
    best = int(3_000 * (1 - PATIENCE))
    assert shortened(LONG, CONFIG, 3_000, Validation(best, 4.5, 3_000), 3.0) != LONG
    assert shortened(LONG, CONFIG, 3_000, Validation(best + 1, 4.5, 3_000), 3.0) == LONG


@pytest.mark.parametrize(
    ("step", "passes", "plan", "settings"),
    [
        (6_500, 3.0, LONG, {}),  # the warm-down has begun
        (6_000, 3.0, LONG, {}),  # it begins now
        (5_750, 3.0, LONG, {}),  # it is about to begin
        (3_000, 0.9, LONG, {}),  # no token has been seen twice
        (90, 3.0, LONG, {}),  # the warm-up has not ended
        (3_000, 3.0, Plan(4_000, 10_000), {}),  # the recipe's phases fix the schedule
        (3_000, 3.0, LONG, {"early_warmdown": False}),
        (3_000, 3.0, LONG, {"schedule": "halved-cosine"}),
        (3_000, 3.0, LONG, {"warmdown_ratio": 1.0}),
        (3_000, 3.0, LONG, {"warmdown_ratio": 0.0}),
        # its best validation is one of the end of a warm-down, which a constant rate may not reach
        (3_000, 3.0, replace(LONG, lengthened=True), {}),
    ],
)
def test_otherwise_the_plan_stays(step, passes, plan, settings):
    config = replace(CONFIG, **settings)
    assert shortened(plan, config, step, Validation(10, 4.5, step), passes) is plan


def test_only_the_default_recipe_has_it():
    assert {name for name, run in RECIPES.items() if run.optimizer.early_warmdown} == {"default"}


# --- runs ---


def test_a_run_planned_too_long_is_a_shorter_one_bit_for_bit(run, tokens, tmp_path, capsys):
    assert open_tokens(tokens).train.n_tokens < 16 * 32 * 32
    with known_losses():
        start(run, tokens, tmp_path / "short", steps=27)
        assert "instead of" not in capsys.readouterr().err
        assert start(run, tokens, tmp_path / "long", steps=60).status == 0
    output = capsys.readouterr().err
    assert "not been predicted better since step 12, so the learning rates fall from now on" in output
    assert "training ends at step 27 instead of 60." in output
    assert "step 27/27" in output
    assert "Done after 27 of 60 planned steps, since validation had stopped improving" in output
    assert read_losses(tmp_path / "long") == read_losses(tmp_path / "short")
    assert [line["lr"] for line in read_log(tmp_path / "long")] == [line["lr"] for line in read_log(tmp_path / "short")]
    assert read_bits(tmp_path / "long") == read_bits(tmp_path / "short")
    assert plan_of(tmp_path / "long") == Plan(27, 27, asked_steps=60)
    # the run is complete, and can be given more steps
    assert resume(tmp_path / "long").status == 0
    assert "complete at step 27; give --steps" in capsys.readouterr().err
    with known_losses():
        resume(tmp_path / "long", steps=30)
    assert plan_of(tmp_path / "long") == Plan(30, 30, lengthened=True)


@pytest.mark.parametrize("stop", [14, 16, 17, 25])
def test_resumed_around_the_decision_it_has_the_same_bits(run, tokens, whole, tmp_path, stop_at, stop):
    with known_losses():
        undo = stop_at(stop, signal.SIGTERM)
        assert start(run, tokens, tmp_path / "parts", steps=60).status == 143
        undo()
        assert resume(tmp_path / "parts").status == 0
    assert read_losses(tmp_path / "parts") == read_losses(whole)
    assert read_bits(tmp_path / "parts") == read_bits(whole)
    assert plan_of(tmp_path / "parts") == plan_of(whole)


def test_resumed_before_the_decision_the_run_ends_at_the_same_step(run, tokens, tmp_path):
    run = with_settings(run, ["checkpoint_every=12"])
    with known_losses():
        start(run, tokens, tmp_path / "run", steps=60)
        losses, bits = read_losses(tmp_path / "run"), read_bits(tmp_path / "run")
        resume(tmp_path / "run", checkpoint_name="step-12")
    assert read_losses(tmp_path / "run") == losses
    assert read_bits(tmp_path / "run") == bits


def test_a_run_that_is_given_more_steps_before_its_warm_down_is_still_shortened(run, tokens, whole, tmp_path, stop_at):
    with known_losses():
        undo = stop_at(5, signal.SIGTERM)
        start(run, tokens, tmp_path / "run", steps=40)
        undo()
        assert resume(tmp_path / "run", steps=60).status == 0
    assert plan_of(tmp_path / "run") == plan_of(whole)
    assert read_bits(tmp_path / "run") == read_bits(whole)


def test_a_schedule_that_the_phases_fix_is_not_shortened(run, tokens, tmp_path):
    fixed = with_settings(run, ["phases=10:32x32,30:16x32", "validate_every=4"])
    with known_losses():
        start(fixed, tokens, tmp_path / "run", steps=30)
    assert plan_of(tmp_path / "run").steps == 30
