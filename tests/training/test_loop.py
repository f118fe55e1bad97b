"""The loop: the same losses again, what is logged and saved, signals, divergence."""

import dataclasses
import json
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from run_helpers import AWKWARD, CASES, read_bits, read_log, read_losses, resume, start
from safetensors.numpy import load_file

from flashlm_numba.model import checkpoint
from flashlm_numba.model.settings import with_settings
from flashlm_numba.system.errors import UserError
from flashlm_numba.training import loop


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_is_never_stopped_bit_for_bit(tiny_run, corpus, tmp_path, stop_at, case):
    run = with_settings(tiny_run, CASES[case])
    assert start(run, corpus, tmp_path / "whole", threads=2, steps=9).status == 0
    assert start(run, corpus, tmp_path / "again", threads=2, steps=9).status == 0
    assert read_losses(tmp_path / "whole") == read_losses(tmp_path / "again")
    assert [loss[0] for loss in read_losses(tmp_path / "whole")] == list(range(1, 10))

    again = stop_at(2, signal.SIGINT)
    assert start(run, corpus, tmp_path / "parts", threads=2, steps=9).status == 130
    again()
    assert checkpoint.find(tmp_path / "parts").name == "step-2"
    again = stop_at(6, signal.SIGTERM)
    assert resume(tmp_path / "parts").status == 143
    again()
    assert resume(tmp_path / "parts").status == 0
    assert read_losses(tmp_path / "parts") == read_losses(tmp_path / "whole")
    assert read_bits(tmp_path / "parts") == read_bits(tmp_path / "whole")
    samples = [(tmp_path / name / "samples.txt").read_text() for name in ("parts", "whole")]
    assert samples[0] == samples[1] != ""
    seconds = [line["seconds"] for line in read_log(tmp_path / "parts")]
    assert seconds == sorted(seconds)
    if case == "awkward":
        assert any(name.startswith("ema.") for name in read_bits(tmp_path / "whole"))
        assert "val_nll_ema" in read_log(tmp_path / "parts")[-1]


def test_metrics_have_the_fields_that_others_read(tiny_run, corpus, tmp_path):
    start(with_settings(tiny_run, ["head.name=dense", *AWKWARD]), corpus, tmp_path, steps=4)
    lines = read_log(tmp_path)
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
    sampled, dense = with_settings(tiny_run, CASES["sampled"]), with_settings(tiny_run, CASES["dense"])
    start(dense, corpus, tmp_path / "dense", steps=6)
    start(sampled, corpus, tmp_path / "sampled", steps=6)
    start(with_settings(sampled, ["full_softmax_ratio=1"]), corpus, tmp_path / "full", steps=6)
    assert read_losses(tmp_path / "full") == read_losses(tmp_path / "dense")
    losses = [loss for _, loss, *_ in read_losses(tmp_path / "sampled")]
    exact = [loss for _, loss, *_ in read_losses(tmp_path / "dense")]
    # 70 % of 6 steps draw, and say so; their loss is an estimate (its partition sum is unbiased: test_sampled_head.py)
    assert [line.get("sampled") for line in read_log(tmp_path / "sampled")] == [True] * 4 + [None] * 2
    assert losses[0] != exact[0]
    assert all(abs(a - b) < 0.1 for a, b in zip(losses, exact, strict=True))


@pytest.mark.parametrize("case", ["dense", "sampled", "tree"])
def test_training_learns(tiny_run, corpus, tmp_path, case):
    run = with_settings(
        tiny_run, [*CASES[case], "phases=4x32", "adamw_lr=2e-2", "nonembedding_lr_scale=1", "validate_every=5"]
    )
    start(run, corpus, tmp_path, steps=30)
    values = [line["val_nll"] for line in read_log(tmp_path) if "val_nll" in line]
    # from about ln V, from what the tree knows of the counts, or from what the n-gram copies know
    assert values[-1] < min(5.0, values[0] - 1)


def test_ema_is_the_average_of_the_weights(tiny_run, corpus, tmp_path):
    run = with_settings(tiny_run, ["head.name=dense", "ema=0.75", "checkpoint_every=1"])
    start(run, corpus, tmp_path, steps=3)
    files = [tmp_path / "checkpoints" / f"step-{step}" for step in (1, 2, 3)]
    weights = [load_file(file / "model.safetensors") for file in files]
    averages = [load_file(file / "ema.safetensors") for file in files]
    for i in (1, 2):
        for name in averages[i]:
            want = 0.75 * averages[i - 1][name] + 0.25 * weights[i][name]
            np.testing.assert_allclose(averages[i][name], want, rtol=1e-5, atol=1e-7)
    # validating the average has put the weights back
    assert not np.array_equal(averages[2]["blocks.0.glu.up.weight"], weights[2]["blocks.0.glu.up.weight"])


