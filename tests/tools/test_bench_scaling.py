"""tools/bench_scaling.py measures by number of threads, counts the work per thread, and fits what more would bring."""

import json

import numba
import pytest
from click.testing import CliRunner
from helpers import TINY

from tools import bench_scaling
from tools.bench import scaling


def run(*arguments):
    result = CliRunner().invoke(bench_scaling.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_every_number_of_threads_is_measured_and_more_are_predicted(corpus, tmp_path, monkeypatch, threads):
    threads(numba.config.NUMBA_NUM_THREADS)
    monkeypatch.setattr(bench_scaling, "SECONDS", 0.01)
    out = tmp_path / "out.json"
    settings = [part for setting in TINY if "embedding_init" not in setting for part in ("--set", setting)]
    done = run("--data", corpus, "--repeats", 1, "--most", 2, "--json", out, *settings)
    written = json.loads(out.read_text())
    assert set(written["tokens_per_s"]) == {"1", "2"}
    assert written["batch"] == [2, 16, 2]
    for count, rate in written["tokens_per_s"].items():
        assert 0 < rate["p20"] <= rate["median"] <= rate["p80"]
        parts = sum(written["fastest_s"][count][name] for name in bench_scaling.PARTS)
        assert parts == pytest.approx(written["fastest_s"][count]["step"], rel=0.5)
    assert set(written["step_s"]) >= {"1", "2", "16", "64"}
    assert "64 threads" in done.output


def test_the_count_covers_64_threads_and_measures_nothing(monkeypatch):
    monkeypatch.setattr(bench_scaling, "measure", None)
    lines = run("--count-only").output.splitlines()
    assert [int(line.split()[0]) for line in lines if "busiest" in line][-1] == 64


def test_a_fit_finds_the_serial_part():
    shares = {1: 1.0, 2: 0.5, 4: 0.25}
    serial, divided = scaling.fit({count: 0.2 + 3 * share for count, share in shares.items()}, shares)
    assert serial == pytest.approx(0.2)
    assert divided == pytest.approx(3)
    assert scaling.fit({1: 1.0, 2: 0.4}, shares)[0] == 0  # more than twice as fast is no negative serial part


def test_a_prediction_adds_up_the_parts():
    shares = {1: 1.0, 2: 0.6, 8: 0.125}
    seconds = {1: {"trunk": 6.0, "head": 2.0}, 2: {"trunk": 3.6, "head": 1.5}}
    measured = {n: {p: {"min": row.get(p, 0.0)} for p in bench_scaling.PARTS} for n, row in seconds.items()}
    found = bench_scaling.predict(measured, shares)
    assert found["parts"]["trunk"]["serial_s"] == pytest.approx(0, abs=1e-9)
    assert found["parts"]["head"]["serial_s"] == pytest.approx(1)
    assert found["step_s"][8] == pytest.approx(6 / 8 + 1 + 1 / 8)


def test_a_wrong_setting_is_a_sentence():
    result = CliRunner().invoke(bench_scaling.main, ["--set", "dimm=3"])
    assert result.exit_code == 1
    assert "dimm" in result.output
    assert "Traceback" not in result.output
