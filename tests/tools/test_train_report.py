"""tools/train_report.py: the page says what the rows say, and its commands make these rows."""

import json
import shlex

import pytest
from click.testing import CliRunner

from tools import bench_train, train_report
from tools.bench import train_runs

MACHINE = {"cpu": "A CPU", "cores": 2, "threads": 2}


def row(name, minutes, nll, marks=(), **more):
    at = [
        {"minutes": m, "seconds": 60 * m + 1, "tokens": 5, "nll": n, "bits_per_byte": n / 3, **more} for m, n in marks
    ]
    return {
        "name": name,
        "settings": [],
        "seed": 1,
        "minutes_asked": minutes,
        "threads": 2,
        "nll": nll,
        "bits_per_byte": nll / 3,
        "seconds": 60.0 * minutes,
        "tokens": 600_000,
        "parameters": 13_600_000,
        "peak_rss_mb": 700.0,
        "machine": MACHINE,
        **more,
        **({"marks": at} if at else {}),
    }


ROWS = [
    row("tree", 10.0, 5.25, [(1.0, 6.5), (5.0, 5.75)], text="The * end\nof it"),
    row("torch:v3", 72.0, 6.75, [(5.0, 7.25)]) | {"note": "stopped early."},
]


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": ROWS}))
    return path


def invoke(*arguments):
    return CliRunner().invoke(train_report.main, [str(argument) for argument in arguments])


def test_the_page_and_the_chart_show_every_run(results, tmp_path):
    pytest.importorskip("matplotlib")
    done = invoke(results, tmp_path / "page.md", tmp_path / "chart.png")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "page.md").read_text()
    assert "| run | parameters | tokens/s | peak MB | 1 min | 5 min | end |" in text
    assert (
        "| tree, 10 minutes | 13,600,000 | 1,000 | 700 | 6.500 (2.167) | 5.750 (1.917) | 5.250 (1.750), 10.0 min |"
        in text
    )
    assert "| torch:v3, 72 minutes | 13,600,000 | 139 | 700 | - | 7.250 (2.417) | 6.750 (2.250), 72.0 min |" in text
    assert "- 5 min: *The end of it*" in text
    assert "- 10 min: *The end of it*" in text
    assert "- torch:v3, 72 minutes: stopped early." in text
    assert "A CPU, 2 cores, 2 threads: 2 runs" in text
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    axes = train_report.draw(ROWS).axes[0]
    assert [line.get_label() for line in axes.lines] == [
        "flashlm-numba: tree head (default)",
        "PyTorch: FlashLM v3's recipe",
    ]
    assert axes.lines[0].get_ydata().tolist() == [6.5, 5.75, 5.25]


def test_runs_of_one_name_by_two_recipes_are_told_apart():
    rows = [
        row("tree", 72.0, 5.0, date="2026-11-25"),
        row("tree", 72.0, 4.5, date="2026-11-26"),
        row("dense", 72.0, 5.5),
    ]
    assert [train_report.label(r) for r in train_report.labelled(rows)] == [
        "tree, 72 minutes, 2026-11-25",
        "tree, 72 minutes, 2026-11-26",
        "dense, 72 minutes",
    ]
    assert len(train_report.table(train_report.labelled(rows)).splitlines()) == 5


def test_the_commands_make_these_rows(monkeypatch, corpus, tmp_path):
    done = []

    def made(job, data, *folder):
        done.append((job.name, job.minutes, job.marks))
        return row(job.name, job.minutes, 6.0)

    monkeypatch.setattr(train_runs, "run_ours", made)
    monkeypatch.setattr(train_runs, "run_baseline", made)
    monkeypatch.setattr(train_runs.shutil, "copyfile", lambda *paths: None)
    monkeypatch.setattr(bench_train.importlib.util, "find_spec", lambda name: name)
    for line in train_report.commands(ROWS).splitlines():
        words = shlex.split(line.replace("TOKENS", str(corpus)).replace("RESULTS.json", str(tmp_path / "made.json")))
        assert CliRunner().invoke(bench_train.main, words[2:]).exit_code == 0, line
    assert done == [("tree", 10.0, (1.0, 5.0)), ("torch:v3", 72.0, (5.0,))]


@pytest.mark.parametrize(("page", "chart"), [("page.md", "chart.xyz"), ("file/page.md", "chart.png"), ("page.md", ".")])
def test_nothing_is_written_where_one_of_both_cannot_be(page, chart, results, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    done = invoke(results, tmp_path / page, tmp_path / chart)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_without_such_runs_is_a_sentence(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"rows": [{"name": "tree", "tokens_asked": 5}]}')
    done = invoke(path, tmp_path / "page.md", tmp_path / "chart.png")
    assert done.exit_code == 2
    assert "has no runs of so many minutes" in done.output
    assert not (tmp_path / "page.md").exists()
