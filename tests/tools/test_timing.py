"""What the benchmarks share: alternating measurements, the machine's own speed, JSON."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess

import pytest

from flashlm_numba.system.display import peak_rss_mb
from tools import timing


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


def test_a_commit_is_named_in_a_clone_and_nowhere_else(tmp_path, monkeypatch):
    found = timing.commit()
    assert found is None or re.fullmatch("[0-9a-f]{12}[+]?", found)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b"]
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "tools" / "timing.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert timing.commit() is None
    (tmp_path / "a.py").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = timing.commit()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "a.py").write_text("2")
    assert timing.commit() == clean + "+"


def test_gemm_rate_and_environment_describe_the_machine(tmp_path):
    result = timing.gemm_rate(1, rows=16, dim=8, vocab_size=100, repeats=1)
    assert result["best"] >= result["2048 cubed"]["median"] > 1
    described = timing.environment(1)
    assert described["cpu"]
    assert described["blas"]
    assert described["cores"] >= 1
    assert peak_rss_mb() is None or peak_rss_mb() > 20
    timing.write_json(tmp_path / "out.json", {"gemm": result, **described})
    assert json.loads((tmp_path / "out.json").read_text())["gemm"] == result
    with pytest.raises(ValueError, match="not JSON compliant"):
        timing.write_json(tmp_path / "out.json", {"x": math.nan})