def test_a_checkpoint_is_kept_for_each_mark_on_the_clock(tiny_run, corpus, tmp_path, monkeypatch):
    """Steps take half a minute by this clock: the marks fall at and between their ends."""
    real = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *args, **kw: dataclasses.replace(real(*args, **kw), seconds=30.0))
    run = with_settings(tiny_run, ["checkpoint_every=1", "checkpoint_minutes=1,1.6,60"])
    start(run, corpus, tmp_path, steps=9)
    states = {p.parent.name: json.loads(p.read_text()) for p in (tmp_path / "checkpoints").glob("*/state.json")}
    assert sorted(states) == ["step-2", "step-4", "step-7", "step-8", "step-9"]
    assert [name for name, state in sorted(states.items()) if state["keep"]] == ["step-2", "step-4"]


def test_a_signal_does_not_unmark_a_checkpoint(tiny_run, corpus, tmp_path, monkeypatch):
    """Ctrl-C in the step that passes a mark: it is saved once, marked; and going on from there keeps the mark."""
    real = loop.train_step

    def timed(session, phase, step, **kw):
        if step == 2 and kw["lr"] > 0:
            os.kill(os.getpid(), signal.SIGINT)
        return dataclasses.replace(real(session, phase, step, **kw), seconds=30.0)

    monkeypatch.setattr(loop, "train_step", timed)
    run = with_settings(tiny_run, ["checkpoint_every=100", "checkpoint_minutes=1"])
    assert start(run, corpus, tmp_path, steps=9).status == 130
    state = json.loads((tmp_path / "checkpoints" / "step-2" / "state.json").read_text())
    assert state["keep"] is True
    monkeypatch.setattr(loop, "train_step", real)
    assert resume(tmp_path).status == 0
    assert json.loads((tmp_path / "checkpoints" / "step-2" / "state.json").read_text()) == state


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_saves_unless_hang_ups_are_ignored(tiny_run, corpus, tmp_path, stop_at):
    run = with_settings(tiny_run, ["head.name=dense"])
    again = stop_at(2, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup themselves
    try:
        assert start(run, corpus, tmp_path / "run", steps=3).status == 129
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        assert start(run, corpus, tmp_path / "nohup", steps=3).status == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint.find(tmp_path / "run").name == "step-2"
    again()


def test_weights_that_are_not_finite_are_not_saved(tiny_run, corpus, tmp_path):
    """A ternary layer hides them: infinity beyond an infinite threshold is 0, so that the loss stays finite."""
    settings = ["head.name=dense", "checkpoint_every=1"]
    start(with_settings(tiny_run, settings), corpus, tmp_path / "run", steps=2)
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(
        UserError, match=r"at step 3: .*weight is no longer finite, .*good checkpoint is step-2; resume"
    ):
        resume(tmp_path / "run", steps=9, settings=("normuon_lr=1e300",))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before
    assert resume(tmp_path / "run", steps=9, settings=("normuon_lr=1e-3",)).status == 0


def test_divergence_stops_and_saves_nothing_bad(tiny_run, corpus, tmp_path):
    run = with_settings(tiny_run, ["head.name=dense", "adamw_lr=1e30", "clip=1e9", "checkpoint_every=1"])
    with pytest.raises(UserError, match=r"Stopped at step \d: .*(weight|logits|bias).* not finite") as caught:
        start(run, corpus, tmp_path, steps=9)
    kept = checkpoint.find(tmp_path)
    assert f"last good checkpoint is {kept.name}" in str(caught.value)
    assert all(np.isfinite(value).all() for value in load_file(kept / "model.safetensors").values())
    assert read_log(tmp_path)[-1]["step"] == int(kept.name.removeprefix("step-"))


def test_not_finite_gradient_names_the_tensor(tiny_run, corpus, tmp_path, monkeypatch):
    real = loop.train_step

    def poisoned(session, phase, step, **options):
        if step == 3 and options["lr"] > 0:
            forward = session.model.loss_and_grad

            def loss_and_grad(*arguments, **options):
                result = forward(*arguments, **options)
                session.model.gradients["blocks.0.glu.up.weight"][0, 0] = np.inf
                return result

            session.model.loss_and_grad = loss_and_grad
        return real(session, phase, step, **options)

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(UserError, match=r"Stopped at step 3: .*glu\.up\.weight"):
        start(with_settings(tiny_run, ["head.name=dense"]), corpus, tmp_path, steps=9)
    assert read_log(tmp_path)[-1]["step"] == 2


def test_a_validation_that_is_not_finite_ends_training(tiny_run, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "score", lambda *_, **__: SimpleNamespace(mean_nll=math.nan))
    run = with_settings(tiny_run, ["validate_every=2", "checkpoint_every=1"])
    with pytest.raises(UserError, match=r"Stopped at step 2: The NLL of .* is nan, .* checkpoint is step-1"):
        start(run, corpus, tmp_path, steps=9)
    assert read_log(tmp_path)[-1]["step"] == 1
