"""tools/bench_train.py: one row a run, scored by eval's rule, and none run twice."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from click import ClickException
from click.testing import CliRunner

from flashlm_numba.inference.evaluate import evaluate_run
from flashlm_numba.model.recipes import RECIPES, from_recipe
from tools import bench_train

SMALL = ("dim=16", "ffn_dim=24", "groups=4", "dilations=[1]", "phases=2x16", "embedding_init=random", "warmup_steps=2")


def invoke(*arguments):
    return CliRunner().invoke(bench_train.main, [str(argument) for argument in arguments])


@pytest.fixture
def rows(corpus, tmp_path, monkeypatch):
    """Rows of two runs of 4 steps; the runs' folders are kept."""
    monkeypatch.setattr(
        bench_train.tempfile, "TemporaryDirectory", lambda: contextlib.nullcontext(str(tmp_path / "kept"))
    )
    (tmp_path / "kept").mkdir()
    sets = [word for setting in SMALL for word in ("--set", setting)]
    path = tmp_path / "rows.json"
    done = invoke(corpus, path, "tree", "--tokens", 128, "--threads", 1, *sets)
    assert done.exit_code == 0, done.output
    return path, sets


def test_a_run_is_scored_by_evals_rule_and_not_run_again(rows, corpus, tmp_path, monkeypatch):
    path, sets = rows
    (row,) = bench_train.read_rows(path)
    assert row["steps"] == 4
    assert row["tokens"] == 128
    assert row["nll"] == pytest.approx(evaluate_run(tmp_path / "kept" / "run", None)["nll"], rel=1e-5)  # other threads
    assert row["command"][:3] == ["train", "--head", "tree"]
    monkeypatch.setattr(bench_train, "run_ours", None)  # a second run would fail
    again = invoke(corpus, path, "tree", "--tokens", 128, "--threads", 2, *sets)
    assert again.exit_code == 0, again.output
    assert bench_train.read_rows(path) == [row]
    shown = invoke("--table", path)
    assert f"| {row['nll']:.3f} |" in shown.output


def test_a_peer_gets_the_default_recipe_in_its_own_words():
    job = bench_train.Job("torch:adaptive", ("adamw_lr=1e-3",), 3, 300_000, None, 2)
    words = job.command
    assert words[words.index("--adamw-lr") + 1] == "1e-3"
    assert words[words.index("--steps") + 1] == "147"  # of 2,048 tokens
    assert words[words.index("--decay") + 1] == "59"  # 40 %
    assert words[words.index("--div-value") + 1] == "1"


def test_marks_are_scored_and_the_log_is_kept(corpus, tmp_path):
    """A run that was interrupted goes on in its folder; the marks are those of its clock."""
    sets = [word for setting in (*SMALL, "validation_tokens=60") for word in ("--set", setting)]
    path, runs = tmp_path / "results" / "rows.json", tmp_path / "runs"
    command = [corpus, path, "tree", "--minutes", 0.1, "--marks", "0.02,0.05", "--runs", runs, "--threads", 1, *sets]
    done = invoke(*command)
    assert done.exit_code == 0, done.output
    (row,) = bench_train.read_rows(path)
    first, second = row["marks"]
    assert (first["minutes"], second["minutes"]) == (0.02, 0.05)
    assert first["tokens"] < second["tokens"] < row["tokens"]
    assert 0.02 * 60 <= first["seconds"] < second["seconds"] < row["seconds"]
    assert first["text"].startswith("The")
    assert row["text"].startswith("The")
    (folder,) = runs.iterdir()
    run = folder / "run"
    name = bench_train.kept_checkpoints(run, [0.05])[0.05][0]
    assert second["nll"] == pytest.approx(evaluate_run(run, None, checkpoint_name=name)["nll"], rel=1e-5)
    (log,) = (tmp_path / "results" / "rows").iterdir()
    assert log.read_bytes() == (run / "metrics.jsonl").read_bytes()
    path.unlink()  # as if it had ended before its row was written
    done = invoke(*command)
    assert done.exit_code == 0, done.output
    (again,) = bench_train.read_rows(path)
    assert again["nll"] == row["nll"]
    assert "interrupted" in again["remark"]
    assert "remark" not in row
    path.unlink()
    config = json.loads((run / "config.json").read_text())
    config["optimizer"]["clip"] = 0.5  # as a recipe of another day might have had
    (run / "config.json").write_text(json.dumps(config))
    done = invoke(*command)
    assert done.exit_code == 1
    assert "was begun with other settings ({'optimizer.clip': 0.5}, not {'optimizer.clip': None})" in done.stderr


