"""tools/bench_train.py: one row a run, scored by eval's rule, and none run twice."""

import contextlib
import json
import shutil

import pytest
from click.testing import CliRunner

from flashlm_numba.inference.evaluate import evaluate_run
from tools import bench_train
from tools.bench import processes, rows, train_jobs, train_runs

SMALL = ("dim=16", "ffn_dim=24", "groups=4", "dilations=[1]", "phases=2x16", "embedding_init=random", "warmup_steps=2")


def invoke(*arguments):
    return CliRunner().invoke(bench_train.main, [str(argument) for argument in arguments])


@pytest.fixture
def made_rows(corpus, tmp_path, monkeypatch):
    """Rows of two runs of 4 steps; the runs' folders are kept."""
    monkeypatch.setattr(
        train_runs.tempfile, "TemporaryDirectory", lambda: contextlib.nullcontext(str(tmp_path / "kept"))
    )
    (tmp_path / "kept").mkdir()
    sets = [word for setting in SMALL for word in ("--set", setting)]
    path = tmp_path / "rows.json"
    done = invoke(corpus, path, "tree", "--tokens", 128, "--threads", 1, *sets)
    assert done.exit_code == 0, done.output
    return path, sets


@pytest.mark.slow
def test_a_run_is_scored_by_evals_rule_and_not_run_again(made_rows, corpus, tmp_path, monkeypatch):
    path, sets = made_rows
    (row,) = rows.read_rows(path)
    assert row["steps"] == 4
    assert row["tokens"] == 128
    assert row["nll"] == pytest.approx(evaluate_run(tmp_path / "kept" / "run", None)["nll"], rel=1e-5)  # other threads
    assert row["command"][:3] == ["train", "--head", "tree"]
    monkeypatch.setattr(train_runs, "run_ours", None)  # a second run would fail
    again = invoke(corpus, path, "tree", "--tokens", 128, "--threads", 2, *sets)
    assert again.exit_code == 0, again.output
    assert rows.read_rows(path) == [row]
    shown = invoke("--table", path)
    assert f"| {row['nll']:.3f} |" in shown.output


@pytest.mark.slow
def test_marks_are_scored_and_the_log_is_kept(corpus, tmp_path):
    """A run that was interrupted goes on in its folder; the marks are those of its clock."""
    own = "validation_tokens=60", "memory=ngrams", "ngram_copy_output=add"  # so that the memory is worth something here
    sets = [word for setting in (*SMALL, *own) for word in ("--set", setting)]
    path, runs = tmp_path / "results" / "rows.json", tmp_path / "runs"
    command = [corpus, path, "tree", "--minutes", 0.1, "--marks", "0.02,0.05", "--runs", runs, "--threads", 1, *sets]
    done = invoke(*command)
    assert done.exit_code == 0, done.output
    (row,) = rows.read_rows(path)
    first, second = row["marks"]
    assert (first["minutes"], second["minutes"]) == (0.02, 0.05)
    assert first["tokens"] < second["tokens"] < row["tokens"]
    assert 0.02 * 60 <= first["seconds"] < second["seconds"] < row["seconds"]
    assert row["memory"]["nll"] == row["nll"] < row["memory"]["head_nll"]
    assert first["memory"]["nll"] == first["nll"]
    assert first["text"].startswith("The")
    assert row["text"].startswith("The")
    (folder,) = runs.iterdir()
    run = folder / "run"
    name = train_runs.kept_checkpoints(run, [0.05])[0.05][0]
    assert second["nll"] == pytest.approx(evaluate_run(run, None, checkpoint_name=name)["nll"], rel=1e-5)
    (log,) = (tmp_path / "results" / "rows").iterdir()
    assert log.read_bytes() == (run / "metrics.jsonl").read_bytes()
    path.unlink()  # as if it had ended before its row was written
    done = invoke(*command)
    assert done.exit_code == 0, done.output
    (again,) = rows.read_rows(path)
    assert again["nll"] == row["nll"]
    assert "interrupted" in again["note"]
    assert "note" not in row
    path.unlink()
    config = json.loads((run / "config.json").read_text())
    config["optimizer"]["clip"] = 0.5  # as a recipe of another day might have had
    (run / "config.json").write_text(json.dumps(config))
    done = invoke(*command)
    assert done.exit_code == 1
    assert "was begun with other settings ({'optimizer.clip': 0.5}, not {'optimizer.clip': None})" in done.stderr


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(corpus, tmp_path):
    sets = [word for setting in (*SMALL, "adamw_lr=1e30,1e-3") for word in ("--set", setting)]  # the first diverges
    done = invoke(corpus, tmp_path / "rows.json", "tree", "--tokens", 128, "--threads", 1, *sets)
    assert done.exit_code == 1
    assert "1 of 2 runs failed" in done.stderr
    assert "adamw_lr=1e30" in done.stderr.splitlines()[-1]
    (row,) = rows.read_rows(tmp_path / "rows.json")
    assert row["settings"][-1] == "adamw_lr=1e-3"


