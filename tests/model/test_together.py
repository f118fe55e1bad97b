"""Texts that advance together: the tokens of each alone, from one reading of the weights."""

import itertools

import numpy as np
import pytest
from helpers import at_once

from flashlm_numba.heads import BitLinearHead, DenseHead, SampledHead, TreeHead
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.inference.generate import generate_blocks, generate_ids
from flashlm_numba.kernels import dense_inference
from flashlm_numba.model import packed_model
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.packed_model import random_packed_model
from flashlm_numba.model.parameters import initial_parameters
from flashlm_numba.model.together import MOST_TEXTS

VOCAB = 50
OPTIONS = ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0}, {"temperature": 0.5}, {"top_k": 9, "top_p": 0.8})
BIT = {"mixer": "mlgru", "linear": "bitlinear", "n_blocks": 2, "n_passes": 1}
KINDS = ("packed", "dense", "dense int8", "sampled", "dense, copies", "dense, MatMul-free")


def make(kind):
    """A model of this kind with random weights."""
    if kind == "packed":
        return random_packed_model(ModelConfig(VOCAB, dim=70, ffn_dim=260, **BIT), 0, std=1.0)
    own = {"groups": 4, "dilations": (1, 2), "mixer_residual_scale": 0.25, "ffn_residual_scale": 2**-7}
    if kind == "dense, MatMul-free":
        own = BIT
    if kind == "dense, copies":
        own |= {"ngram_copy_orders": (1, 2), "ngram_copy_reach": 9, "ngram_copy_output": "mixture"}
    config = ModelConfig(VOCAB, 16, 24, **own)
    head = SampledHead if kind == "sampled" else DenseHead
    more = {"candidates": 20, "counts": np.arange(VOCAB)} if kind == "sampled" else {}
    prior = np.random.default_rng(5).standard_normal(VOCAB).astype(np.float32)
    parameters = initial_parameters(config, 0, embedding_std=0.5)
    model = Model(config, parameters, lambda w, dw: head(w, dw, log_prior=prior, soft_cap=9.0, **more))
    if kind == "dense int8":
        model.head.use_int8()
    return model


def texts_of(model, count):
    """Iterators over the tokens of texts that begin in different ways, each with random numbers of its own."""
    return [
        generate_ids(model, [3, n % VOCAB], rng=np.random.default_rng(n), **OPTIONS[n % len(OPTIONS)])
        for n in range(count)
    ]


def count_passes(model, monkeypatch):
    """The numbers of texts of the steps, and those of the positions of the head's products."""
    steps, products = [], []
    step = model._together._step

    def counted(states, tokens, h):
        steps.append(len(states))
        return step(states, tokens, h)

    monkeypatch.setattr(model._together, "_step", counted)
    for module, name in (
        (packed_model, "packed_outputs"),
        (dense_inference, "dense_logits"),
        (dense_inference, "dense_logits_int8"),
    ):
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda x, *rest, function=function: products.append(len(x)) or function(x, *rest)
        )
    return steps, products


@pytest.mark.parametrize("count", [1, 2, 7, 66])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_advance_together_are_those_of_each_alone(kind, count, monkeypatch):
    model = make(kind)
    assert model.advances_together
    alone = [[next(text) for _ in range(6)] for text in texts_of(model, count)]
    texts = texts_of(model, count)
    first = [next(text) for text in texts]
    steps, products = count_passes(model, monkeypatch)
    rest = [[next(text) for text in texts] for _ in range(5)]
    assert np.array_equal(np.array([first, *rest]).T, alone)
    groups = [min(MOST_TEXTS, count - first) for first in range(0, count, MOST_TEXTS)]
    assert sorted(steps) == sorted(groups * 5) or (count > MOST_TEXTS and max(steps) == MOST_TEXTS)
    if kind == "dense int8":  # two arithmetics: texts with top_p alone need exact logits, and all a few exact rows
        assert max(products) == min(count, MOST_TEXTS)
    else:
        assert products == steps  # whatever the sampling, the rows are read once for all


