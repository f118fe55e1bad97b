"""Plans: steps, tokens and minutes all become a number of steps."""

import itertools
import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import read_log, read_losses, resume, start

from flashlm_numba.data.vocabularies import vocabulary_named
from flashlm_numba.model import embedding_init as embeddings
from flashlm_numba.model.recipes import from_recipe
from flashlm_numba.model.settings import run_from_json, with_settings
from flashlm_numba.system.display import Progress
from flashlm_numba.system.errors import UserError
from flashlm_numba.training import plan
from flashlm_numba.training.plan import Length, plan_for
from flashlm_numba.training.session import Clock


def test_minutes_become_a_plan_in_steps_that_resume_keeps(tiny_run, corpus, tmp_path, stop_at):
    run = with_settings(tiny_run, ["head.name=dense", "phases=3:2x8,2x16", "checkpoint_every=100"])
    again = stop_at(2, signal.SIGINT)
    assert start(run, corpus, tmp_path / "minutes", minutes=0.03).status == 130
    again()
    plan = run_from_json((tmp_path / "minutes" / "config.json").read_text()).plan
    assert plan.minutes == 0.03
    assert plan.schedule_steps == plan.steps > 3
    assert len(plan.step_seconds) == 2
    fast, slow = plan.step_seconds
    assert 3 * fast + (plan.steps - 3) * slow <= 1.8 * 1.001  # seconds
    assert resume(tmp_path / "minutes").status == 0
    assert read_log(tmp_path / "minutes")[-1]["step"] == plan.steps
    # measuring has taught it nothing: the losses are those of a run asked for in steps
    start(run, corpus, tmp_path / "steps", steps=plan.steps)
    assert read_losses(tmp_path / "minutes") == read_losses(tmp_path / "steps")


def test_the_start_of_the_embedding_is_on_the_clock(tiny_run, corpus, tmp_path, monkeypatch):
    """As long as it once took, whether it was in the cache or not; a plan in minutes has so much less."""
    rows = np.random.default_rng(0).standard_normal((50_257, 16), np.float32)
    monkeypatch.setattr(embeddings, "cached_start", lambda *_, **__: (rows, 100.0))
    run = with_settings(
        tiny_run, ["embedding_init=corpus", "log_every=1", "checkpoint_minutes=1"]
    )  # passes before the first step
    start(run, corpus, tmp_path / "steps", steps=2)
    assert json.loads((tmp_path / "steps" / "checkpoints" / "step-1" / "state.json").read_text())["keep"] is True
    assert 100 < read_log(tmp_path / "steps")[0]["seconds"] < 160
    start(run, corpus, tmp_path / "minutes", minutes=0.5)
    plan = run_from_json((tmp_path / "minutes" / "config.json").read_text()).plan
    assert plan.steps == 1  # nothing is left of half a minute


@pytest.mark.parametrize(("documents", "steps"), [([], 59), ([np.zeros(10, np.int32)], 58)])
def test_minutes_keep_time_for_validating_where_there_is_a_text_for_it(tiny_run, monkeypatch, documents, steps):
    clock = itertools.count()
    monkeypatch.setattr(plan.time, "perf_counter", lambda: 0.01 * next(clock))  # ten tokens are scored in 0.01 s
    monkeypatch.setattr(plan, "_step_seconds", lambda *_, **__: 1.0)
    monkeypatch.setattr(plan, "score", lambda *_, **__: None)
    run = with_settings(tiny_run, ["validation_tokens=30000"])
    data = SimpleNamespace(vocabulary=vocabulary_named("gpt2"))
    session = SimpleNamespace(run=run, clock=Clock(), data=data, subset=documents, model=None, progress=Progress())
    # some hundredths of a second are gone already; 2 % of a minute at most are kept for validating
    assert plan.plan_minutes(session, 1.0, 0.0).plan.steps == steps


def test_tokens_are_a_plan_too(tiny_run, corpus, tmp_path):
    start(with_settings(tiny_run, ["head.name=dense"]), corpus, tmp_path, tokens=65)
    assert [line["tokens"] for line in read_log(tmp_path)] == [64, 128]


@given(st.integers(1, 3_500_000))
def test_plan_for_tokens_takes_the_fewest_steps(tokens):
    run = plan_for(from_recipe("v3"), tokens=tokens)
    assert run.tokens_until(run.plan.steps) >= tokens
    assert run.tokens_until(run.plan.steps - 1) < tokens


def test_plan_refuses_more_than_the_phases_hold():
    v3 = from_recipe("v3")
    with pytest.raises(UserError, match="end at step 10,000, but 10,001 steps"):
        plan_for(v3, steps=10_001)
    with pytest.raises(UserError, match="tokens"):
        plan_for(v3, tokens=v3.tokens_until(10_000) + 1)
    with pytest.raises(UserError, match="at least one step"):
        plan_for(v3, steps=0)


@pytest.mark.parametrize(
    ("length", "sentence"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"steps": "3"}, "steps must be a whole number, got '3'"),
        ({"tokens": -1}, "tokens must be at least 1"),
        ({"minutes": 0}, "minutes must be a number above 0 and at most 1,000,000, got 0"),
        ({"minutes": -1}, "minutes must be a number above 0"),
        ({"minutes": float("nan")}, "minutes must be a number above 0"),
        ({"minutes": float("inf")}, "minutes must be a number above 0"),
        ({"minutes": "5"}, "minutes must be a number above 0"),
        ({"steps": 1, "tokens": 5}, "Give only one of steps, tokens and minutes"),
    ],
)
def test_a_length_that_is_none_is_refused(length, sentence):
    with pytest.raises(UserError, match=sentence):
        Length(**length)


def test_a_length_may_be_numpys():
    assert type(Length(steps=np.int64(3)).steps) is int
    assert type(Length(minutes=np.float32(3)).minutes) is float


def test_a_long_plan_has_one_phase():
    assert plan_for(from_recipe("default"), steps=10**6).plan.schedule_steps == 10**6


def test_a_plan_that_stops_early_keeps_the_schedule():
    planned = plan_for(from_recipe("v3"), steps=50).plan
    assert (planned.steps, planned.schedule_steps) == (50, 10_000)


def test_a_run_of_no_stated_length_has_its_own():
    assert Length().or_own(from_recipe("v3")) == Length(steps=10_000)
    assert Length().or_own(from_recipe("default")) == Length(minutes=20)
    assert Length(tokens=5).or_own(from_recipe("v3")) == Length(tokens=5)
    assert Length(minutes=5).or_own(from_recipe("v3")) == Length(minutes=5)
