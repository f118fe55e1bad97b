"""A run whose folder, or whose tokens, or both have moved goes on, with the same bits."""

import json
import shutil

import pytest
from helpers import command
from run_helpers import read_losses, resume, start

from flashlm_numba.inference.evaluate import evaluate_run
from flashlm_numba.model.build import read_config
from flashlm_numba.model.describe import describe_run
from flashlm_numba.model.export import export_run
from flashlm_numba.model.settings import with_settings
from flashlm_numba.system.errors import UserError


@pytest.fixture
def place(tiny_run, corpus, tmp_path):
    """A folder with tokens and a run of two steps."""
    shutil.copytree(corpus, tmp_path / "first" / "tokens")
    folder = tmp_path / "first" / "runs" / "one"
    start(with_settings(tiny_run, ["head.name=dense"]), tmp_path / "first" / "tokens", folder, steps=2)
    return tmp_path / "first"


def test_config_names_the_tokens_relative_to_the_run(place):
    stored = json.loads((place / "runs" / "one" / "config.json").read_text())
    assert stored["data"] == "../../tokens"
    assert stored["data_absolute"] == str(place / "tokens")
    assert read_config(place / "runs" / "one").data == str(place / "tokens")


def test_run_and_tokens_moved_together(place, tmp_path):
    score = evaluate_run(place / "runs" / "one")["nll"]
    shutil.copytree(place, tmp_path / "other")
    resume(place / "runs" / "one", steps=4)
    expected = read_losses(place / "runs" / "one")
    shutil.rmtree(place)
    moved = tmp_path / "other" / "runs" / "one"
    assert evaluate_run(moved)["nll"] == score
    assert describe_run(moved)["data"] == str(tmp_path / "other" / "tokens")
    resume(moved, steps=4)
    assert read_losses(moved) == expected
    assert json.loads((moved / "config.json").read_text())["data_absolute"] == str(tmp_path / "other" / "tokens")


def test_run_moved_alone_finds_its_tokens_where_they_were(place, tmp_path):
    shutil.move(place / "runs" / "one", tmp_path / "deep" / "er" / "one")
    # other tokens lie where the relative path leads now
    shutil.copytree(place / "tokens", tmp_path / "tokens")
    (tmp_path / "tokens" / "manifest.json").write_text("{}")
    assert resume(tmp_path / "deep" / "er" / "one", steps=3).status == 0


def test_tokens_moved_alone_are_named_with_data(place, tmp_path):
    run = place / "runs" / "one"
    (place / "tokens").rename(tmp_path / "elsewhere")
    for words in (("train", "--resume", run, "--steps", 3), ("eval", run)):
        done = command(*words)
        assert done.exit_code == 1
        assert f"are not in {place / 'tokens'}: name their folder with --data DIR" in done.stderr
    export_run(run, tmp_path / "file.safetensors")
    for words in (("eval", run), ("eval", tmp_path / "file.safetensors"), ("train", "--resume", run, "--steps", 3)):
        done = command(*words, "--data", tmp_path / "elsewhere")
        assert done.exit_code == 0, done.output
    assert resume(run, steps=4).status == 0  # the new place is stored


def test_data_with_other_tokens_are_refused(place, corpus_files, tmp_path):
    done = command("prepare", corpus_files, "--split", "train", "--out", tmp_path / "others")
    assert done.exit_code == 0
    run = place / "runs" / "one"
    for words in (("train", "--resume", run, "--steps", 3), ("eval", run)):
        done = command(*words, "--data", tmp_path / "others")
        assert done.exit_code == 1
        assert "are not the ones that" in done.stderr
    assert command("eval", run, place / "tokens", "--data", place / "tokens").exit_code == 2
    assert command("train", "--data", place / "tokens", "--steps", 1).exit_code == 2


def test_run_of_an_earlier_version_resumes(place):
    path = place / "runs" / "one" / "config.json"
    values = json.loads(path.read_text())
    values["data"] = values.pop("data_absolute")
    path.write_text(json.dumps(values))
    assert resume(place / "runs" / "one", steps=3).status == 0
    path.write_text(json.dumps(values | {"data": "\ud800\0"}))
    with pytest.raises(UserError, match="--data DIR"):
        resume(place / "runs" / "one", steps=4)