@pytest.mark.parametrize("kind", ["packed", "dense, copies"])
def test_texts_end_and_begin_while_others_advance(kind, monkeypatch):
    model = make(kind)
    alone = [[next(text) for _ in range(12)] for text in texts_of(model, 5)]
    steps, _ = count_passes(model, monkeypatch)
    waiting, texts, found = texts_of(model, 5), {}, [[] for _ in range(5)]
    for turn in range(15):
        if turn % 3 == 0:
            texts[turn // 3], waiting[turn // 3] = waiting[turn // 3], None
        for n in list(texts):
            found[n].append(next(texts[n]))
            if len(found[n]) == 5 + n:
                del texts[n]
    assert found == [alone[n][: len(part)] for n, part in enumerate(found)]
    assert max(steps) > 1
    assert len(model._together)
    texts.clear()
    assert not len(model._together)  # what was announced is forgotten with the texts


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_several_threads_are_those_of_each_alone(kind):
    model = make(kind)
    alone = [[next(text) for _ in range(30)] for text in texts_of(model, 8)]
    texts = texts_of(model, 8)
    assert at_once([lambda text=text: [next(text) for _ in range(30)] for text in texts]) == alone


@pytest.mark.parametrize("kind", ["packed", "dense", "dense, MatMul-free"])
def test_an_announced_token_must_be_the_next(kind):
    model = make(kind)
    state, other = model.prefill(np.array([1], np.int32))[0], model.prefill(np.array([2], np.int32))[0]
    again = model.copy_state(state)
    alone = model.decode_step(again, 3).copy()
    model.announce(state, 3)
    with pytest.raises(ValueError, match="waits for token 3, which was announced"):
        model.announce(state, 4)
    with pytest.raises(ValueError, match="waits for token 3, which was announced"):
        model.copy_state(state)
    with pytest.raises(ValueError, match="token 3 was announced, and 4 came"):
        model.decode_step(state, 4)
    model.announce(other, 5)
    model.decode_step(other, 5)  # the step of the first is computed too
    with pytest.raises(ValueError, match="token 3 was announced, and 4 came"):
        model.decode_step(state, 4)
    np.testing.assert_array_equal(model.decode_step(state, 3), alone)
    np.testing.assert_array_equal(model.decode_step(state, 6), model.decode_step(again, 6))
    for token in (-1, VOCAB):
        with pytest.raises(ValueError, match=r"must be in \[0, 50\)"):
            model.announce(state, token)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_in_a_step_advances_no_text_twice(error, monkeypatch):
    """It comes when the compiled code of the third text's step returns, as that of a signal does."""
    model = make("dense")
    alone = [[next(text) for _ in range(6)] for text in texts_of(model, 5)]
    texts = texts_of(model, 5)
    found = [[next(text)] for text in texts]
    step, calls = model._trunk.step, []

    def fail_once(*arguments):
        h = step(*arguments)
        calls.append(h)
        if len(calls) == 3:
            raise error
        return h

    monkeypatch.setattr(model._trunk, "step", fail_once)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):  # for whoever runs the texts
            next(texts[0])
    else:
        found[0].append(next(texts[0]))  # it is not this text's
    others = [1, 3, 4] if error is KeyboardInterrupt else [0, 1, 3, 4]
    with pytest.raises(RuntimeError, match="the step of this text was interrupted") as caught:
        next(texts[2])
    assert isinstance(caught.value.__cause__, error)
    for _ in range(4):
        for n in others:
            found[n].append(next(texts[n]))
    assert [found[n] for n in others] == [alone[n][: len(found[n])] for n in others]


def test_a_text_s_own_error_is_its_own(monkeypatch):
    model = make("dense")
    texts = texts_of(model, 3)
    for text in texts:
        next(text)
    monkeypatch.setattr(model._trunk, "step", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(texts[0])


def test_a_long_prompt_is_read_in_parts(monkeypatch):
    prompt = np.random.default_rng(0).integers(0, VOCAB, 200).tolist()
    for kind in ("packed", "dense, MatMul-free"):
        model = make(kind)
        blocks = generate_blocks(model, prompt, rng=np.random.default_rng(1))
        found = list(itertools.takewhile(lambda block: not block, blocks))
        assert len(found) == 3  # between four parts, in which other texts have their turns
        whole = make(kind)
        monkeypatch.setattr(type(whole), "prompt_part", None)
        undivided = list(itertools.islice(generate_blocks(whole, prompt, rng=np.random.default_rng(1)), 4))
        assert [next(blocks) for _ in range(3)] == undivided[1:]  # takewhile took the first token
        monkeypatch.undo()
    model = make("dense")
    assert len(next(generate_blocks(model, prompt, rng=np.random.default_rng(1)))) == 1


def test_changed_weights_are_those_of_the_next_logits():
    model = make("dense")
    texts = texts_of(model, 2)
    for text in texts:
        next(text)
    next(texts[0])  # the step of both
    h = model.head.joined.row(1)
    before = model.head.logits(h)
    model.parameters["embedding.weight"][:] *= 2
    model.sync_weights()
    assert not np.array_equal(model.head.logits(h), before)
    np.testing.assert_array_equal(model.head.logits(h), model.head.logits(h.copy()))


def test_rows_rounded_meanwhile_are_used_from_the_next_step_on():
    model = make("dense")
    texts = texts_of(model, 2)
    for text in texts:
        next(text)
    next(texts[0])  # the step of both, and the logits
    h, alone = model.head.joined.row(1), make("dense int8").head
    model.head.use_int8()
    found, wanted = (head.sample(x, np.random.default_rng(3)) for head, x in ((model.head, h), (alone, h.copy())))
    assert found == wanted
    assert model.head.joined is None


@pytest.mark.parametrize("head", ["tree", "bitlinear"])
def test_where_a_token_reads_little_each_text_advances_alone(head):
    config = ModelConfig(VOCAB, 16, 24, groups=4, dilations=(1, 2))
    tree = build_tree("adaptive", np.arange(VOCAB))
    make_head = BitLinearHead if head == "bitlinear" else lambda w, dw: TreeHead(tree, w, dw)
    model = Model(config, initial_parameters(config, 0), make_head)
    assert not model.advances_together
    state, _ = model.prefill(np.array([1], np.int32))
    model.announce(state, 3)
    model.decode_step(state, 4)  # nothing was kept
