"""The mixture of a head and a memory: its gradients by differences, its limits, and sums to one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.heads import DenseHead, TreeHead
from flashlm_numba.kernels.ngram_counts import count_ngrams
from flashlm_numba.kernels.ngrams import class_count
from flashlm_numba.memory.gate import Gate, Recalled
from flashlm_numba.memory.ngrams import FixedMemory, GatedMemory

V, C = 11, 6


def some_head(kind, rng):
    weight = rng.standard_normal((V, C)).astype(np.float32)
    if kind == "dense":
        return DenseHead(weight)
    return TreeHead(weight=weight, counts=np.arange(V), shape="huffman")


def some_case(kind, seed, n=7):
    rng = np.random.default_rng(seed)
    gate = Gate(5, C)
    for value in gate.parameters.values():
        value[...] = rng.standard_normal(value.shape)
    h = rng.standard_normal((n, C)).astype(np.float32)
    targets = rng.integers(0, V, n).astype(np.int32)
    recalled = Recalled(rng.random(n).astype(np.float32) ** 4, rng.integers(0, 5, n).astype(np.int32))
    return some_head(kind, rng), gate, h, targets, recalled, rng.random(n).astype(np.float32)


@pytest.mark.parametrize("kind", ["dense", "tree"])
def test_the_gates_gradients_are_those_of_the_mixture(kind):
    head, gate, h, targets, recalled, weights = some_case(kind, 0)
    _, nll, _ = gate.forward_backward(head, h, targets, weights, recalled, accumulate=False)

    def value():
        return float(-(weights * gate.mixed(h, head.log_prob(h, targets), recalled)).sum())

    assert value() == pytest.approx(float((weights * nll).sum()), rel=1e-5)
    for name, parameter in gate.parameters.items():
        for place in range(len(parameter)):
            before, step = parameter[place], 1e-2
            parameter[place] = before + step
            above = value()
            parameter[place] = before - step
            below = value()
            parameter[place] = before
            assert gate.gradients[name][place] == pytest.approx((above - below) / (2 * step), rel=2e-2, abs=2e-4)


@pytest.mark.parametrize("kind", ["dense", "tree"])
def test_the_head_learns_as_if_there_were_no_memory(kind):
    head, gate, h, targets, recalled, weights = some_case(kind, 1)
    loss, _, dh = gate.forward_backward(head, h, targets, weights, recalled, accumulate=False)
    gradient = head.dweight.copy()
    plain_loss, _, plain_dh = head.forward_backward(h, targets, weights, accumulate=False)
    for found, want in ((loss, plain_loss), (dh, plain_dh), (gradient, head.dweight)):
        np.testing.assert_array_equal(found, want)


def test_gradients_are_added_or_replaced():
    head, gate, h, targets, recalled, weights = some_case("dense", 1)
    gate.forward_backward(head, h, targets, weights, recalled, accumulate=False)
    once = {name: value.copy() for name, value in gate.gradients.items()}
    gate.forward_backward(head, h, targets, weights, recalled, accumulate=True)
    for name, value in gate.gradients.items():
        np.testing.assert_allclose(value, 2 * once[name], rtol=1e-6)


@given(st.integers(0, 2**32 - 1), st.floats(-200, 200))
def test_extreme_shares_are_one_of_the_two(seed, logit):
    head, gate, h, targets, recalled, _ = some_case("dense", seed)
    gate.parameters["weight"][...], gate.parameters["classes"][...] = 0, logit
    log_prob = head.log_prob(h, targets)
    mixed = gate.mixed(h, log_prob, recalled)
    assert np.isfinite(mixed).all()
    if logit > 100:
        np.testing.assert_allclose(mixed, np.log(recalled.probability), rtol=1e-4)
    if logit < -100:
        np.testing.assert_allclose(mixed, log_prob, rtol=1e-5)


def test_a_memory_that_knows_nothing_leaves_the_head():
    head, gate, h, targets, recalled, weights = some_case("dense", 3)
    nothing = Recalled(np.zeros_like(recalled.probability), recalled.classes)
    _, nll, dh = gate.forward_backward(head, h, targets, weights, nothing)
    assert np.isfinite(nll).all()
    assert np.isfinite(dh).all()
    log_prob = head.log_prob(h, targets)
    np.testing.assert_array_equal(FixedMemory(None, 0.0).mixed(h, log_prob, recalled), log_prob.astype(np.float64))
    np.testing.assert_allclose(
        FixedMemory(None, 1.0).mixed(h, log_prob, recalled), np.log(recalled.probability), rtol=1e-6
    )


def test_no_positions():
    head, gate, h, targets, recalled, weights = some_case("dense", 4)
    none = np.arange(0)
    loss, nll, dh = gate.forward_backward(head, h[:0], targets[:0], weights[:0], recalled.at(none), accumulate=False)
    assert loss.shape == nll.shape == (0,)
    assert dh.shape == (0, C)
    assert not gate.gradients["classes"].any()


def test_wrong_parameters_are_refused():
    with pytest.raises(ValueError, match="parameter weight is missing"):
        Gate(5, C, {"classes": np.zeros(5, np.float32)})
    with pytest.raises(ValueError, match="classes"):
        Gate(5, C, {"classes": np.zeros(4, np.float32), "weight": np.zeros(C, np.float32)})


# --- after a text ---


def some_memory(seed, order=4):
    rng = np.random.default_rng(seed)
    text = np.append(rng.integers(0, 5, 80), V - 1).astype(np.int32)
    memory = GatedMemory(count_ngrams(text, V, V - 1, order=order), C)
    assert len(memory.gate.parameters["classes"]) == class_count(order)
    for value in memory.gate.parameters.values():
        value[...] = rng.standard_normal(value.shape)
    return memory, text[:9], rng


@pytest.mark.parametrize("kind", ["dense", "tree"])
@pytest.mark.parametrize("seed", range(3))
def test_the_mixture_after_a_text(kind, seed):
    """What is sampled, what is likeliest, and what scoring says of every token are one distribution."""
    memory, text, rng = some_memory(seed)
    head, h = some_head(kind, rng), rng.standard_normal((1, C)).astype(np.float32)
    mixed = memory.beside(head, text)
    p = mixed.distribution(h)[0]
    assert p.sum(dtype=np.float64) == pytest.approx(1, abs=1e-5)
    for token in range(V):
        recalled = memory.recall(np.append(text, np.int32(token)))
        at = Recalled(recalled.probability[-1:], recalled.classes[-1:])
        own = head.log_prob(h, np.array([token], np.int32))
        assert memory.gate.mixed(h, own, at)[0] == pytest.approx(np.log(p[token]), abs=1e-4)
        assert mixed.log_prob_of(h[0], np.array([token], np.int32))[0] == pytest.approx(np.log(p[token]), abs=1e-4)
        parts = mixed.parts(h, token)
        assert [part.name for part in parts] == ["head", "memory"]
        assert sum(part.share * part.probability for part in parts) == pytest.approx(p[token], rel=1e-4)
    for count in (1, 3, V, V + 5):
        ids, values = mixed.top(h[0], count)
        np.testing.assert_allclose(values, np.sort(p)[::-1][:count], rtol=1e-4)
        np.testing.assert_allclose(values, p[ids], rtol=1e-4)
    assert mixed.sample(h, rng, temperature=0)[0] == p.argmax()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 4}, {"top_p": 0.8}, {"temperature": 1.3, "top_k": 5, "top_p": 0.9}]
)
def test_tokens_are_sampled_from_the_mixture(options):
    memory, text, rng = some_memory(5)
    head, h = some_head("tree", rng), rng.standard_normal((1, C)).astype(np.float32)
    mixed = memory.beside(head, text)
    p = mixed.distribution(h)[0].astype(np.float64) ** (1 / options.get("temperature", 1))
    order = np.argsort(-p, kind="stable")[: options.get("top_k", V)]
    total = np.cumsum(p[order])
    order = order[: int(np.searchsorted(total, options.get("top_p", 1) * total[-1])) + 1]
    want = np.zeros(V)
    want[order] = p[order] / p[order].sum()
    draws = 3_000
    found = np.bincount([mixed.sample(h, rng, **options)[0] for _ in range(draws)], minlength=V) / draws
    assert not found[want == 0].any()
    np.testing.assert_allclose(found, want, atol=5 * 0.5 / draws**0.5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(-6, 6))
def test_the_likeliest_of_both_are_found_where_they_disagree(seed, count, logit):
    """The memory knows tokens that the head finds unlikely, of a vocabulary larger than the first candidates."""
    rng = np.random.default_rng(seed)
    vocab = 300
    text = np.append(rng.integers(0, vocab - 1, 400), vocab - 1).astype(np.int32)
    memory = GatedMemory(count_ngrams(text, vocab, vocab - 1, order=3), C)
    memory.gate.parameters["classes"][...] = logit
    weight = (2 * rng.standard_normal((vocab, C))).astype(np.float32)
    head, h = TreeHead(weight=weight, counts=np.arange(vocab)), rng.standard_normal((1, C)).astype(np.float32)
    mixed = memory.beside(head, text[:7])
    p = mixed.distribution(h)[0]
    ids, values = mixed.top(h[0], count)
    np.testing.assert_allclose(values, np.sort(p)[::-1][:count], rtol=1e-3, atol=1e-9)
    assert len(set(ids.tolist())) == count
