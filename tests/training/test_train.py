"""Training end to end on a tiny model: the same losses again, resuming, stopping, plans, recipes."""

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from flashlm_numba.data.shards import open_tokens
from flashlm_numba.data.tokenizer import vocabulary_named
from flashlm_numba.model import checkpoint
from flashlm_numba.model import embedding_init as embeddings
from flashlm_numba.model.config import Phase, RunConfig, plan_for
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.threads import available_threads, set_threads
from flashlm_numba.training import loop as train

# what is awkward together: micro-batches, a change of shape, a share of positions, an average, loss options
AWKWARD = (
    "phases=3:2x8x2,2x16x1",
    "loss_fraction=0.5",
    "ema=0.9",
    "label_smoothing=0.1",
    "z_loss=1e-4",
    "soft_cap=20",
    "log_prior=true",
    "normuon=v3",
    "weight_decay=0.1",
)
CASES = {
    "dense": ("head.name=dense",),
    "awkward": ("head.name=dense", *AWKWARD),
    "sampled": ("head.name=sampled", "num_sampled=1000", "full_softmax_ratio=0.3"),
    "tree": ("head.name=tree",),
    "float": ("activations=float", "sparse_adamw=false", "rowwise_exp_avg_sq=false"),
    "moments of elements": ("rowwise_exp_avg_sq=false", "adamw_beta1=0.9"),
    "low rank": ("head.name=tree", "tree_rank=3", "ema=0.9"),
}


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _losses(folder):
    return [(line["step"], line["loss"], line["nll"], line.get("val_nll")) for line in _lines(folder)]


