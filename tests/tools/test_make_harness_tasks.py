"""tools/make_harness_tasks.py writes tasks that the harness runs, the same ones for the same seed."""

import importlib
import json
import math
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from helpers import command
from hypothesis import given
from hypothesis import strategies as st

import flashlm_numba as fl
from tools import make_harness_tasks

TEXTS = [" \n".join(f"{letter}{n}" for n in range(40 + 9 * i)) for i, letter in enumerate("abcdef")]


def make(*arguments):
    return CliRunner().invoke(make_harness_tasks.main, [str(argument) for argument in arguments])


def files_of(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "some.parquet"
    pq.write_table(pa.table({"body": [*TEXTS, " ", None]}), path)
    return path


@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 20))
def test_a_question_has_its_own_continuation_and_three_of_other_documents(seed, passage, continuation):
    drawn = make_harness_tasks.questions(TEXTS, 5, passage=passage, continuation=continuation, seed=seed)
    for question in drawn:
        before, choices = question["text"].split(" "), [choice.split(" ") for choice in question["choices"]]
        assert len(before) == passage
        assert [len(choice) for choice in choices] == [continuation] * 4
        own = before + choices[question["answer"]]
        assert " ".join(own) in " ".join(TEXTS["abcdef".index(own[0][0])].split())
        assert len({choice[0][0] for choice in choices}) == 4
        for choice in choices:
            assert " ".join(choice) in " ".join(TEXTS["abcdef".index(choice[0][0])].split())


def test_the_answers_are_at_every_place_about_as_often():
    drawn = make_harness_tasks.questions(TEXTS, 400, passage=5, continuation=5, seed=1)
    places = [question["answer"] for question in drawn]
    assert all(70 < places.count(n) < 130 for n in range(4))


def test_a_seed_gives_the_same_files(parquet, tmp_path):
    for out, seed in (("one", 1), ("again", 1), ("other", 2)):
        done = make(parquet, tmp_path / out, "--column", "body", "--questions", 20, "--seed", seed, "--passage", 9)
        assert done.exit_code == 0, done.output
        assert "heldout_perplexity: 6 documents; heldout_choice: 20 questions" in done.output
    one, again, other = (files_of(tmp_path / out) for out in ("one", "again", "other"))
    assert one.keys() == {
        f"heldout_{kind}" for kind in ("perplexity.yaml", "perplexity.jsonl", "choice.yaml", "choice.jsonl")
    }
    texts = [name for name in one if name.endswith("jsonl")]
    assert all(one[name] == again[name] for name in texts)
    assert one["heldout_choice.jsonl"] != other["heldout_choice.jsonl"]
    assert [row["text"] for row in rows_of(tmp_path / "one" / "heldout_perplexity.jsonl")] == TEXTS


def test_of_a_prepared_folder_only_the_validation_documents_are_used(corpus, corpus_files, tmp_path):
    done = make(corpus, tmp_path / "out", "--questions", 3, "--passage", 3, "--continuation", 2)
    assert done.exit_code == 0, done.output
    wanted = [json.loads(line)["text"] for line in (corpus_files / "validation.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows_of(tmp_path / "out" / "heldout_perplexity.jsonl")] == wanted
    again = make(corpus_files, tmp_path / "files", "--questions", 3, "--passage", 3, "--continuation", 2)
    assert again.exit_code == 0, again.output
    assert files_of(tmp_path / "files")["heldout_choice.jsonl"] == files_of(tmp_path / "out")["heldout_choice.jsonl"]


def test_what_cannot_be_used_is_one_sentence_and_nothing_is_written(parquet, tmp_path):
    for arguments, sentence in (
        ((tmp_path / "nothing",), "nothing"),
        ((parquet,), "text"),  # the column
        ((parquet, "--column", "body", "--passage", 90), "there are only 0; give more text, or smaller --passage and"),
    ):
        done = make(arguments[0], tmp_path / "out", *arguments[1:])
        assert done.exit_code == 1
        assert sentence in done.output
        assert done.output.startswith("Error: ")
        assert not (tmp_path / "out").exists()


def test_the_harness_runs_them(run, parquet, tmp_path, monkeypatch):
    if "CI" not in os.environ:  # where it must be installed
        pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install -e '.[eval]'")
    datasets = importlib.import_module("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    assert make(parquet, tmp_path / "out", "--column", "body", "--questions", 8, "--passage", 9).exit_code == 0
    names = "heldout_perplexity,heldout_choice"
    done = command("eval", run, "--lm-eval", names, "--lm-eval-path", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["results"]
    model = fl.load(run)
    nll = sum(model.score(text).token_nll.sum() for text in TEXTS)
    words = sum(len(re.split(r"\s+", text)) for text in TEXTS)
    assert found["heldout_perplexity"]["word_perplexity,none"] == pytest.approx(math.exp(nll / words), rel=1e-4)
    right = 0
    for row in rows_of(tmp_path / "out" / "heldout_choice.jsonl"):
        before = len(model.score(row["text"]).tokens)
        scores = [model.score(f"{row['text']} {choice}").token_nll[before:].sum() for choice in row["choices"]]
        right += scores.index(min(scores)) == row["answer"]
    assert found["heldout_choice"]["acc,none"] == right / 8
