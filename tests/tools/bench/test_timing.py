"""Timings that alternate between candidates."""

from __future__ import annotations

import itertools

import pytest

from tools.bench import timing


def test_measure_alternates_the_candidates_and_leaves_out_the_warm_up():
    calls = []
    slow = [0.03]  # only the first call is slow

    def first():
        calls.append("a")
        timing.time.sleep(slow.pop() if slow else 0.001)

    result = timing.measure({"a": first, "b": lambda: calls.append("b")}, repeats=3, warmup=1, pause=0, burst=0.01)
    assert calls.count("a") > 4  # a short call is made again, to fill the burst
    assert [name for name, _ in itertools.groupby(calls)] == ["a", "b"] * 4
    assert result["a"]["repeats"] == 3
    assert result["b"]["p20"] <= result["b"]["median"] <= result["b"]["p80"] < result["a"]["min"]
    assert result["a"]["min"] < 0.03

    def long():
        calls.append("long")
        timing.time.sleep(0.01)

    calls.clear()
    timing.measure({"long": long}, repeats=2, warmup=0, pause=0, burst=0.005)
    assert calls == ["long"] * 2  # a call as long as a burst counts at once
    rates = timing.rate(result["a"], 10)
    assert rates["p20"] <= rates["median"] <= rates["p80"]
    with pytest.raises(ValueError, match="repeats must be"):
        timing.measure({}, repeats=0)