def test_the_peers_are_given_what_the_default_recipe_does():
    run = from_recipe("default")
    (phase,) = run.training.phases
    assert bench_train.TORCH["batch"] == f"{phase.batch_size}x{phase.seq_len}"
    for name, option in bench_train.TORCH_OPTION.items():
        if name != "phases":
            section = run.model if hasattr(run.model, name) else run.optimizer
            value = bench_train.TORCH.get(option, "0.02")  # NorMuon's rate is the peer's own default
            assert [float(part) for part in value.split(",")] == np.ravel(getattr(section, name)).tolist(), name
    assert bench_train.TORCH.keys() <= bench_train.TORCH_V3.keys()  # the published recipe takes nothing over


def test_no_setting_of_the_default_recipe_is_forgotten_for_the_peers():
    ours = {
        "activations",
        "sparse_adamw",
        "rowwise_exp_avg_sq",
        "normuon_iterations",
    }  # how it is computed
    changed = {name.partition(".") for name in bench_train.differences(from_recipe("default"))}
    settings = {name for section, _, name in changed if section in ("model", "optimizer")}
    assert settings
    assert settings - ours <= bench_train.TORCH_OPTION.keys()


def test_a_row_is_known_by_its_recipe_however_it_was_asked_for():
    def job(name="tree", *settings):
        return bench_train.Job(name, settings, 1, 300_000, None, 2)

    row = {**job().key, "recipe": job().recipe}
    assert job().made(row)
    assert job("tree", "leaky_decay=0.98").made(row)  # as it is
    assert not job("tree", "leaky_decay=0.9").made(row)
    assert not job("tree:adaptive").made(row)
    assert not job("dense").made({**row, "name": "dense"})
    assert job().made(job().key)  # a row of before recipes were written down
    assert not job("tree", "leaky_decay=0.98").made(job().key)
    peer = job("torch:adaptive@random", "adamw_lr=4e-3")
    assert peer.made({**peer.key, "recipe": peer.recipe})
    assert not job("torch:adaptive@random").made({**peer.key, "recipe": peer.recipe})


def test_a_row_must_have_the_marks_that_are_asked_for():
    def job(*marks):
        return bench_train.Job("tree", (), 1, None, 7.0, 2, marks)

    row = {**job().key, "recipe": job().recipe}
    assert job().made(row)
    assert not job(1.0).made(row)
    assert job(1.0).made({**row, "marks": [{"minutes": 1.0}, {"minutes": 5.0}]})
    assert not job(1.0, 6.5).made({**row, "marks": [{"minutes": 1.0}]})
    assert job(1.0, 6.5).made({**row, "marks": [{"minutes": 1.0}], "marks_asked": [1.0, 6.5]})  # it ended before 6.5


def test_the_file_names_of_two_recipes_differ():
    slugs = {bench_train.Job("tree", (), 1, None, 7.0, 2).slug}
    with pytest.MonkeyPatch.context() as patch:
        recipe = from_recipe("default", ["leaky_decay=0.5"])
        patch.setitem(RECIPES, "default", recipe)
        slugs.add(bench_train.Job("tree", (), 1, None, 7.0, 2).slug)
    slugs.add(bench_train.Job("tree", (), 1, None, 7.0, 2, (1.0,)).slug)
    slugs.add(bench_train.Job("tree", tuple(f"adamw_lr={n}e-3" for n in range(90)), 1, None, 7.0, 2).slug)
    assert len(slugs) == 4
    assert all(slug.startswith("tree-7min-seed1-") and len(slug) < 40 for slug in slugs)


def test_a_run_that_fails_does_not_stop_the_others(corpus, tmp_path):
    sets = [word for setting in (*SMALL, "adamw_lr=1e30,1e-3") for word in ("--set", setting)]  # the first diverges
    done = invoke(corpus, tmp_path / "rows.json", "tree", "--tokens", 128, "--threads", 1, *sets)
    assert done.exit_code == 1
    assert "1 of 2 runs failed" in done.stderr
    assert "adamw_lr=1e30" in done.stderr.splitlines()[-1]
    (row,) = bench_train.read_rows(tmp_path / "rows.json")
    assert row["settings"][-1] == "adamw_lr=1e-3"