def _bits(folder):
    """Every tensor of the newest checkpoint, as bytes."""
    path = checkpoint.find(folder)
    return {
        f"{file.stem}.{name}": value.tobytes()
        for file in sorted(path.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def _start(run, corpus, folder, threads=1, **length):
    return train.start_run(run, data=str(corpus), out=folder, threads=set_threads(threads), **length)


def _resume(folder, **options):
    return train.resume_run(folder, set_threads=set_threads, **options)


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(n, number): send this process a signal while step n is at work."""

    def arrange(step, number):
        real = train.train_step

        def train_step(session, phase, at, **options):
            if at == step and options["lr"] > 0:
                os.kill(os.getpid(), number)
            return real(session, phase, at, **options)

        monkeypatch.setattr(train, "train_step", train_step)
        return monkeypatch.undo

    return arrange


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_is_never_stopped_bit_for_bit(tiny_run, corpus, tmp_path, stop_at, case):
    run = tiny_run.with_settings(CASES[case])
    assert _start(run, corpus, tmp_path / "whole", threads=2, steps=9) == 0
    assert _start(run, corpus, tmp_path / "again", threads=2, steps=9) == 0
    assert _losses(tmp_path / "whole") == _losses(tmp_path / "again")
    assert [loss[0] for loss in _losses(tmp_path / "whole")] == list(range(1, 10))

    again = stop_at(2, signal.SIGINT)
    assert _start(run, corpus, tmp_path / "parts", threads=2, steps=9) == 130
    again()
    assert checkpoint.find(tmp_path / "parts").name == "step-2"
    again = stop_at(6, signal.SIGTERM)
    assert _resume(tmp_path / "parts") == 143
    again()
    assert _resume(tmp_path / "parts") == 0
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    assert _bits(tmp_path / "parts") == _bits(tmp_path / "whole")
    samples = [(tmp_path / name / "samples.txt").read_text() for name in ("parts", "whole")]
    assert samples[0] == samples[1] != ""
    seconds = [line["seconds"] for line in _lines(tmp_path / "parts")]
    assert seconds == sorted(seconds)
    if case == "awkward":
        assert any(name.startswith("ema.") for name in _bits(tmp_path / "whole"))
        assert "val_nll_ema" in _lines(tmp_path / "parts")[-1]


def test_metrics_have_the_fields_that_others_read(tiny_run, corpus, tmp_path):
    _start(tiny_run.with_settings(["head.name=dense", *AWKWARD]), corpus, tmp_path, steps=4)
    lines = _lines(tmp_path)
    for step, line in enumerate(lines, 1):
        assert set(line) - {"val_nll", "val_nll_ema"} == {
            "step",
            "tokens",
            "seconds",
            "loss",
            "nll",
            "lr",
            "tokens_per_s",
            "shares",
        }
        assert line["step"] == step
        assert line["tokens"] == 32 * step  # both phases of it
        assert set(line["shares"]) == {"embedding", "trunk", "head", "optimizer"}
        assert 0.1 < sum(line["shares"].values()) <= 1.001
        assert 0 < line["nll"] < math.log(50_257)  # it starts at the unigram
        assert line["loss"] > line["nll"]  # which smoothing moves it away from
        assert ("val_nll" in line) == (step == 4)
    # warm-up over 2 steps, decay over the last 40 % of 4
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 2e-3, 2e-3, 2e-3 / 1.6])


def test_the_sampled_head_draws_until_its_full_stretch_and_is_scored_as_dense(tiny_run, corpus, tmp_path):
    sampled, dense = tiny_run.with_settings(CASES["sampled"]), tiny_run.with_settings(CASES["dense"])
    _start(dense, corpus, tmp_path / "dense", steps=6)
    _start(sampled, corpus, tmp_path / "sampled", steps=6)
    _start(sampled.with_settings(["full_softmax_ratio=1"]), corpus, tmp_path / "full", steps=6)
    assert _losses(tmp_path / "full") == _losses(tmp_path / "dense")
    losses = [loss for _, loss, *_ in _losses(tmp_path / "sampled")]
    exact = [loss for _, loss, *_ in _losses(tmp_path / "dense")]
    # 70 % of 6 steps draw, and say so; their loss is an estimate (its partition sum is unbiased: test_sampled_head.py)
    assert [line.get("sampled") for line in _lines(tmp_path / "sampled")] == [True] * 4 + [None] * 2
    assert losses[0] != exact[0]
    assert all(abs(a - b) < 0.1 for a, b in zip(losses, exact, strict=True))


def test_a_checkpoint_is_kept_for_each_mark_on_the_clock(tiny_run, corpus, tmp_path, monkeypatch):
    """Steps take half a minute by this clock: the marks fall at and between their ends."""
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args, **kw: dataclasses.replace(real(*args, **kw), seconds=30.0))
    run = tiny_run.with_settings(["checkpoint_every=1", "checkpoint_minutes=1,1.6,60"])
    _start(run, corpus, tmp_path, steps=9)
    states = {p.parent.name: json.loads(p.read_text()) for p in (tmp_path / "checkpoints").glob("*/state.json")}
    assert sorted(states) == ["step-2", "step-4", "step-7", "step-8", "step-9"]
    assert [name for name, state in sorted(states.items()) if state["keep"]] == ["step-2", "step-4"]


def test_a_signal_does_not_unmark_a_checkpoint(tiny_run, corpus, tmp_path, monkeypatch):
    """Ctrl-C in the step that passes a mark: it is saved once, marked; and going on from there keeps the mark."""
    real = train.train_step

    def timed(session, phase, step, **kw):
        if step == 2 and kw["lr"] > 0:
            os.kill(os.getpid(), signal.SIGINT)
        return dataclasses.replace(real(session, phase, step, **kw), seconds=30.0)

    monkeypatch.setattr(train, "train_step", timed)
    run = tiny_run.with_settings(["checkpoint_every=100", "checkpoint_minutes=1"])
    assert _start(run, corpus, tmp_path, steps=9) == 130
    state = json.loads((tmp_path / "checkpoints" / "step-2" / "state.json").read_text())
    assert state["keep"] is True
    monkeypatch.setattr(train, "train_step", real)
    assert _resume(tmp_path) == 0
    assert json.loads((tmp_path / "checkpoints" / "step-2" / "state.json").read_text()) == state


@pytest.mark.parametrize("case", ["dense", "sampled", "tree"])
def test_training_learns(tiny_run, corpus, tmp_path, case):
    run = tiny_run.with_settings(
        [*CASES[case], "phases=4x32", "adamw_lr=2e-2", "nonembedding_lr_scale=1", "validate_every=5"]
    )
    _start(run, corpus, tmp_path, steps=30)
    values = [line["val_nll"] for line in _lines(tmp_path) if "val_nll" in line]
    assert values[-1] < min(5.0, values[0] - 1.5)  # from about ln V, or from what the tree knows of the counts


PROGRAM = """
import sys, time
from pathlib import Path
from flashlm_numba.training import loop as train
from flashlm_numba.model.config import RunConfig
from flashlm_numba.system.threads import set_threads
data, folder, settings, stop = sys.argv[1:]
real = train.train_step
def slow(session, phase, step, **options):
    done = real(session, phase, step, **options)
    time.sleep(60 if step == int(stop) else 0)  # at work when the signal comes
    return done
train.train_step = slow
run = RunConfig.recipe_named("default").with_settings(settings.split(";"))
train.start_run(run, data=data, out=Path(folder), threads=set_threads(1), steps=12)
"""


@pytest.mark.parametrize("head", ["dense", "tree"])
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
    while not (folder / "metrics.jsonl").exists() or len(_lines(folder)) < 6:
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
    assert _losses(folder) == _losses(tmp_path / "whole")
    assert _bits(folder) == _bits(tmp_path / "whole")


def test_killed_before_the_first_checkpoint_starts_again(tiny_run, corpus, tmp_path):
    run = tiny_run.with_settings(["head.name=dense"])
    _start(run, corpus, tmp_path / "whole", steps=3)
    _start(run, corpus, tmp_path / "killed", steps=3)
    checkpoint.set_aside_after(tmp_path / "killed", 0)
    assert _resume(tmp_path / "killed") == 0
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")


def test_damaged_checkpoint_is_refused_and_an_older_one_goes_on(tiny_run, corpus, tmp_path):
    run = tiny_run.with_settings(["head.name=dense", "checkpoint_every=2"])
    _start(run, corpus, tmp_path, steps=6)
    before, bits = _losses(tmp_path), _bits(tmp_path)
    path = tmp_path / "checkpoints" / "step-6" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"step-6 is damaged .*--checkpoint step-4"):
        _resume(tmp_path)
    assert _resume(tmp_path, checkpoint_name="step-4") == 0
    assert _losses(tmp_path) == before
    assert _bits(tmp_path) == bits
    assert (tmp_path / "checkpoints" / "set-aside-step-6").is_dir()


def test_divergence_stops_and_saves_nothing_bad(tiny_run, corpus, tmp_path):
    run = tiny_run.with_settings(["head.name=dense", "adamw_lr=1e30", "clip=1e9", "checkpoint_every=1"])
    with pytest.raises(UserError, match=r"Stopped at step \d: .*(weight|logits|bias).* not finite") as caught:
        _start(run, corpus, tmp_path, steps=9)
    kept = checkpoint.find(tmp_path)
    assert f"last good checkpoint is {kept.name}" in str(caught.value)
    assert all(np.isfinite(value).all() for value in load_file(kept / "model.safetensors").values())
    assert _lines(tmp_path)[-1]["step"] == int(kept.name.removeprefix("step-"))


def test_not_finite_gradient_names_the_tensor(tiny_run, corpus, tmp_path, monkeypatch):
    real = train.train_step

    def poisoned(session, phase, step, **options):
        if step == 3 and options["lr"] > 0:
            forward = session.model.loss_and_grad

            def loss_and_grad(*arguments, **options):
                result = forward(*arguments, **options)
                session.model.gradients["glu.up.weight"][0, 0] = np.inf
                return result

            session.model.loss_and_grad = loss_and_grad
        return real(session, phase, step, **options)

    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(UserError, match=r"Stopped at step 3: .*glu\.up\.weight"):
        _start(tiny_run.with_settings(["head.name=dense"]), corpus, tmp_path, steps=9)
    assert _lines(tmp_path)[-1]["step"] == 2


def test_a_validation_that_is_not_finite_ends_training(tiny_run, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "score", lambda *_, **__: SimpleNamespace(mean_nll=math.nan))
    run = tiny_run.with_settings(["validate_every=2", "checkpoint_every=1"])
    with pytest.raises(UserError, match=r"Stopped at step 2: The NLL of .* is nan, .* checkpoint is step-1"):
        _start(run, corpus, tmp_path, steps=9)
    assert _lines(tmp_path)[-1]["step"] == 1


def test_minutes_become_a_plan_in_steps_that_resume_keeps(tiny_run, corpus, tmp_path, stop_at):
    run = tiny_run.with_settings(["head.name=dense", "phases=3:2x8,2x16", "checkpoint_every=100"])
    again = stop_at(2, signal.SIGINT)
    assert _start(run, corpus, tmp_path / "minutes", minutes=0.05) == 130
    again()
    plan = RunConfig.from_json((tmp_path / "minutes" / "config.json").read_text()).plan
    assert plan.minutes == 0.05
    assert plan.schedule_steps == plan.steps > 3
    assert len(plan.step_seconds) == 2
    fast, slow = plan.step_seconds
    assert 3 * fast + (plan.steps - 3) * slow <= 3 * 1.001  # seconds
    assert _resume(tmp_path / "minutes") == 0
    assert _lines(tmp_path / "minutes")[-1]["step"] == plan.steps
    # measuring has taught it nothing: the losses are those of a run asked for in steps
    _start(run, corpus, tmp_path / "steps", steps=plan.steps)
    assert _losses(tmp_path / "minutes") == _losses(tmp_path / "steps")


def test_the_start_of_the_embedding_is_on_the_clock(tiny_run, corpus, tmp_path, monkeypatch):
    """As long as it once took, whether it was in the cache or not; a plan in minutes has so much less."""
    rows = np.random.default_rng(0).standard_normal((50_257, 16), np.float32)
    monkeypatch.setattr(embeddings, "cached_start", lambda *_, **__: (rows, 100.0))
    run = tiny_run.with_settings(
        ["embedding_init=corpus", "log_every=1", "checkpoint_minutes=1"]
    )  # passes before the first step
    _start(run, corpus, tmp_path / "steps", steps=2)
    assert json.loads((tmp_path / "steps" / "checkpoints" / "step-1" / "state.json").read_text())["keep"] is True
    assert 100 < _lines(tmp_path / "steps")[0]["seconds"] < 160
    _start(run, corpus, tmp_path / "minutes", minutes=0.5)
    plan = RunConfig.from_json((tmp_path / "minutes" / "config.json").read_text()).plan
    assert plan.steps == 1  # nothing is left of half a minute


@pytest.mark.parametrize(("documents", "steps"), [([], 59), ([np.zeros(10, np.int32)], 58)])
def test_minutes_keep_time_for_validating_where_there_is_a_text_for_it(tiny_run, monkeypatch, documents, steps):
    clock = itertools.count()
    monkeypatch.setattr(train.time, "perf_counter", lambda: 0.01 * next(clock))  # ten tokens are scored in 0.01 s
    monkeypatch.setattr(train, "_step_seconds", lambda *_, **__: 1.0)
    monkeypatch.setattr(train, "score", lambda *_, **__: None)
    run = tiny_run.with_settings(["validation_tokens=30000"])
    data = SimpleNamespace(vocabulary=vocabulary_named("gpt2"))
    session = SimpleNamespace(run=run, clock=train.Clock(), data=data, subset=documents, model=None)
    display = SimpleNamespace(note=lambda _: None)
    # some hundredths of a second are gone already; 2 % of a minute at most are kept for validating
    assert train._plan_minutes(session, 1.0, 0.0, display).plan.steps == steps


def test_tokens_are_a_plan_too(tiny_run, corpus, tmp_path):
    _start(tiny_run.with_settings(["head.name=dense"]), corpus, tmp_path, tokens=65)
    assert [line["tokens"] for line in _lines(tmp_path)] == [64, 128]


def test_a_finished_run_can_be_given_more_steps(tiny_run, corpus, tmp_path, capsys):
    run = tiny_run.with_settings(["head.name=dense", "phases=20:2x16"])  # a layout of 20 steps, as v3's of 10,000
    _start(run, corpus, tmp_path / "whole", steps=6)
    _start(run, corpus, tmp_path / "parts", steps=3)
    assert _resume(tmp_path / "parts") == 0
    assert "complete at step 3" in capsys.readouterr().err
    assert _resume(tmp_path / "parts", steps=6, settings=("validate_every=2",)) == 0
    assert [loss[:3] for loss in _losses(tmp_path / "parts")] == [loss[:3] for loss in _losses(tmp_path / "whole")]
    with pytest.raises(UserError, match="already at step 6"):
        _resume(tmp_path / "parts", steps=5)
    with pytest.raises(UserError, match="may change only"):
        _resume(tmp_path / "parts", steps=9, settings=("loss_fraction=0.5",))


def test_two_runs_in_one_folder_are_refused(tiny_run, corpus, tmp_path):
    run = tiny_run.with_settings(["head.name=dense"])
    _start(run, corpus, tmp_path / "run", steps=1)
    with pytest.raises(UserError, match=r"already holds a run; go on with --resume"):
        _start(run, corpus, tmp_path / "run", steps=1)
    with checkpoint.lock(tmp_path / "run"), pytest.raises(UserError, match=r"Another process is .*it, or stop it\.$"):
        _resume(tmp_path / "run")


def test_a_place_that_cannot_be_written_is_one_sentence_with_a_remedy_that_fits(tiny_run, corpus, tmp_path):
    run = tiny_run.with_settings(["head.name=dense"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run cannot be written: Not a directory; choose another --out\."):
        _start(run, corpus, tmp_path / "file" / "run", steps=1)
    _start(run, corpus, tmp_path / "run", steps=1)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: .*; make it writable, or copy the run"):
        _resume(tmp_path / "run", steps=2)


def test_a_run_resumes_with_the_threads_that_there_are(tiny_run, corpus, tmp_path, capsys):
    _start(tiny_run.with_settings(["head.name=dense"]), corpus, tmp_path, steps=1)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(re.sub(r'"threads": \d+', '"threads": 1000', config))
    with pytest.raises(ValueError, match="threads must be between 1 and"):
        _resume(tmp_path, steps=2, threads=1000)  # asked for, so not a matter of course
    assert _resume(tmp_path, steps=2) == 0
    here = available_threads()
    assert f"The run used 1000 threads, now {here}, all that there are here" in capsys.readouterr().err
    assert RunConfig.from_json((tmp_path / "config.json").read_text()).threads == here


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_saves_unless_hang_ups_are_ignored(tiny_run, corpus, tmp_path, stop_at):
    run = tiny_run.with_settings(["head.name=dense"])
    again = stop_at(2, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup themselves
    try:
        assert _start(run, corpus, tmp_path / "run", steps=3) == 129
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        assert _start(run, corpus, tmp_path / "nohup", steps=3) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint.find(tmp_path / "run").name == "step-2"
    again()


def test_changed_data_is_refused(tiny_run, corpus, tmp_path):
    _start(tiny_run.with_settings(["head.name=dense"]), corpus, tmp_path, steps=1)
    config = (tmp_path / "config.json").read_text()
    digest = RunConfig.from_json(config).data_hash
    (tmp_path / "config.json").write_text(config.replace(digest, "0" * 64))
    with pytest.raises(UserError, match="not those that"):
        _resume(tmp_path, steps=2)


@pytest.mark.parametrize(("given", "moves"), [(True, False), (False, True)])
def test_frozen_phase_holds_the_embedding_only_if_its_rows_were_given(
    tiny_run, corpus, tmp_path, monkeypatch, given, moves
):
    rows = np.random.default_rng(0).standard_normal((50_257, 16), np.float32)
    monkeypatch.setattr("flashlm_numba.model.pretrained.from_gpt2", lambda *arguments: (rows, 0.7))
    (tmp_path / "some.safetensors").touch()
    start = f"embedding_init={tmp_path / 'some.safetensors'}" if given else "embedding_init=random"
    run = tiny_run.with_settings(["head.name=dense", "phases=3:2x8:frozen,2x16", start, "checkpoint_every=1"])
    _start(run, corpus, tmp_path / "run", steps=4)
    tables = [
        load_file(tmp_path / "run" / "checkpoints" / f"step-{step}" / "model.safetensors")["embedding.weight"]
        for step in (2, 3, 4)
    ]
    assert np.array_equal(tables[0], tables[1]) != moves
    assert not np.array_equal(tables[1], tables[2])
    if given:
        assert np.array_equal(tables[1], rows)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("phases=2x100000", "a sequence of 100000 needs 100,001; use more text, or shorter sequences"),
        ("tree=oak", "There is no tree shape 'oak'; choose one of"),
        ("tree_classes=5", "The tree shape default has no option tree_classes; it takes only tree_arity"),
        ("tree=clustered", "A clustered tree needs embedding rows to cluster"),
        ("embedding_init=missing.safetensors", "There is no file missing.safetensors"),
        ("vocab_size=60000", "leave that setting out"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_made(tiny_run, corpus, tmp_path, setting, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        _start(tiny_run.with_settings([setting]), corpus, tmp_path / "run", steps=2)
    assert not (tmp_path / "run").exists()


def _session(run, corpus, folder):
    data = open_tokens(corpus)
    run = replace(plan_for(run, steps=9), data=str(corpus), data_hash=data.hash)
    return train._new_session(run, folder, data, train.Display())


def test_zero_learning_rate_changes_no_parameter(tiny_run, corpus, tmp_path):
    session = _session(tiny_run.with_settings(["head.name=dense", "weight_decay=0.5"]), corpus, tmp_path)
    before = {name: value.copy() for name, value in session.model.parameters.items()}
    with train._rehearsal(session):
        train.train_step(session, Phase(None, 2, 8, 2), 1, lr=0.0)
    assert all(np.array_equal(before[name], value) for name, value in session.model.parameters.items())
    assert not session.optimizer.state_dict()


def test_micro_batches_and_a_share_of_positions_average_the_positions_kept(tiny_run, corpus, tmp_path):
    """The step's gradient is that of the mean loss over all positions kept, computed here in one batch."""
    settings = ["head.name=dense", "loss_fraction=0.5", "activations=float"]
    session = _session(tiny_run.with_settings(settings), corpus, tmp_path)
    model, phase = session.model, Phase(None, 2, 8, 3)
    done = train.train_step(session, phase, 5, lr=0.0)
    got = {name: value.copy() for name, value in model.gradients.items()}
    batches = [train.sample_batch(session.data.train, 42, 5, micro, 2, 8) for micro in range(3)]
    ids, targets = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    weights = np.concatenate([train.position_weights(42, 5, micro, 16, 0.5, 3) for micro in range(3)])
    assert np.count_nonzero(weights) == 24
    assert weights.sum() == pytest.approx(1)
    assert not np.array_equal(weights[:16], weights[16:32])
    model.zero_grad()
    loss, nll, _ = model.loss_and_grad(ids, targets, weights)
    assert done.loss == pytest.approx(float(loss.mean()), rel=1e-6)
    assert done.nll == pytest.approx(float(nll.mean()), rel=1e-6)
    for name, value in model.gradients.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-6, err_msg=name)


def test_ema_is_the_average_of_the_weights(tiny_run, corpus, tmp_path):
    run = tiny_run.with_settings(["head.name=dense", "ema=0.75", "checkpoint_every=1"])
    _start(run, corpus, tmp_path, steps=3)
    files = [tmp_path / "checkpoints" / f"step-{step}" for step in (1, 2, 3)]
    weights = [load_file(file / "model.safetensors") for file in files]
    averages = [load_file(file / "ema.safetensors") for file in files]
    for i in (1, 2):
        for name in averages[i]:
            want = 0.75 * averages[i - 1][name] + 0.25 * weights[i][name]
            np.testing.assert_allclose(averages[i][name], want, rtol=1e-5, atol=1e-7)
    # validating the average has put the weights back
    assert not np.array_equal(averages[2]["glu.up.weight"], weights[2]["glu.up.weight"])
