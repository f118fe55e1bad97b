"""tools/bench_speed.py measures speeds; tools/bench_train.py turns minutes into tokens by them."""

import json

import pytest
from click import ClickException
from click.testing import CliRunner

from tools import bench_speed, bench_train
from tools.bench import rows, train_runs
from tools.bench.speeds import Speed, speed_of, speed_of_log
from tools.bench.train_jobs import Job

SMALL = ("dim=16", "ffn_dim=24", "groups=4", "dilations=[1]", "phases=2x16", "embedding_init=random", "warmup_steps=2")
SETS = [word for setting in SMALL for word in ("--set", setting)]


def invoke(program, *arguments):
    return CliRunner().invoke(program.main, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_minutes_become_tokens_by_a_measured_speed(corpus, tmp_path, monkeypatch):
    speeds, path = tmp_path / "speeds.json", tmp_path / "rows.json"
    done = invoke(bench_speed, speeds, "tree", "--data", corpus, "--seconds", 1, "--turns", 2, "--threads", 1, *SETS)
    assert done.exit_code == 0, done.output
    turns = rows.read_rows(speeds)
    assert len(turns) == 2
    assert all(turn["tokens_per_second"] > 0 and turn["steps"] > 2 for turn in turns)
    trained = []
    monkeypatch.setattr(train_runs, "run_ours", lambda job, *more: trained.append(job) or {"nll": 1})
    monkeypatch.setattr(bench_train, "table", lambda rows: "row")
    words = [corpus, path, "tree", "--minutes", 3, "--speeds", speeds, "--threads", 1, *SETS]
    for _ in range(2):  # the second finds the row
        done = invoke(bench_train, *words, "--set", "adamw_lr=1e-3")  # a rate changes no speed
        assert done.exit_code == 0, done.output
    (job,), (row,) = trained, rows.read_rows(path)
    size = bench_train.text_tokens(corpus)
    assert job.tokens == row["tokens_asked"] == speed_of(job, size, turns).tokens(3)
    assert row["speed"]["minutes"] == 3
    assert row["speed"]["turns"] == 2
    assert "--minutes" not in row["command"]
    done = invoke(bench_train, *words, "--set", "dim=32")
    assert done.exit_code == 1
    assert "The file of speeds has none of tree" in done.output


def turn(job, rate, data, **other):
    row = {"name": job.name, "recipe": job.recipe, "data": data, "threads": job.threads, "start_seconds": 6.0}
    return {**row, "tokens_per_second": rate, **other}


def test_the_median_of_the_turns_that_fit_counts():
    job, data = Job("tree", ("adamw_lr=4e-3",), 1, None, 10, 2), {"train": 100, "validation": 10}
    plain, other = Job("tree", (), 1, None, 10, 2), Job("tree", ("dim=64",), 1, None, 10, 2)
    found = [turn(plain, rate, data) for rate in (900.0, 1000.0, 5000.0)]
    found += [turn(other, 1.0, data), turn(plain, 1.0, {**data, "train": 99}), turn(plain, 1.0, data, threads=1)]
    assert speed_of(job, data, found) == Speed(6.0, 1000.0, 3)
    assert Speed(6.0, 1000.0, 3).tokens(10) == 582_000  # 2 % and the start are not training
    with pytest.raises(ClickException, match="too few: starting alone takes 6 seconds"):
        Speed(6.0, 1000.0, 3).tokens(0.1)
    with pytest.raises(ClickException, match="has none of dense"):
        speed_of(Job("dense", (), 1, None, 10, 2), data, found)


def test_a_log_tells_the_start_from_the_steps():
    lines = [{"seconds": 7.0 + 2 * step, "tokens": 100 * step} for step in range(1, 5)]
    assert speed_of_log(lines) == {"start_seconds": 7.0, "tokens_per_second": 50.0}
    with pytest.raises(ClickException, match="says nothing about the speed"):
        speed_of_log(lines[:2])


def test_a_run_that_ends_by_itself_is_no_speed(corpus, tmp_path):
    path = tmp_path / "speeds.json"
    done = invoke(bench_speed, path, "tree", "--data", corpus, "--seconds", 1, "--threads", 1, "--set", "clip=-1")
    assert done.exit_code == 2
    assert "clip" in done.output
    assert not path.exists()
    path.write_text(json.dumps({"rows": 1}))
    done = invoke(bench_speed, path, "tree", "--data", corpus)
    assert done.exit_code == 2
    assert "is no results file of this program" in done.output
