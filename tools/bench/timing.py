"""Alternating timings of candidates, and their summaries.

Seconds are wall clock time (time.perf_counter). Report medians with the 20 % and 80 % quantiles, on a quiet machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class WrongResultError(Exception):
    """A candidate's result differs from the reference, so it is not timed."""


def summary(values: list[float]) -> dict[str, Any]:
    """Median, 20 % and 80 % quantiles, best and count of a list of measurements (seconds, or any unit)."""
    p20, median, p80 = np.quantile(values, [0.2, 0.5, 0.8])
    return {
        "median": float(median),
        "p20": float(p20),
        "p80": float(p80),
        "min": float(min(values)),
        "repeats": len(values),
    }


def rate(seconds: Mapping[str, Any], amount: float) -> dict[str, float]:
    """Amount per second from a summary of seconds; p20 becomes the slow end."""
    return {
        "median": amount / seconds["median"],
        "p20": amount / seconds["p80"],
        "p80": amount / seconds["p20"],
    }


def measure(
    candidates: Mapping[str, Callable[[], Any]],
    repeats: int = 5,
    warmup: int = 1,
    pause: float = 0.05,
    burst: float = 0.1,
) -> dict[str, dict[str, Any]]:
    """Time the candidates alternately, so that a drift of the machine affects all of them equally.

    Returns name -> summary of seconds per call, with one value per round. A `pause` (seconds) before every turn lets
    the previous candidate's idle threads, which spin for a moment, fall asleep. A call shorter than `burst` seconds is
    repeated until they have passed. The turn's value is then the median without the first call, which wakes threads and
    fills caches, because training calls a head repeatedly. Raises ValueError for fewer than one repeat.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"measure: repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, run in candidates.items():
            time.sleep(pause)
            calls: list[float] = []
            before = began = time.perf_counter()
            while not calls or before - began < burst:
                run()
                now = time.perf_counter()
                calls.append(now - before)
                before = now
            if turn >= warmup:
                seconds[name].append(float(np.median(calls[1:] or calls)))
    return {name: summary(values) for name, values in seconds.items()}
