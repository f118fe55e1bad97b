"""Starting and resuming: what goes on, what is refused, and what is said."""

import json
import re
import subprocess
import sys
import time

import pytest
from run_helpers import read_bits, read_log, read_losses, resume, start
from safetensors.numpy import load_file

from flashlm_numba.model import checkpoint
from flashlm_numba.model.settings import run_from_json, with_settings
from flashlm_numba.system.display import Progress
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.threads import available_threads
from flashlm_numba.training.plan import Length
from flashlm_numba.training.run import Finished, resume_run, start_run

PROGRAM = """
import sys, time
from pathlib import Path
from flashlm_numba.model.recipes import from_recipe
from flashlm_numba.training import loop
from flashlm_numba.training.plan import Length
from flashlm_numba.training.run import start_run
data, folder, settings, stop = sys.argv[1:]
real = loop.train_step
def slow(session, phase, step, **options):
    done = real(session, phase, step, **options)
    time.sleep(60 if step == int(stop) else 0)  # at work when the signal comes
    return done
loop.train_step = slow
run = from_recipe("default", settings.split(";"))
start_run(run, Length(steps=12), data=data, out=Path(folder), threads=1)
"""


@pytest.mark.parametrize("head", [pytest.param("dense", marks=pytest.mark.slow), "tree"])
def test_a_killed_run_resumes_from_its_last_checkpoint(corpus, tmp_path, head):
    """SIGKILL in the middle of a step; then a torn log line; then the run as if nothing had happened.

    Every part in a process of its own, as a user would: compiled and loaded kernels must give the same bits.
    """
    from helpers import TINY

    settings = ";".join([*TINY, f"head.name={head}"])

    def begin(folder, stop):
        return subprocess.Popen([sys.executable, "-c", PROGRAM, str(corpus), str(folder), settings, str(stop)])

    assert begin(tmp_path / "whole", -1).wait() == 0
    folder = tmp_path / "killed"
    process = begin(folder, 7)
    deadline = time.monotonic() + 240
    while not (folder / "metrics.jsonl").exists() or len(read_log(folder)) < 6:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert checkpoint.find(folder).name == "step-4"
    resumed = subprocess.run([sys.executable, "-m", "flashlm_numba", "train", "--resume", str(folder)], check=False)
    assert resumed.returncode == 0
    assert read_losses(folder) == read_losses(tmp_path / "whole")
    assert read_bits(folder) == read_bits(tmp_path / "whole")


def test_killed_before_the_first_checkpoint_starts_again(tiny_run, corpus, tmp_path):
    run = with_settings(tiny_run, ["head.name=dense"])
    start(run, corpus, tmp_path / "whole", steps=3)
    start(run, corpus, tmp_path / "killed", steps=3)
    checkpoint.set_aside_after(tmp_path / "killed", 0)
    assert resume(tmp_path / "killed").status == 0
    assert read_losses(tmp_path / "killed") == read_losses(tmp_path / "whole")


def test_damaged_checkpoint_is_refused_and_an_older_one_goes_on(tiny_run, corpus, tmp_path):
    run = with_settings(tiny_run, ["head.name=dense", "checkpoint_every=2"])
    start(run, corpus, tmp_path, steps=6)
    before, bits = read_losses(tmp_path), read_bits(tmp_path)
    path = tmp_path / "checkpoints" / "step-6" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"step-6 is damaged .*--checkpoint step-4"):
        resume(tmp_path)
    assert resume(tmp_path, checkpoint_name="step-4").status == 0
    assert read_losses(tmp_path) == before
    assert read_bits(tmp_path) == bits
    assert (tmp_path / "checkpoints" / "set-aside-step-6").is_dir()


def test_resuming_twice_from_a_step_keeps_what_was_set_aside(tiny_run, corpus, tmp_path):
    """Each branch keeps its checkpoints, its lines of the log and its samples."""
    run = with_settings(tiny_run, ["head.name=dense", "checkpoint_every=1", "validate_every=1"])
    start(run, corpus, tmp_path, steps=3)
    for suffix, setting in (("", "adamw_lr=1e-4"), ("-2", "adamw_lr=1e-5")):
        losses, bits, samples = read_losses(tmp_path), read_bits(tmp_path), (tmp_path / "samples.txt").read_text()
        resume(tmp_path, checkpoint_name="step-1", settings=(setting,), steps=3)
        assert read_bits(tmp_path) != bits
        aside = tmp_path / f"metrics.set-aside-step-3{suffix}.jsonl"
        lines = [json.loads(line) for line in aside.read_text().splitlines()]
        assert [(line["step"], line["loss"], line["nll"], line["val_nll"]) for line in lines] == losses[1:]
        kept = (tmp_path / "samples.txt").read_text().partition("=== step 2 ===")[0]
        assert kept + (tmp_path / f"samples.set-aside-step-3{suffix}.txt").read_text() == samples
        path = tmp_path / "checkpoints" / f"set-aside-step-3{suffix}"
        for name, value in load_file(path / "model.safetensors").items():
            assert value.tobytes() == bits[f"model.{name}"]
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3]
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {*(f"step-{n}" for n in (1, 2, 3)), *(f"set-aside-step-{n}" for n in ("2", "2-2", "3", "3-2"))}


