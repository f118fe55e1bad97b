"""tools/vocabulary_report.py: the table of vocabularies, its chart, and the best of several settings."""

import json

import pytest
from click.testing import CliRunner

from tools import vocabulary_report


def row(vocabulary, size, name, score, *settings, seed=1, mixer=None):
    return {
        "name": name,
        "settings": list(settings),
        "seed": seed,
        "recipe": {} if mixer is None else {"model.mixer": mixer},
        "vocabulary": vocabulary,
        "vocab_size": size,
        "bits_per_byte": score,
        "parameters": 2_000_000,
        "packed_bytes": 1_250_000,
        "tokens": 3_000_000,
        "peak_rss_mb": 900.0,
        "train_bytes_per_token": 4.0,
        "speed": {"minutes": 10, "tokens_per_second": 5_000.0},
    }


def report(tmp_path, rows, *words):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": rows}))
    return CliRunner().invoke(vocabulary_report.main, [str(path), *map(str, words)])


def test_a_line_is_the_mean_of_its_seeds(tmp_path):
    rows = [
        row("gpt2", 50_257, "tree", 1.5),
        row("bpe-2048", 2_048, "dense", 1.70, seed=2),
        row("bpe-2048", 2_048, "dense", 1.60),
        row("bpe-2048", 2_048, "dense", 1.9, mixer="mlgru"),
        {"name": "tree", "minutes_asked": 10},  # of another program
    ]
    done = report(tmp_path, rows)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()[2:]
    assert len(lines) == 3
    assert lines[0] == (
        "| bpe-2048 | 2,048 | dense | conv | 1.6500 | 1.6000, 1.7000 | 2,000,000 | 1.25 | 3.00M | 5,000 | 20.0 | 900 |"
    )
    assert "| mlgru | 1.9000 |" in lines[1]


def test_the_best_value_of_a_setting_is_bold(tmp_path):
    rates = {"1e-3": 2.1, "2e-3": 2.0, "4e-3": 2.2}
    rows = [row("bytes", 257, "dense", score, f"adamw_lr={rate}") for rate, score in rates.items()]
    done = report(tmp_path, rows, "--best", "adamw_lr")
    assert "| bytes | dense | conv | 1e-3: 2.1000, **2e-3: 2.0000**, 4e-3: 2.2000 |" in done.output


def test_the_chart_has_a_line_per_head(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row("a", size, name, 1.5) for size in (2_048, 8_192) for name in ("dense", "tree")]
    (axes,) = vocabulary_report.draw([*rows, row("a", 8_192, "tree", 1.6, mixer="mlgru")]).axes
    assert [line.get_label() for line in axes.lines] == ["dense head", "tree head", "tree head, mlgru mixer"]
    done = report(tmp_path, rows, "--plot", tmp_path / "chart.png")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_another_kind_are_a_sentence(tmp_path):
    done = report(tmp_path, [{"name": "tree", "minutes_asked": 10}])
    assert done.exit_code == 2
    assert "has no rows of bench_train.py --speeds" in done.output
