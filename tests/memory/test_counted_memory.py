"""eval with a memory: the mixture of the model's and the n-grams' probabilities, and what it says."""

import json

import numpy as np
import pytest
from helpers import command

from flashlm_numba.data.shards import open_tokens
from flashlm_numba.inference import evaluate
from flashlm_numba.inference.evaluate import CountedMemory, evaluate_run, token_nll
from flashlm_numba.kernels.ngram_counts import count_ngrams
from flashlm_numba.model.build import load_model
from flashlm_numba.system.errors import UserError


def expected(run, corpus, options):
    """NLL of the mixture and of the n-grams, from every document alone."""
    tokens, loaded = open_tokens(corpus), load_model(run)
    eot, size = tokens.vocabulary.eot, tokens.vocabulary.size
    model = count_ngrams(tokens.train.ids(), size, eot, least=options.least)
    mixed, alone = [], []
    for document in tokens.validation.documents():
        known = model.probability(document)[0].astype(np.float64)
        mine = np.exp(-token_nll(loaded.model, document, eot=eot))
        mixed.append(-np.log(options.share * known + (1 - options.share) * mine))
        alone.append(-np.log(known))
    return np.concatenate(mixed).mean(), np.concatenate(alone).mean()


@pytest.mark.parametrize("options", [CountedMemory(), CountedMemory(2, 0.9)], ids=["default", "pruned"])
def test_the_mixture_is_scored_beside_the_model(run, corpus, options):
    plain = evaluate_run(run)
    found = evaluate_run(run, memory=options)
    memory = found.pop("memory")
    assert memory["head_nll"] == plain["nll"]
    assert found == plain  # what is said of the model alone stays
    mixed, alone = expected(run, corpus, options)
    assert memory["nll"] == pytest.approx(mixed, rel=1e-5)
    assert memory["alone_nll"] == pytest.approx(alone, rel=1e-5)
    assert memory["bits_per_byte"] / memory["nll"] == pytest.approx(plain["bits_per_byte"] / plain["nll"])
    assert memory["nll"] < plain["nll"]  # the model has seen three steps


@pytest.mark.parametrize(("weight", "same"), [(0.0, "nll"), (1.0, "alone_nll")])
def test_a_weight_of_none_or_all(run, weight, same):
    memory = evaluate_run(run, memory=CountedMemory(share=weight))["memory"]
    want = evaluate_run(run)["nll"] if same == "nll" else memory["alone_nll"]
    assert memory["nll"] == pytest.approx(want, rel=1e-6)


def test_the_command_prints_both(run):
    done = command("eval", run, "--memory", "ngrams")
    assert done.exit_code == 0, done.output
    assert "with n-grams" in done.stdout
    assert "of up to 5 tokens" in done.stdout
    found = json.loads(command("eval", run, "--memory", "ngrams", "--json").stdout)
    assert found["memory"]["kind"] == "ngrams"
    assert found["memory"]["bytes"] > 0


def test_the_text_of_an_export_is_named(run, corpus, corpus_files, tmp_path):
    """An export does not know where its text is; --data says so, and the text to score may be another."""
    file = tmp_path / "one.safetensors"
    assert command("export", run, file).exit_code == 0
    for words in ([], [corpus], [corpus_files / "validation.jsonl"]):
        done = command("eval", file, *words, "--memory", "ngrams")
        assert done.exit_code == 1
        assert "does not say where its text is; name the folder of its tokens with --data DIR." in done.stderr
    done = command("eval", file, corpus_files / "validation.jsonl", "--data", corpus, "--memory", "ngrams", "--json")
    assert done.exit_code == 0, done.output
    want = evaluate_run(run, memory=CountedMemory())["memory"]["alone_nll"]
    assert json.loads(done.stdout)["memory"]["alone_nll"] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    "words", [["--memory-weight", 0.5], ["--memory", "words"], ["--memory", "ngrams", "--memory-weight", 2]]
)
def test_options_that_do_not_fit_are_refused(run, words):
    assert command("eval", run, *words).exit_code == 2


def test_what_cannot_be_scored_is_refused_before_counting(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "count_tokens", None)
    with pytest.raises(UserError, match="missing"):
        evaluate_run(run, str(tmp_path / "missing.txt"), memory=CountedMemory())
