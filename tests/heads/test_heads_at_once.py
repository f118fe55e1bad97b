"""Heads in a server: calls from several Python threads at the same time give what they give alone, bit for bit."""

import threading
import weakref

import numba
import numpy as np
import pytest
from helpers import at_once

from flashlm_numba.heads import BitLinearHead, DenseHead, SampledHead, TreeHead
from flashlm_numba.kernels import dense_head, tree_head
from flashlm_numba.system.threads import available_cores, set_threads

V, C, THREADS = 700, 16, 4
CALLS = 3 if numba.config.DISABLE_JIT else 150  # per thread


@pytest.fixture(autouse=True)
def same_threads():
    """New Python threads use as many as this one, whatever the tests before have chosen: a tree's bits depend on it."""
    set_threads(numba.get_num_threads())


def head_named(name):
    rng = np.random.default_rng(0)
    weight, counts = rng.standard_normal((V, C), np.float32), np.arange(1, V + 1)
    prior = np.log(counts / counts.sum()).astype(np.float32)
    if name.startswith("dense"):
        head = DenseHead(weight, soft_cap=5.0, log_prior=prior)
        if name == "dense-int8":
            head.use_int8()
        return head
    if name == "bitlinear":
        return BitLinearHead(weight, soft_cap=5.0, log_prior=prior)
    if name == "sampled":
        return SampledHead(weight, counts=counts, candidates=64)
    return TreeHead(None, weight, counts=counts, shape="two-level", rank=4 if name == "tree-rank" else None)


HEADS = ("dense", "dense-int8", "sampled", "tree", "tree-rank", "bitlinear")
METHODS = {
    "log_prob": lambda head, h, targets, seed: head.log_prob(h, targets),
    "distribution": lambda head, h, targets, seed: head.distribution(h[:2]),
    "likeliest": lambda head, h, targets, seed: np.concatenate(head.likeliest(h[:2], 9), axis=1),
    "top": lambda head, h, targets, seed: np.concatenate(head.top(h[0], 9)),
    "descent": lambda head, h, targets, seed: head.sample(h[:4], np.random.default_rng(seed)),
    "top_k": lambda head, h, targets, seed: head.sample(h[:4], np.random.default_rng(seed), 0.8, top_k=40, top_p=0.9),
    "top_p": lambda head, h, targets, seed: head.sample(h[:2], np.random.default_rng(seed), 0.8, top_p=0.9),
    "greedy": lambda head, h, targets, seed: head.sample(h[:4], np.random.default_rng(seed), 0),
}