@pytest.mark.slow
def test_a_row_of_other_data_is_not_this_ones(made_rows, corpus, tmp_path, monkeypatch):
    path, sets = made_rows
    made = []
    monkeypatch.setattr(train_runs, "run_ours", lambda job, *more: made.append(job.name) or {"nll": 1})
    monkeypatch.setattr(bench_train, "table", lambda rows: "row")
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    manifest = json.loads((corpus / "manifest.json").read_text())
    validation = manifest["splits"]["validation"]
    validation |= {"text_tokens": validation["text_tokens"] + 1, "documents": validation["documents"] - 1}
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert invoke(other, path, "tree", "--tokens", 128, "--threads", 1, *sets).exit_code == 0
    assert made == ["tree"]
    assert invoke(other, path, "tree", "--tokens", 128, "--threads", 1, *sets).exit_code == 0
    assert made == ["tree"]
    validation |= {"shards": [], "tokens": 0, "text_tokens": 0, "documents": 0}
    (other / "manifest.json").write_text(json.dumps(manifest))
    done = invoke(other, path, "tree", "--tokens", 128, *sets)
    assert done.exit_code == 2
    assert "holds no validation text to score by" in done.stderr


@pytest.mark.parametrize("text", ['{"rows": 4096}', '{"rows": null}', '{"rows": [1]}', "[]"])
def test_a_file_of_another_kind_is_a_sentence(text, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    done = invoke("--table", tmp_path / "rows.json")
    assert done.exit_code == 2
    assert "is no results file of this program" in done.output


def test_a_baseline_whose_loss_is_no_number_has_failed(monkeypatch, tmp_path):
    monkeypatch.setattr(train_runs, "run_process", lambda words: ('{"val_nll": NaN, "step": 3}', 0.0))
    with pytest.raises(processes.RunFailed, match="torch:eager is nan after step 3"):
        train_runs.run_baseline(train_jobs.Job("torch:eager", (), 1, 300_000, None, 2), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["d", "r.json", "tree"], "either --tokens or --minutes"),
        (["d", "r.json", "tree", "--tokens", "1", "--minutes", "1"], "either --tokens or --minutes"),
        (["d", "r.json", "oak", "--tokens", "1"], "There is no oak; there are dense"),
        (["d", "r.json", "tree", "--tokens", "1", "--set", "clip"], "--set takes key=value"),
        (["d", "r.json", "tree", "--tokens", "1"], "make a corpus with `flashlm-numba prepare"),
        (["d", "r.json", "tree", "--tokens", "1", "--marks", "1"], "--marks must lie between"),
        (["d", "r.json", "torch:v3", "--tokens", "1"], "torch:v3 has a schedule of its own"),
        (["d", "r.json", "tree", "--minutes", "5", "--marks", "1,5"], "--marks must lie between"),
        (["d", "r.json", "tree", "--minutes", "5", "--marks", "x"], "--marks takes minutes"),
        (["d", "r.json", "tree", "--tokens", "1", "--set", "oak=1"], "There is no setting 'oak'"),
        (["d", "r.json", "tree", "--tokens", "1", "--speeds", __file__], "--speeds belongs to --minutes"),
        (["d", "r.json", "tree", "--minutes", "5", "--marks", "1", "--speeds", __file__], "without --marks"),
    ],
)
def test_usage_errors_say_what_to_do(arguments, sentence):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert sentence in done.output


def test_what_cannot_work_is_said_before_the_work(corpus, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "rows.json", tmp_path):
        done = invoke(corpus, path, "tree", "--tokens", 128)
        assert done.exit_code == 2
        assert "cannot be written" in done.output
    (tmp_path / "other.json").write_text('{"tree": 1}')
    for path in (tmp_path / "other.json", tmp_path / "file", tmp_path):
        done = invoke("--table", path)
        assert done.exit_code == 2
        assert "is no results file of this program" in done.output
    done = invoke(corpus, tmp_path / "other.json", "tree", "--tokens", 128)
    assert done.exit_code == 2
    assert (tmp_path / "other.json").read_text() == '{"tree": 1}'
    monkeypatch.setattr(bench_train.importlib.util, "find_spec", lambda name: None)
    done = invoke(corpus, tmp_path / "rows.json", "tree", "torch:eager", "--tokens", 128)
    assert done.exit_code == 2
    assert "torch:eager needs torch" in done.output
    assert not (tmp_path / "rows.json").exists()