def test_a_row_of_other_data_is_not_this_ones(rows, corpus, tmp_path, monkeypatch):
    path, sets = rows
    made = []
    monkeypatch.setattr(bench_train, "run_ours", lambda job, *more: made.append(job.name) or {"nll": 1})
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


def test_a_signal_is_passed_on_and_waited_for():
    """Only the tool gets it, as with kill; the run saves, and only then does the tool end."""
    # not SIGINT, which a job in the background ignores
    child = "import signal, sys, time; signal.signal(15, lambda *a: (time.sleep(1), print('saved', file=sys.stderr), "
    child += "sys.exit(143))); print('up', file=sys.stderr, flush=True); time.sleep(60)"
    code = f"from tools import bench_train; bench_train.run_process(['-c', {child!r}])"
    tool = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=bench_train.ROOT)
    assert tool.stderr.readline() == "up\n"
    tool.send_signal(signal.SIGTERM)
    _, shown = tool.communicate(timeout=60)
    assert tool.returncode == 1
    assert shown.startswith("saved\n")
    assert "Stopped by SIGTERM" in shown


@pytest.mark.parametrize("text", ['{"rows": 4096}', '{"rows": null}', '{"rows": [1]}', "[]"])
def test_a_file_of_another_kind_is_a_sentence(text, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    done = invoke("--table", tmp_path / "rows.json")
    assert done.exit_code == 2
    assert "is no results file of this program" in done.output


@pytest.mark.parametrize(("status", "failure"), [(1, bench_train.RunFailed), (130, ClickException)])
def test_a_process_that_was_stopped_stops_the_tool(status, failure):
    with pytest.raises(ClickException, match=f"ended with status {status}") as caught:
        bench_train.run_process(["-c", f"raise SystemExit({status})"])
    assert type(caught.value) is failure


def test_a_peer_whose_loss_is_no_number_has_failed(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_train, "run_process", lambda words: ('{"val_nll": NaN, "step": 3}', 0.0))
    with pytest.raises(bench_train.RunFailed, match="torch:eager is nan after step 3"):
        bench_train.run_peer(bench_train.Job("torch:eager", (), 1, 300_000, None, 2), tmp_path)


def test_a_peers_budget_is_in_tokens_of_its_own_batches():
    words = bench_train.Job("torch:adaptive", ("phases=8x512",), 3, 300_000, None, 2).command
    assert words[words.index("--steps") + 1] == "74"  # of 4,096 tokens


def test_a_list_in_brackets_is_one_setting():
    assert bench_train.expand(["dilations=[1,4,16],[1,4,64]", "clip=1"]) == [
        ("dilations=[1,4,16]", "clip=1"),
        ("dilations=[1,4,64]", "clip=1"),
    ]


def test_the_published_peer_keeps_its_schedule():
    words = bench_train.Job("torch:v3", (), 1, None, 72.0, 2, (10.0,)).command
    for name, value in (
        ("total", "10000"),
        ("decay", "1000"),
        ("positions", "0.25"),
        ("minutes", "72"),
        ("mark", "10"),
        ("mixer-scale", "1"),
        ("glu-scale", "1"),
        ("trunk-lr-factor", "1"),
        ("adamw-beta1", "0.9"),
        ("adamw-beta2", "0.95"),
    ):
        assert words[words.index(f"--{name}") + 1] == value
    assert "--steps" not in words


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


def test_rows_of_several_sessions_are_merged(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": [{"name": "dense"}]}))
    bench_train.add_row(path, {"name": "tree"})
    assert [row["name"] for row in bench_train.read_rows(path)] == ["dense", "tree"]


def test_rows_written_at_once_are_all_kept(tmp_path):
    path = tmp_path / "rows.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: bench_train.add_row(path, {"name": i}), range(40)))
    assert sorted(row["name"] for row in bench_train.read_rows(path)) == list(range(40))
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def test_a_row_that_cannot_be_written_leaves_the_others(tmp_path):
    path = tmp_path / "rows.json"
    bench_train.add_row(path, {"name": "tree"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        bench_train.add_row(path, {"name": "dense", "nll": float("nan")})
    assert [row["name"] for row in bench_train.read_rows(path)] == ["tree"]
