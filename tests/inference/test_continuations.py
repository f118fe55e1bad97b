"""Continuations of a context: the scores of eval, the tokens of greedy generation, one pass over the context."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.heads import DenseHead, TreeHead
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.inference.continuations import score_continuations
from flashlm_numba.inference.evaluate import document_nll, score, token_nll
from flashlm_numba.inference.generate import generate_ids
from flashlm_numba.kernels.ngram_counts import count_ngrams
from flashlm_numba.memory.ngrams import GatedMemory
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.packed_model import random_packed_model
from flashlm_numba.model.parameters import initial_parameters
from flashlm_numba.system.errors import UserError

EOT, VOCAB = 0, 31
CONV = ModelConfig(VOCAB, 32, 40, 4, kernel_size=3, dilations=(1, 2), n_passes=2, leaky_decay=0.3)
COPY = dataclasses.replace(CONV, leaky_decay=0.0, ngram_copy_orders=(1, 2, 1), ngram_copy_reach=9)
MMF = ModelConfig(VOCAB, 32, 40, mixer="mlgru", linear="bitlinear", n_blocks=2, n_passes=1)
KINDS = {
    "leaky average": CONV,
    "copies added": COPY,
    "copies mixed": dataclasses.replace(COPY, ngram_copy_output="mixture"),
    "memory": CONV,
    "matmul-free": MMF,
    "matmul-free, copies added": dataclasses.replace(MMF, ngram_copy_orders=(1, 2), ngram_copy_reach=9),
    "packed": MMF,
}


def make(kind):
    config, rng = KINDS[kind], np.random.default_rng(1)
    if kind == "packed":
        return random_packed_model(config, seed=1, std=1.0)
    parameters = initial_parameters(config, seed=1, embedding_std=1.0)
    for name, value in parameters.items():
        if ".mixer.leaky." in name or name.startswith("ngram_copy."):
            value += rng.standard_normal(value.shape).astype(np.float32)
    memory = None
    if kind == "memory":
        memory = GatedMemory(count_ngrams(rng.integers(0, 6, 400).astype(np.uint16), VOCAB, EOT), config.dim)
    tree = build_tree("adaptive", rng.integers(0, 50, VOCAB))
    head = DenseHead if "copies" in kind else lambda w, dw: TreeHead(tree, w, dw)
    return Model(config, parameters, head, memory)


MODELS = {kind: make(kind) for kind in KINDS}


def ids_of(seed, length):
    """Ids of few different tokens, so that n-grams occur again."""
    return np.random.default_rng(seed).integers(1, 6, length).astype(np.int32)


def log_prob(model, context, *continuations):
    return [found.log_prob for found in score_continuations(model, [EOT, *context], continuations)]


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 2**32 - 1), st.integers(0, 90), st.lists(st.integers(0, 12), max_size=4))
def test_the_probability_is_that_of_the_tokens_in_the_whole_text(kind, seed, before, lengths):
    model, context = MODELS[kind], ids_of(seed, before)
    continuations = [ids_of(seed + n, length) for n, length in enumerate(lengths)]
    found = log_prob(model, context, *continuations)
    for value, ids in zip(found, continuations, strict=True):
        nll = token_nll(model, np.concatenate([context, ids]), eot=EOT)[before:]
        assert value == pytest.approx(-nll.sum(), abs=2e-5 * (1 + len(ids)))


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(0, 9), st.integers(0, 9))
def test_two_continuations_after_one_another_are_one(kind, seed, before, first, second):
    model = MODELS[kind]
    a, b, c = np.split(ids_of(seed, before + first + second), [before, before + first])
    (ab,), (abc,), (whole,) = (
        log_prob(model, a, b),
        log_prob(model, np.concatenate([a, b]), c),
        log_prob(model, a, np.concatenate([b, c])),
    )
    assert ab + abc == pytest.approx(whole, abs=2e-5 * (1 + first + second))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [0, 3, 50])
def test_greedy_is_what_temperature_0_generates(kind, before):
    model, context = MODELS[kind], ids_of(before, before)
    tokens = generate_ids(model, [EOT, *context.tolist()], rng=np.random.default_rng(0), temperature=0)
    best = list(itertools.islice(tokens, 6))
    wrong = [[*best[:n], (best[n] + 1) % VOCAB, *best[n + 1 :]] for n in range(6)]
    found = score_continuations(model, [EOT, *context], [best, best[:1], [], *wrong])
    assert [each.greedy for each in found] == [True] * 3 + [False] * 6
    assert found[2].log_prob == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_state_goes_its_own_way(kind):
    model, ids = MODELS[kind], ids_of(0, 60)
    state, _ = model.prefill(ids[:30])
    copy = model.copy_state(state)
    other = model.read(copy, ids_of(1, 20))
    np.testing.assert_array_equal(model.read(model.copy_state(state), ids_of(1, 20)), other)
    again, _ = model.prefill(ids[:30])
    np.testing.assert_array_equal(model.read(state, ids[30:]), model.read(again, ids[30:]))


@pytest.mark.parametrize("kind", KINDS)
def test_documents_one_by_one_have_the_sum_of_all(kind):
    model, told = MODELS[kind], []
    documents = [ids_of(n, length) for n, length in enumerate((1, 40, 0, 2_500, 13, 64))]
    found = document_nll(model, documents, eot=EOT, progress=told.append)
    for nll, document in zip(found, documents, strict=True):
        assert nll == pytest.approx(token_nll(model, document, eot=EOT).sum(), abs=1e-5 * (1 + len(document)))
    if kind != "packed":
        assert found.sum() == pytest.approx(score(model, documents, eot=EOT).nll, rel=1e-12)
    assert sum(told) == sum(map(len, documents))


def test_weights_that_are_too_large_are_named():
    parameters = initial_parameters(CONV, seed=1, embedding_std=1.0)
    parameters["final_norm.weight"][:] = np.inf
    with pytest.raises(UserError, match="use an earlier checkpoint"):
        score_continuations(Model(CONV, parameters, DenseHead), [EOT, 1], [[2], [3, 4]])
