"""The learning rate schedules: linear warm-up, then constant with a linear warm-down, or a halved cosine.

The warm-down may begin before its time, when validation has stopped improving.
"""

from __future__ import annotations

import math
from dataclasses import replace

from flashlm_numba.model.checkpoint import Validation
from flashlm_numba.model.config import OptimizerConfig, Plan

PATIENCE = 0.2  # share of the steps so far that may pass without a better validation
WORTH = 0.95  # share of the planned steps above which a run is not made shorter


def lr_scale(step: int, schedule_steps: int, config: OptimizerConfig) -> float:
    """The factor for every learning rate at a step.

    step : steps done before this one. The schedule counts steps, not time, so that a slow machine follows it too.
    schedule_steps : length of the schedule in steps
    config : provides schedule, warmup_steps and warmdown_ratio
    The factor of the first step is 1 / warmup_steps. It falls over the last warmdown_ratio * schedule_steps steps and
    is 0 from schedule_steps on. With schedule=halved-cosine it is a half cosine from 1 to 0, times a half in the second
    half of the schedule (the MatMul-free LM's, Zhu et al. 2024, arXiv:2406.02528).

    >>> config = OptimizerConfig(warmup_steps=4, warmdown_ratio=0.4)
    >>> [lr_scale(step, 10, config) for step in range(10)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmdown_steps = config.warmdown_ratio * schedule_steps
    up = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps > 0 else 1.0
    if config.schedule == "halved-cosine":
        done = min(1.0, step / max(schedule_steps, 1))
        return min(up, (0.5 + 0.5 * math.cos(math.pi * done)) * (1.0 if done < 0.5 else 0.5))
    if warmdown_steps <= 0:
        return up
    return min(up, max(0.0, (schedule_steps - step) / warmdown_steps))


def shortened(plan: Plan, config: OptimizerConfig, step: int, validation: Validation, passes: float) -> Plan:
    """The plan whose warm-down begins after this step, if the rate is constant and validation has stopped improving.

    step : steps done;  validation : what the validations up to this step have shown
    passes : tokens seen, as a multiple of the training text. In its first pass a text cannot be learnt by heart, so
        that a worse validation is chance.
    Otherwise the plan itself. The shorter plan is the one that a run of that many steps has from its beginning, and the
    steps so far are the same by both. A schedule longer than the run is never shortened.

    >>> config = OptimizerConfig(warmdown_ratio=0.4, early_warmdown=True)
    >>> shortened(Plan(10_000, 10_000), config, 3_000, Validation(2_000, 4.5, 3_000), 2.7).steps
    5000
    >>> shortened(Plan(10_000, 10_000), config, 3_000, Validation(2_500, 4.5, 3_000), 2.7).steps
    10000
    """
    if not config.early_warmdown or config.schedule != "linear" or plan.schedule_steps != plan.steps or plan.lengthened:
        return plan
    stalled = step - validation.best_step >= PATIENCE * step
    if not stalled or passes < 1 or step < config.warmup_steps or not 0 < config.warmdown_ratio < 1:
        return plan
    steps = math.ceil(step / (1 - config.warmdown_ratio))
    if steps > WORTH * plan.steps:  # the warm-down has begun, or is about to
        return plan
    return replace(plan, steps=steps, schedule_steps=steps, asked_steps=plan.asked_steps or plan.steps)


def dropout_share(tokens: int, text: int, parameters: int) -> float:
    """The share of the dropout rates that the next step uses: 1 - text / parameters, reached in the first pass.

    tokens : seen so far;  text : tokens of the training text;  parameters : numbers that are trained
    A model with more numbers than its text has tokens can learn it by heart, and begins to while it reads it first;
    before, dropout only slows it down. The planned length plays no part, so that a longer run begins as a shorter one.

    >>> [dropout_share(tokens, 1_000, 4_000) for tokens in (0, 500, 1_000, 9_000)]
    [0.0, 0.375, 0.75, 0.75]
    >>> dropout_share(9_000, 1_000, 1_000)
    0.0
    """
    return min(1.0, tokens / text) * max(0.0, 1 - text / parameters)
