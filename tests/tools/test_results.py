"""The rows in results/: today's programs know them by their recipes."""

import json
from pathlib import Path

import pytest

from tools.bench.train_candidates import BASELINES, OURS
from tools.bench.train_jobs import Job

RESULTS = Path(__file__).resolve().parents[2] / "results"
FILES = [path for path in sorted(RESULTS.glob("*.json")) if "rows" in json.loads(path.read_text(encoding="utf-8"))]
FILES = [path for path in FILES if isinstance(json.loads(path.read_text(encoding="utf-8"))["rows"], list)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_row_is_known_by_its_recipe(path):
    """bench_train.py makes none of them again; rows of experimental code have no recipe, or a name of their own."""
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        if row.get("name") in {**OURS, **BASELINES} and "recipe" in row and "seed" in row:  # a speed has no seed
            budget = row.get("tokens_asked"), row.get("minutes_asked"), row.get("threads", 2)
            job = Job(row["name"], tuple(row["settings"]), row["seed"], *budget)
            assert job.made(row), (row["name"], row["settings"])


def test_every_file_is_explained():
    table = (RESULTS / "README.md").read_text(encoding="utf-8")
    for path in RESULTS.glob("*.json"):
        assert f"({path.name})" in table, path.name
