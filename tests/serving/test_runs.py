"""GET /runs and /runs/NAME/metrics: what a folder of runs holds, and nothing outside it."""

import json
import os
import shutil
import sys
from urllib.parse import quote

import pytest
from helpers import command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashlm_numba.cli.serve_command import holds_runs
from flashlm_numba.serving import runs as module
from flashlm_numba.serving.limits import Limits
from flashlm_numba.system.locks import locked


def log(folder, *lines, end="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text(text + end, encoding="utf-8")


def steps(*numbers):
    return [{"step": n, "seconds": 1.5 * n, "loss": 9 - n, "nll": 9 - n} for n in numbers]


@pytest.fixture
def folder(tmp_path):
    found = tmp_path / "watched" / "runs"
    found.mkdir(parents=True)
    return found


@pytest.fixture
def watching(folder, start):
    return start(None, Limits(), runs=folder)


def listed(server):
    status, _, found = server.ask("GET", "/runs")
    assert status == 200, found
    return {run["name"]: run for run in found["runs"]}


def lines(server, name, after=0):
    status, _, found = server.ask("GET", f"/runs/{quote(name, safe='')}/metrics?after={after}")
    assert status == 200, found
    return found


def test_a_real_run(start, served, serving_run):
    server = start(served, Limits(), runs=serving_run.parent)
    run = listed(server)["tiny"]
    logged = [json.loads(line) for line in (serving_run / "metrics.jsonl").read_text().splitlines()]
    assert lines(server, "tiny") == {"lines": logged, "next": 3, "more": False}
    assert (run["step"], run["steps"], run["training"]) == (3, 3, False if sys.platform == "linux" else None)
    assert run["nll"] == logged[-1]["nll"]
    assert run["val_nll"] == logged[-1]["val_nll"]
    with locked(serving_run / ".lock"):
        assert listed(server)["tiny"]["training"] is (True if sys.platform == "linux" else None)


def test_the_list(watching, folder):
    assert listed(watching) == {}
    log(folder / "old", {"step": 1, "nll": 5.0, "val_nll": 4.5}, *steps(2, 3))
    os.utime(folder / "old" / "metrics.jsonl", (1, 1))
    log(folder / "ünï codé <b>", *steps(7))
    (folder / "no run").mkdir()
    (folder / "a file").write_text("")
    log(folder / ".hidden", *steps(1))
    log(folder / "empty", end="")
    found = watching.ask("GET", "/runs")[2]["runs"]
    assert [run["name"] for run in found][-1] == "old"
    assert {run["name"] for run in found} == {"ünï codé <b>", "empty", "old"}
    by_name = listed(watching)
    assert (by_name["old"]["step"], by_name["old"]["nll"], by_name["old"]["val_nll"]) == (3, 6, 4.5)
    assert (by_name["empty"]["step"], by_name["empty"]["steps"]) == (None, None)
    assert lines(watching, "ünï codé <b>")["lines"] == steps(7)
    shutil.rmtree(folder)
    status, _, error = watching.ask("GET", "/runs")
    assert status == 404
    assert error["error"]["message"].startswith("The folder of runs cannot be read")


def test_a_run_that_is_written_and_one_that_is_damaged(watching, folder):
    log(folder / "a", *steps(1, 2), '{"step": 3, "nl', end="")
    assert lines(watching, "a") == {"lines": steps(1, 2), "next": 2, "more": False}
    assert listed(watching)["a"]["step"] == 2
    log(folder / "a", *steps(1, 2, 3))
    assert lines(watching, "a", after=2) == {"lines": steps(3), "next": 3, "more": False}
    log(folder / "a", *steps(1))  # continued from an earlier step
    assert lines(watching, "a", after=3) == {"lines": [], "next": 1, "more": False}
    damaged = ("{", "", "7", "\x00", '{"step": 1e999}', '{"a":' * 5_000, "9" * 5_000, '"' + "x" * 200_000 + '"')
    log(folder / "a", *steps(1), *damaged, '{"step": 2, "nll": NaN, "loss": -Infinity}')
    found = lines(watching, "a")
    assert found["lines"] == [*steps(1), {"step": 2, "nll": None, "loss": None}]
    assert found["next"] == len(damaged) + 2
    assert (listed(watching)["a"]["step"], listed(watching)["a"]["nll"]) == (2, None)
    (folder / "a" / "config.json").write_text('{"plan": {"steps": "many"}}')
    assert listed(watching)["a"]["steps"] is None
    (folder / "a" / "metrics.jsonl").write_bytes(bytes(range(256)) * 3_000)
    assert lines(watching, "a")["lines"] == []
    assert listed(watching)["a"]["step"] is None


def test_long_logs_come_in_parts(watching, folder, monkeypatch):
    log(folder / "a", *steps(*range(25)))
    monkeypatch.setattr(module, "ANSWER_LINES", 10)
    found, after, more = [], 0, True
    while more:
        part = lines(watching, "a", after)
        assert len(part["lines"]) <= 10
        found, after, more = found + part["lines"], part["next"], part["more"]
    assert found == steps(*range(25))
    monkeypatch.setattr(module, "ANSWER_BYTES", 1)
    assert len(lines(watching, "a")["lines"]) == 1
    monkeypatch.setattr(module, "TAIL", 60)
    assert listed(watching)["a"]["step"] == 24
    monkeypatch.setattr(module, "MOST_RUNS", 1)
    log(folder / "b", *steps(1))
    assert watching.ask("GET", "/runs")[2]["left_out"] == 1


def test_no_path_leads_out_of_the_folder(watching, folder):
    log(folder.parent / "outside", {"step": 1, "secret": 1})
    log(folder.parent, {"step": 1, "secret": 2})
    log(folder, {"step": 1, "secret": 3})
    log(folder / "a" / "b", {"step": 1, "secret": 4})
    log(folder / "good", *steps(1))
    (folder / "link").symlink_to(folder.parent / "outside")
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "fine").symlink_to(folder / "good")
    (folder / "linked log").mkdir()
    (folder / "linked log" / "metrics.jsonl").symlink_to(folder.parent / "outside" / "metrics.jsonl")
    assert set(listed(watching)) == {"good", "fine"}
    outside = str(folder.parent / "outside")
    for name in (
        *("..", ".", "", "../outside", "..%2foutside", "%2e%2e%2foutside", "a/b", "a%2fb", "link", "circle"),
        *("linked log", outside, "good/..", "good%00", "%00", "x" * 5_000, "..\\outside", "%ff", ".hidden", "//"),
    ):
        for path in (name, quote(name, safe=""), quote(name, safe="%")):
            if not path.isascii() or " " in path or len(path) > 10_000:
                continue
            status, headers, found = watching.ask("GET", f"/runs/{path}/metrics")
            assert (status, headers["Content-Type"]) == (404, "application/json"), path
            assert "secret" not in json.dumps(found)
    assert lines(watching, "fine")["lines"] == steps(1)


