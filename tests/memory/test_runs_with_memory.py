"""A run with a memory: training, resuming, scoring, generating, exporting, and damaged n-grams."""

import json
import shutil

import numpy as np
import pytest
from helpers import TINY, command
from safetensors.numpy import load_file

import flashlm_numba as fl
from flashlm_numba.data.shards import open_tokens
from flashlm_numba.inference.evaluate import evaluate_run
from flashlm_numba.kernels.ngram_counts import count_ngrams
from flashlm_numba.memory.files import NGRAMS
from flashlm_numba.model import checkpoint
from flashlm_numba.model.build import load_model
from flashlm_numba.model.describe import describe_run
from flashlm_numba.model.export import export_run


def train(corpus, folder, *words):
    settings = [part for setting in (*TINY, "checkpoint_every=2", "ema=0.5") for part in ("--set", setting)]
    return command("train", corpus, "--memory", "ngrams", "--out", folder, "--threads", 1, *settings, *words)


@pytest.fixture(scope="module")
def remembering(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "memory"
    done = train(corpus, folder, "--steps", 6)
    assert done.exit_code == 0, done.output
    assert "n-grams of up to 5 tokens" in done.stderr
    return folder


def test_the_ngrams_are_those_of_the_training_text(remembering, corpus):
    tokens = open_tokens(corpus)
    want = count_ngrams(tokens.train.ids(), tokens.vocabulary.size, tokens.vocabulary.eot)
    found = load_model(remembering).model.memory.model
    assert (found.order, found.end_of_text) == (5, tokens.vocabulary.eot)
    for one, other in zip(found.tables, want.tables, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_model_learns_as_in_a_run_without_a_memory(remembering, corpus, tmp_path):
    settings = [part for setting in (*TINY, "checkpoint_every=2", "ema=0.5") for part in ("--set", setting)]
    done = command("train", corpus, "--out", tmp_path / "plain", "--threads", 1, "--steps", 6, *settings)
    assert done.exit_code == 0, done.output
    for file in ("model", "optimizer", "ema"):
        plain, ours = (load_file(checkpoint.find(x) / f"{file}.safetensors") for x in (tmp_path / "plain", remembering))
        assert all("memory." in name for name in ours.keys() - plain.keys())
        for name, value in plain.items():
            np.testing.assert_array_equal(value, ours[name], err_msg=name)


def test_the_gate_is_trained_and_the_model_is_better_with_the_memory(remembering, corpus):
    gate = load_model(remembering).model.memory.gate.parameters
    assert all(value.any() for value in gate.values())
    found = evaluate_run(remembering)
    memory = found["memory"]
    assert found["nll"] == memory["nll"] < memory["head_nll"]
    alone = evaluate_run(remembering, alone=True)
    assert alone["nll"] == pytest.approx(memory["head_nll"], rel=1e-9)
    assert "memory" not in alone
    lines = [json.loads(line) for line in (remembering / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["val_nll"] < memory["head_nll"]


def test_scoring_and_logits_agree(remembering):
    model = fl.load(remembering)
    text = "the people of this nation have seen"
    ids = [model.vocabulary.start, *model.vocabulary.encode(text)]
    logits = model.logits(np.array([ids[:-1]]))[0].astype(np.float64)
    np.testing.assert_allclose(np.exp(logits).sum(1), 1, atol=1e-4)
    nll = -logits[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(nll, model.score(text).token_nll, rtol=1e-4)
    likeliest = model.next_tokens("the people of", 3)
    assert likeliest[0][1] >= likeliest[1][1] >= likeliest[2][1] > 0


@pytest.mark.parametrize("at", [2, 4])
def test_a_resumed_run_has_the_bits_of_one_without_a_pause(remembering, tmp_path, at):
    folder = tmp_path / "again"
    shutil.copytree(remembering, folder)
    for step in (2, 4, 6):
        if step > at:
            shutil.rmtree(folder / "checkpoints" / f"step-{step}")
    done = command("train", "--resume", folder)
    assert done.exit_code == 0, done.output
    for file in ("model", "optimizer", "ema"):
        one, other = (load_file(checkpoint.find(path) / f"{file}.safetensors") for path in (folder, remembering))
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_a_run_without_a_checkpoint_starts_again(remembering, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(remembering, folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / NGRAMS).unlink()
    assert command("train", "--resume", folder).exit_code == 0
    assert (folder / NGRAMS).read_bytes() == (remembering / NGRAMS).read_bytes()


def test_an_export_holds_the_memory_or_not(remembering, corpus, tmp_path):
    whole, without = tmp_path / "whole.safetensors", tmp_path / "without.safetensors"
    export_run(remembering, whole, rows="float")
    done = command("export", remembering, without, "--rows", "float", "--no-memory")
    assert done.exit_code == 0, done.output
    want, data = evaluate_run(remembering), str(corpus)
    found = evaluate_run(whole, data)
    assert (found["nll"], found["memory"]) == (want["nll"], want["memory"])
    assert evaluate_run(without, data)["nll"] == want["memory"]["head_nll"]
    texts = [
        command("generate", path, "--seed", 3, "--max-tokens", 12, *more).stdout
        for path in (remembering, whole)
        for more in ([], ["--temperature", 1], ["--top-k", 3], ["--temperature", 0], ["--prompt", "the people "])
    ]
    assert texts[:5] == texts[5:]
    assert describe_run(whole)["memory"]["ngrams"] == describe_run(remembering)["memory"]["ngrams"] > 0
    assert describe_run(without)["memory"] is None


def test_weights_with_a_memory_start_a_run_with_or_without_one(remembering, corpus, tmp_path):
    for name, words in (("with", ["--memory", "ngrams"]), ("without", [])):
        folder = tmp_path / name
        done = command("train", corpus, "--init", remembering, "--steps", 1, "--out", folder, *words)
        assert done.exit_code == 0, done.output
        loaded = load_model(folder)
        assert (loaded.model.memory is not None) == bool(words)


@pytest.mark.parametrize("change", ["missing", "changed", "cut"])
@pytest.mark.parametrize("words", [["eval"], ["generate"], ["train", "--resume"], ["info"]])
def test_damaged_ngrams_are_refused(remembering, tmp_path, change, words):
    folder = tmp_path / "damaged"
    shutil.copytree(remembering, folder)
    data = bytearray((folder / NGRAMS).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / NGRAMS).unlink()
    if change != "missing":
        (folder / NGRAMS).write_bytes(data if change == "changed" else data[:-9])
    done = command(*words, folder)
    assert done.exit_code == 1
    assert done.stderr.strip().endswith("restore it.")
    assert NGRAMS in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "memory=none"], "--set memory repeats an option"),
        (["--set", "memory_least=0"], "memory.memory_least must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(corpus, tmp_path, words, message):
    done = train(corpus, tmp_path / "run", "--steps", 1, *words)
    assert done.exit_code in (1, 2)
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_least_count_without_a_memory_has_no_effect_and_is_refused(corpus, tmp_path):
    done = command("train", corpus, "--out", tmp_path / "run", "--set", "memory_least=2")
    assert done.exit_code == 1
    assert "memory.memory_least needs a memory" in done.stderr


def test_a_memory_of_its_own_takes_no_other(remembering):
    done = command("eval", remembering, "--memory", "ngrams", "--memory-weight", 0.5)
    assert done.exit_code == 1
    assert "has a memory of its own, which is mixed in anyway; leave out --memory." in done.stderr
    none = command("eval", remembering, "--memory", "none")
    assert none.exit_code == 0
    assert "n-grams" not in none.stdout
    both = command("eval", remembering)
    assert "without them" in both.stdout
    assert "n-grams alone" in both.stdout
