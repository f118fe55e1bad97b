"""Rows of a results file, written by several processes."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tools.bench import rows


def test_rows_of_several_sessions_are_merged(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": [{"name": "dense"}]}))
    rows.add_row(path, {"name": "tree"})
    assert [row["name"] for row in rows.read_rows(path)] == ["dense", "tree"]


def test_rows_written_at_once_are_all_kept(tmp_path):
    path = tmp_path / "rows.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: rows.add_row(path, {"name": i}), range(40)))
    assert sorted(row["name"] for row in rows.read_rows(path)) == list(range(40))
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def test_a_row_that_cannot_be_written_leaves_the_others(tmp_path):
    path = tmp_path / "rows.json"
    rows.add_row(path, {"name": "tree"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        rows.add_row(path, {"name": "dense", "nll": float("nan")})
    assert [row["name"] for row in rows.read_rows(path)] == ["tree"]


def test_runs_of_equal_minutes_at_unequal_speeds_are_named():
    def row(name, minutes, rate):
        return {"name": name, "minutes_asked": minutes, "tokens": rate * 100, "seconds": 100.0}

    fair = [row("tree", 7, 1000), row("tree", 7, 1040), row("tree", 10, 2000), row("dense", 7, 100)]
    assert rows.uneven([*fair, {"name": "tree", "tokens_asked": 5, "tokens": 5, "seconds": 1.0}]) == []
    (sentence,) = rows.uneven([*fair, row("dense", 7, 125)])
    assert sentence.startswith("dense: the runs of 7 minutes trained at unequal speeds, up to a factor of 1.25")
