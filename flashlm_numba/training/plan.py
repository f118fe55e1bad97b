"""The length of a run: a number of steps, whether it was requested in steps, in tokens or in minutes."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace

from flashlm_numba.heads import head_class
from flashlm_numba.inference.evaluate import score
from flashlm_numba.model.config import Phase, Plan, RunConfig
from flashlm_numba.system.arguments import positive, whole
from flashlm_numba.system.errors import UserError
from flashlm_numba.training.session import BATCH, WINDOW, Session
from flashlm_numba.training.step import train_step

DEFAULT_MINUTES = 20.0  # length of a run if none is given
MOST_MINUTES = 1e6  # two years


@dataclass(frozen=True)
class Length:
    """How long to train: at most one of the three; with none, the default length of the run.

    Raises UserError if several are given, or if one is no number of its kind above 0.
    """

    steps: int | None = None  # optimiser steps, counted from the first step of the run
    tokens: int | None = None  # minimum number of tokens, counted from the first step of the run
    minutes: float | None = None  # minutes on the training clock; for a resumed run, additional minutes

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.steps, self.tokens, self.minutes)) > 1:
            raise UserError("Give only one of steps, tokens and minutes.")
        if self.steps is not None:
            object.__setattr__(self, "steps", whole("steps", self.steps))
        if self.tokens is not None:
            object.__setattr__(self, "tokens", whole("tokens", self.tokens))
        if self.minutes is not None:
            object.__setattr__(self, "minutes", positive("minutes", self.minutes, MOST_MINUTES))

    @property
    def in_steps(self) -> bool:
        """Whether the number of steps is known before the speed is measured."""
        return self.steps is not None or self.tokens is not None

    def or_own(self, run: RunConfig) -> Length:
        """This length; if none was given, that of the recipe's phases if they end, else DEFAULT_MINUTES."""
        if self.in_steps or self.minutes is not None:
            return self
        return Length(minutes=DEFAULT_MINUTES) if run.fixed_schedule is None else Length(steps=run.fixed_schedule)


OWN_LENGTH = Length()


def plan_for(run: RunConfig, *, steps: int | None = None, tokens: int | None = None) -> RunConfig:
    """The run with a plan of `steps`, or of as many steps as `tokens` need.

    Raises UserError if the phases end earlier.
    """
    fixed = run.fixed_schedule
    if tokens is not None:
        steps = _steps_for_tokens(run, tokens)
    if steps is None:
        raise ValueError("plan_for: give steps or tokens")
    if steps < 1:
        raise UserError(f"A run needs at least one step, got {steps}.")
    if fixed is not None and steps > fixed:
        raise UserError(
            f"The phases of recipe '{run.recipe}' end at step {fixed:,}, but {steps:,} steps were requested; "
            "request fewer, or set longer phases with --set phases=..."
        )
    return replace(run, plan=Plan(steps=steps, schedule_steps=fixed or steps))


def _steps_for_tokens(run: RunConfig, tokens: int) -> int:
    """Smallest number of steps that see at least this many tokens."""
    steps, left = 0, tokens
    for phase in run.training.phases:
        need = math.ceil(left / phase.tokens)
        if phase.last_step is None or steps + need <= phase.last_step:
            return steps + need
        left -= (phase.last_step - steps) * phase.tokens
        steps = phase.last_step
    raise UserError(
        f"The phases of recipe '{run.recipe}' see {run.tokens_until(steps):,} tokens, but {tokens:,} were "
        "requested; request fewer, or set longer phases with --set phases=..."
    )


# --- minutes ---


def plan_minutes(session: Session, minutes: float, began: float) -> RunConfig:
    """Convert minutes to steps, using the speed of each phase that will be reached, measured at learning rate 0.

    The minutes are those of the training clock. Startup and validation are subtracted, up to 2 % of the minutes.

    began : time.perf_counter() at the start of the command
    """
    session.progress.note("Measuring the speed ...")
    run, at = session.run, session.clock.step
    validation = _validation_seconds(session)
    budget = min(60.0, max(1.0, 0.02 * minutes * 60))  # seconds for measuring a phase; at least two steps
    rates: list[float] = []
    steps, left = at, minutes * 60
    if at == 0:  # the clock already counts the initial embedding and the tree
        left -= min(session.clock.seconds, left)
    for phase in run.training.phases:
        end = math.inf if phase.last_step is None else phase.last_step
        if end <= at:
            rates.append(0.0)  # this phase ends before the plan begins
            continue
        rates.append(_phase_rate(session, phase, budget))
        if len(rates) == 1 or steps == at:
            validations = 1 + left / rates[-1] / (run.training.validate_every or math.inf)
            left -= min(0.02 * left, time.perf_counter() - began + validations * validation)
        here = min(end - steps, math.floor(left / rates[-1]))
        steps += int(here)
        left -= here * rates[-1]
        if steps < end:
            break
    steps = max(steps, at + 1)
    reached = ", ".join(f"{rate:.3g} s per step" for rate in rates if rate)
    session.progress.note(
        f"{minutes:g} {'minute is' if minutes == 1 else 'minutes are'} {steps - at:,} steps ({reached})."
    )
    return replace(run, plan=Plan(steps, run.fixed_schedule or steps, minutes, tuple(rates)))


def _validation_seconds(session: Session) -> float:
    """Estimated seconds per validation, from scoring the first of its documents."""
    started = time.perf_counter()
    few = session.subset[:1]
    if not few:
        return 0.0
    score(session.model, few, eot=session.data.vocabulary.eot, window=WINDOW, batch=BATCH)
    return (time.perf_counter() - started) * session.run.training.validation_tokens / len(few[0])


def _phase_rate(session: Session, phase: Phase, budget: float) -> float:
    """Mean seconds per step of this phase over the run."""
    full_ratio = head_class(session.run.head.name).full_ratio(session.run.head)
    kinds = ((False, 1 - full_ratio), (True, full_ratio))
    return sum(share * _step_seconds(session, phase, budget, full=full) for full, share in kinds if share)


def _step_seconds(session: Session, phase: Phase, budget: float, *, full: bool = False) -> float:
    """Seconds per step of this phase, measured at learning rate 0 for about `budget` seconds."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        times.append(train_step(session, phase, len(times) + 1, lr=0.0, full=full).seconds)
    return statistics.fmean(times[1:])  # the mean, because slow steps add to a run's time too
