"""The learning rate schedules: linear warm-up, then constant with a linear warm-down, or a halved cosine."""

from __future__ import annotations

import math

from flashlm_numba.model.config import OptimizerConfig


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
