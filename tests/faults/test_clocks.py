"""A clock that jumps, as after a sleep: the plan is in steps, so nothing changes.

A clock that is set back is the wall clock, which only names folders and lines: training reads none.
"""

import itertools
import json
import re
import time
from dataclasses import replace

from programs import INJECTED, bits, losses

from flashlm_numba.training.plan import Length
from flashlm_numba.training.run import Finished, start_run


def _run(run, corpus, folder):
    done = start_run(replace(run, seed=3), Length(steps=9), data=str(corpus), out=folder, threads=1)
    assert done == Finished(folder, 0)


def test_a_jump_of_two_hours(tiny_run, corpus, tmp_path, monkeypatch):
    INJECTED["clocks that jumped"] += 1
    _run(tiny_run, corpus, tmp_path / "calm")
    real, calls = time.perf_counter, itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: real() + (7200.0 if next(calls) > 60 else 0.0))
    _run(tiny_run, corpus, tmp_path / "jumped")
    monkeypatch.undo()
    assert next(calls) > 61  # it did jump
    assert losses(tmp_path / "jumped") == losses(tmp_path / "calm")
    assert bits(tmp_path / "jumped") == bits(tmp_path / "calm")
    for line in (tmp_path / "jumped" / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["seconds"] >= 0


def test_nothing_reads_the_wall_clock_but_for_a_name():
    """time.time and datetime.now follow whoever sets the clock; perf_counter and monotonic only go forwards."""
    from pathlib import Path

    found = {}
    for path in (Path(__file__).resolve().parents[2] / "flashlm_numba").rglob("*.py"):
        count = len(re.findall(r"time\.time\(|\.now\(|utcnow", path.read_text(encoding="utf-8")))
        if count:
            found[path.name] = count
    # the name of a run's folder, the time that an answer of the server tells, and the age of a log
    assert found == {"run.py": 1, "application.py": 1, "runs.py": 1}