@pytest.mark.parametrize("after", ["-1", "x", "1.5", "", "9" * 30, "٣", "1e3", "0x1", " 1"])
def test_wrong_places(watching, folder, after):
    log(folder / "good", *steps(1))
    status, _, found = watching.ask("GET", f"/runs/good/metrics?after={quote(after)}")
    assert (status, found["error"]["param"]) == (400, "after")
    assert found["error"]["message"] == "after must be a whole number between 0 and 1,000,000,000."
    assert lines(watching, "good", after=10**9) == {"lines": [], "next": 1, "more": False}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=12) | st.text(alphabet="./\\%\0a", max_size=12))
def test_no_name_makes_it_fail(watching, folder, name):
    status, _, found = watching.ask("GET", f"/runs/{quote(name.encode('utf-8', 'surrogatepass'), safe='')}/metrics")
    assert status == 404, found
    assert found["error"]["message"].endswith(".")


def test_without_runs_or_without_a_model(server, watching):
    assert server.ask("GET", "/runs")[2] == {"runs": None}
    status, _, found = server.ask("GET", "/runs/a/metrics")
    assert (status, found["error"]["code"]) == (404, "no_runs")
    assert watching.ask("GET", "/v1/models")[2]["data"] == []
    assert watching.ask("GET", "/health")[2] == {"status": "ok", "model": None}
    for path in ("/v1/completions", "/inspect"):
        status, _, found = watching.ask("POST", path, {"prompt": "a"})
        assert (status, found["error"]["code"]) == (404, "model_not_found")
        assert found["error"]["message"] == "This server has no model; it only shows runs."
    assert watching.ask("GET", "/v1/models/tiny")[0] == 404


def test_the_key_guards_the_runs(start, served, folder):
    server = start(served, Limits(), runs=folder, api_key="key")
    assert server.ask("GET", "/runs")[0] == 401
    assert server.ask("GET", "/runs/a/metrics")[0] == 401
    assert server.ask("GET", "/runs", headers={"Authorization": "Bearer key"})[0] == 200


def test_the_command_finds_out_what_a_folder_is(folder, serving_run, tmp_path):
    assert holds_runs(serving_run.parent)
    assert not holds_runs(serving_run)
    assert not holds_runs(folder)
    assert not holds_runs(tmp_path / "nothing")
    done = command("serve")
    assert done.exit_code == 2
    assert "Give a RUN to serve, a folder of runs to watch with --runs, or both." in done.output
    assert command("serve", "--runs", tmp_path / "nothing").exit_code == 2
    done = command("serve", serving_run.parent, "--ema")
    assert done.exit_code == 2
    assert "--name, --activations, --ema and --checkpoint need a RUN to serve." in done.output
