"""`train --init`: a run that starts from trained weights, and what cannot be started from."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers import TINY, command

import flashlm_numba as fl
from flashlm_numba.model import trained
from flashlm_numba.model.build import load_model
from flashlm_numba.model.parameters import ternary_names

# TINY without the settings of the model, which come from the trained weights
TRAINING = [text for text in TINY if not text.startswith(("dim", "ffn", "groups", "dilations", "embedding_init"))]
SETTINGS = [part for text in TRAINING for part in ("--set", text)]


@pytest.fixture(scope="module")
def export(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.safetensors"
    assert command("export", run, path, "--rows", "float").exit_code == 0
    return path


@pytest.fixture(params=["run", "checkpoint", "export"])
def source(request, run, export):
    return {"run": run, "checkpoint": run / "checkpoints" / "step-3", "export": export}[request.param]


def test_the_first_model_computes_as_the_trained_one(source, run, corpus, tmp_path):
    """At learning rate 0 nothing changes, so the run's checkpoint scores as its source does, bit for bit."""
    out = tmp_path / "tuned"
    rates = ("--set", "adamw_lr=0", "--set", "normuon_lr=0")
    done = command("train", corpus, "--init", source, "--steps", 2, "--out", out, *SETTINGS, *rates)
    assert done.exit_code == 0, done.output
    assert "Starting from the weights in" in done.output
    own, other = load_model(run), load_model(out)
    assert other.run.model == own.run.model
    assert other.run.head == own.run.head
    assert other.state["step"] == 2  # the schedule is new
    ids = np.arange(30, dtype=np.int32)[None]
    np.testing.assert_array_equal(other.model.forward(ids), own.model.forward(ids))
    np.testing.assert_array_equal(*(m.model.head.distribution(m.model.forward(ids)) for m in (own, other)))


def test_ternary_weights_of_a_file_can_change_again(export):
    """They become as large as those of a new model: at their full size of 1 the learning rate would not move them."""
    before = load_model(export)
    model = trained.first_model(replace(before.run, init=str(export)), None)
    for name in ternary_names(before.run.model):
        weight = model.parameters[name]
        np.testing.assert_array_equal(np.sign(weight), before.model.parameters[name])
        size = 0.01 if name.endswith(("out.weight", "down.weight")) else 16**-0.5
        assert np.sqrt(np.mean(weight**2)) == pytest.approx(size, rel=1e-3)


def test_it_trains_further_and_resumes_bit_for_bit(run, corpus, tmp_path):
    settings = dict(text.split("=", 1) for text in TRAINING)
    tuned = fl.train(corpus, init=run, steps=6, out=tmp_path / "a", threads=1, seed=1, settings=settings)
    losses = [line["loss"] for line in tuned.metrics]
    assert len(losses) == 6
    assert command("train", "--resume", tmp_path / "a", "--checkpoint", "step-4").exit_code == 0
    assert [line["loss"] for line in tuned.metrics] == losses
    assert json.loads((tmp_path / "a" / "config.json").read_text())["init"] == str(
        (run / "checkpoints" / "step-3").resolve()
    )


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_weights_again(run, corpus, tmp_path):
    out = tmp_path / "tuned"
    assert command("train", corpus, "--init", run, "--steps", 2, "--out", out, *SETTINGS).exit_code == 0
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(out / "checkpoints")
    done = command("train", "--resume", out)
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()] == losses


def test_an_export_of_it_names_no_path(run, corpus, tmp_path):
    out = tmp_path / "tuned"
    assert command("train", corpus, "--init", run, "--steps", 1, "--out", out, *SETTINGS).exit_code == 0
    assert command("export", out, tmp_path / "x.safetensors").exit_code == 0
    assert str(run.parent).encode() not in (tmp_path / "x.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["--head", "dense"], 2, "--init takes model and head from the trained weights; leave out --head."),
        (["--model", "nano"], 2, "leave out --model."),
        (["--embeddings", "x"], 2, "leave out --embeddings."),
        (["--set", "dim=32"], 1, "fix model.dim; leave that setting out."),
        (["--set", "n_blocks=2", "--set", "soft_cap=3"], 1, "fix model.n_blocks, head.soft_cap; leave"),
        (["--set", "tree=huffman"], 1, "fix head.tree; leave that setting out."),
        (["--set", "embedding_init=random"], 1, "fix training.embedding_init;"),
        (["--set", "mixer=other"], 1, "model.mixer must be one of conv, mlgru, got 'other'."),
        (["--init", "nowhere"], 1, "There is no run at nowhere;"),
        (["--init", __file__], 1, "cannot be read as a model"),
    ],
)
def test_mistakes_are_one_sentence(run, corpus, tmp_path, arguments, status, sentence):
    out = tmp_path / "tuned"
    done = command("train", corpus, "--init", run, "--steps", 1, "--out", out, *arguments)
    assert done.exit_code == status
    assert sentence in done.stderr.replace("\n", " ")
    assert not out.exists()


def test_a_checkpoint_of_another_mixer_is_one_sentence(run, corpus, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["model"]["mixer"] = "attention"
    (copy / "config.json").write_text(json.dumps(config))
    for arguments in (["eval", copy], ["train", corpus, "--init", copy, "--out", tmp_path / "tuned"]):
        done = command(*arguments)
        assert done.exit_code == 1
        assert "model.mixer must be one of conv, mlgru, got 'attention'" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "tuned").exists()


def test_another_vocabulary_is_refused(run, corpus_files, tmp_path):
    tokens = fl.prepare(corpus_files, tmp_path / "bytes", vocab="bytes")
    done = command("train", tokens, "--init", run, "--steps", 1, "--out", tmp_path / "tuned")
    assert done.exit_code == 1
    assert "were trained with another vocabulary than bytes of the tokens in" in done.stderr
    assert not (tmp_path / "tuned").exists()