def test_a_finished_run_can_be_given_more_steps(tiny_run, corpus, tmp_path, capsys):
    run = with_settings(tiny_run, ["head.name=dense", "phases=20:2x16"])  # a layout of 20 steps, as v3's of 10,000
    start(run, corpus, tmp_path / "whole", steps=6)
    start(run, corpus, tmp_path / "parts", steps=3)
    assert resume(tmp_path / "parts").status == 0
    assert "complete at step 3" in capsys.readouterr().err
    assert resume(tmp_path / "parts", steps=6, settings=("validate_every=2",)).status == 0
    assert [loss[:3] for loss in read_losses(tmp_path / "parts")] == [
        loss[:3] for loss in read_losses(tmp_path / "whole")
    ]
    with pytest.raises(UserError, match="already at step 6"):
        resume(tmp_path / "parts", steps=5)
    with pytest.raises(UserError, match="may change only"):
        resume(tmp_path / "parts", steps=9, settings=("loss_fraction=0.5",))


def test_two_runs_in_one_folder_are_refused(tiny_run, corpus, tmp_path):
    run = with_settings(tiny_run, ["head.name=dense"])
    start(run, corpus, tmp_path / "run", steps=1)
    with pytest.raises(UserError, match=r"already holds a run; use --resume"):
        start(run, corpus, tmp_path / "run", steps=1)
    with checkpoint.lock(tmp_path / "run"), pytest.raises(UserError, match=r"Another process is .*it, or stop it\.$"):
        resume(tmp_path / "run")


def test_a_place_that_cannot_be_written_is_one_sentence_with_a_remedy_that_fits(tiny_run, corpus, tmp_path):
    run = with_settings(tiny_run, ["head.name=dense"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run cannot be written: Not a directory; choose another --out\."):
        start(run, corpus, tmp_path / "file" / "run", steps=1)
    start(run, corpus, tmp_path / "run", steps=1)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: .*; make it writable, or copy the run"):
        resume(tmp_path / "run", steps=2)


def test_a_run_resumes_with_the_threads_that_there_are(tiny_run, corpus, tmp_path, capsys):
    start(with_settings(tiny_run, ["head.name=dense"]), corpus, tmp_path, steps=1)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(re.sub(r'"threads": \d+', '"threads": 1000', config))
    with pytest.raises(ValueError, match="threads must be between 1 and"):
        resume(tmp_path, steps=2, threads=1000)  # asked for, so not a matter of course
    assert resume(tmp_path, steps=2).status == 0
    here = available_threads()
    assert f"The run used 1000 threads, now {here}, all that this process may use" in capsys.readouterr().err
    assert run_from_json((tmp_path / "config.json").read_text()).threads == here


def test_changed_data_is_refused(tiny_run, corpus, tmp_path):
    start(with_settings(tiny_run, ["head.name=dense"]), corpus, tmp_path, steps=1)
    config = (tmp_path / "config.json").read_text()
    digest = run_from_json(config).data_hash
    (tmp_path / "config.json").write_text(config.replace(digest, "0" * 64))
    with pytest.raises(UserError, match="not the ones that"):
        resume(tmp_path, steps=2)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("phases=2x100000", "a sequence of 100000 needs 100,001; use more text or shorter sequences"),
        ("tree=oak", "There is no tree shape 'oak'; choose one of"),
        ("tree_classes=5", "The tree shape default has no option tree_classes; it takes only tree_arity"),
        ("tree=clustered", "A clustered tree needs embedding rows to cluster"),
        ("embedding_init=missing.safetensors", "There is no file missing.safetensors"),
        ("vocab_size=60000", "leave out that setting"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_made(tiny_run, corpus, tmp_path, setting, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        start(with_settings(tiny_run, [setting]), corpus, tmp_path / "run", steps=2)
    assert not (tmp_path / "run").exists()


class Recorder(Progress):
    def __init__(self):
        self.notes, self.lines = [], []

    def note(self, text):
        self.notes.append(text)

    def step(self, line, seconds_left):
        assert seconds_left >= 0
        self.lines.append(line)


def test_progress_gets_what_is_shown_and_none_shows_nothing(tiny_run, corpus, tmp_path, capfd):
    run = with_settings(tiny_run, ["head.name=dense"])
    seen = Recorder()
    done = start_run(run, Length(steps=2), data=str(corpus), out=tmp_path / "run", threads=1, progress=seen)
    assert done == Finished(tmp_path / "run", 0)
    assert seen.lines == read_log(tmp_path / "run")
    assert seen.notes[-1] == f"Done: {tmp_path / 'run'}"
    assert resume_run(tmp_path / "run", progress=seen) == done
    assert "is complete at step 2" in seen.notes[-1]
    assert resume_run(tmp_path / "run", Length(steps=3), progress=None) == done
    assert len(read_log(tmp_path / "run")) == 3
    assert capfd.readouterr() == ("", "")


def test_a_run_gets_a_folder_of_its_own(tiny_run, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = start_run(with_settings(tiny_run, ["head.name=dense"]), Length(steps=1), data=str(corpus), threads=1)
    assert re.fullmatch(r"runs/dense-\d{8}-\d{6}", done.folder.as_posix())
    assert len(read_log(done.folder)) == 1
