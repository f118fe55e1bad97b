"""tools/bench_serve.py checks the server's texts before it times them."""

import json

from click.testing import CliRunner

from tools import bench_serve


def bench(*arguments):
    return CliRunner().invoke(bench_serve.main, [str(argument) for argument in arguments])


def test_both_loops_are_measured(run, tmp_path):
    path = tmp_path / "out.json"
    done = bench("--quick", "--run", run, "--threads", 1, "--json", path)
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text())["rows"]
    assert [(row["loop"], row.get("streams")) for row in rows] == [
        ("closed", 1),
        ("closed", 4),
        ("open", None),
        ("open", None),
    ]
    for row in rows:
        assert row["tokens_per_s"] > row["requests_per_s"] > 0
        assert row["request_ms"]["p99"] >= row["request_ms"]["median"] >= row["first_event_ms"]["median"] > 0
        assert f"{row['tokens_per_s']:,.0f}" in done.output
    assert all(row["direct_tokens_per_s"] > 0 for row in rows[:2])


def test_another_text_ends_the_program(run, monkeypatch):
    right = bench_serve.seed_of
    monkeypatch.setattr(bench_serve, "seed_of", lambda seed, index: right(seed + (seed == 5), index))
    done = bench("--quick", "--run", run, "--threads", 1)
    assert done.exit_code == 1
    assert "Wrong result: the server's text 5 is not the one that the model generates." in done.output