def inputs(seed):
    """h and targets whose number differs from call to call, as in a server."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(4, 60))
    return rng.standard_normal((rows, C), np.float32), rng.integers(0, V, rows).astype(np.int32)


def every_call(call, seeds):
    return [call(*inputs(seed), seed) for seed in seeds]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HEADS)
def test_calls_from_several_threads_are_bit_equal(name, method):
    head = head_named(name)
    calls = CALLS if method in ("log_prob", "distribution") else max(CALLS // 5, 3)
    seeds = [range(100 * t, 100 * t + calls) for t in range(THREADS)]

    def call(h, targets, seed):
        return METHODS[method](head, h, targets, seed)

    alone = [every_call(call, part) for part in seeds]
    together = at_once([lambda part=part: every_call(call, part) for part in seeds])
    for expected, found in zip(alone, together, strict=True):
        wrong = sum(not np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
        assert wrong == 0, f"{wrong} of {calls} calls"


@pytest.mark.parametrize("name", ["dense", "tree-rank", "bitlinear"])
def test_every_method_at_once_beside_training(name):
    """One thread trains (without changing parameters), the others ask."""
    head = head_named(name)
    weights = {rows: np.full(rows, 1 / rows, np.float32) for rows in range(1, 60)}
    expected = {m: [METHODS[m](head, *inputs(seed), seed) for seed in range(20)] for m in ("log_prob", "top_k", "top")}

    def train():
        for seed in range(20):
            h, targets = inputs(seed)
            head.forward_backward(h, targets, weights[len(h)], accumulate=False)
        return head.dweight.copy()

    gradient = train()
    asks = [lambda m=m: [METHODS[m](head, *inputs(seed), seed) for seed in range(20)] for m in expected]
    found, *answers = at_once([train, *asks])
    np.testing.assert_array_equal(found, gradient)
    for want, answer in zip(expected.values(), answers, strict=True):
        for a, b in zip(want, answer, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["dense", "tree"])
def test_scratch_is_at_most_one_per_call_in_flight_and_is_used_again(name, monkeypatch):
    head, module = head_named(name), dense_head if name == "dense" else tree_head
    kind = "DenseScratch" if name == "dense" else "TreeScratch"
    original, made, most = getattr(module, kind), [], [0]

    def watched(*args):
        scratch = original(*args)
        made.append(weakref.ref(scratch))
        most[0] = max(most[0], sum(ref() is not None for ref in made))
        return scratch

    monkeypatch.setattr(module, kind, watched)

    def calls(seeds):
        return every_call(lambda h, targets, seed: head.log_prob(h, targets), seeds)

    calls(range(5))
    assert len(made) == 1
    at_once([lambda: calls(range(CALLS))] * THREADS)
    assert most[0] <= THREADS
    assert 1 <= len(head._scratch.free) <= min(THREADS, available_cores())


@pytest.mark.parametrize(
    ("name", "module"),
    [("dense", dense_head), ("sampled", dense_head), ("tree", tree_head), ("bitlinear", dense_head)],
)
def test_a_second_forward_backward_in_flight_is_refused(name, module, monkeypatch):
    """It would add to the same gradients at the same time, and lose some."""
    head, (h, targets) = head_named(name), inputs(0)
    weights = np.full(len(h), 1 / len(h), np.float32)
    inside, go_on = threading.Event(), threading.Event()
    function = "tree_head_forward_backward" if name == "tree" else "dense_head_forward_backward"
    original = getattr(module, function)

    def slow(*args, **options):
        inside.set()
        assert go_on.wait(60)
        return original(*args, **options)

    expected = head.forward_backward(h, targets, weights)
    gradient = head.dweight.copy()
    head.dweight[...] = 0
    monkeypatch.setattr(module, function, slow)

    def second():
        assert inside.wait(60)
        try:
            with pytest.raises(RuntimeError, match=r"another thread is in forward_backward.*one thread at a time"):
                head.forward_backward(h, targets, weights, accumulate=False)
            if name == "sampled":
                with pytest.raises(RuntimeError, match="another thread is in forward_backward"):
                    head.begin(np.random.default_rng(0), full=True)
            head.log_prob(h, targets)  # asking is safe
        finally:
            go_on.set()

    found, _ = at_once([lambda: head.forward_backward(h, targets, weights), second])
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(head.dweight, gradient)
    head.forward_backward(h, targets, weights)  # and afterwards all is as before


def test_an_error_inside_a_call_gives_its_turn_back():
    head = head_named("dense")
    h, targets = inputs(0)
    for _ in range(2):
        with pytest.raises(ValueError, match="weights must have shape"):
            head.forward_backward(h, targets, np.ones(len(h) + 1, np.float32))
    head.forward_backward(h, targets, np.ones(len(h), np.float32))


def test_switching_to_int8_while_others_sample():
    """Each call is one or the other: never a mixture, never an error. Greedy choices are exact in both."""
    head = head_named("dense")
    h = np.random.default_rng(1).standard_normal((50, C), np.float32)
    expected = head.sample(h, np.random.default_rng(0), 0)
    loops = 2 if numba.config.DISABLE_JIT else 20

    def switch():
        for _ in range(loops):
            head._int8 = None
            head.use_int8()

    def ask():
        return [head.sample(h, np.random.default_rng(0), 0) for _ in range(loops)]

    for answer in at_once([switch, ask, ask])[1:]:
        for found in answer:
            np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="plain Python has one thread")
def test_the_number_of_threads_holds_in_every_python_thread(threads):
    """Numba keeps one number per Python thread. The bits depend on it, so all use the number of set_threads."""
    head, (h, targets), before = head_named("tree"), inputs(0), numba.get_num_threads()
    try:
        for count in (1, before):
            set_threads(count)
            found = at_once([lambda: (head.log_prob(h, targets), numba.get_num_threads())] * 2)
            assert [number for _, number in found] == [count, count]
    finally:
        set_threads(before)

    def own_number():
        head.log_prob(h, targets)
        numba.set_num_threads(1)
        head.log_prob(h, targets)
        return numba.get_num_threads()

    assert at_once([own_number]) == [1]
