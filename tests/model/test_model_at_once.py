"""One model in several Python threads: forward passes, decoding, scoring and text, bit for bit as in one thread."""

import threading

import numba
import numpy as np
import pytest
from helpers import at_once

import flashlm_numba as fl
from flashlm_numba.heads import DenseHead, TreeHead
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.inference.evaluate import score, token_nll
from flashlm_numba.model import trunks
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters

V, THREADS = 97, 4
CONFIG = ModelConfig(
    vocab_size=V,
    dim=24,
    ffn_dim=40,
    groups=4,
    dilations=(1, 2, 8),
    ngram_copy_orders=(1, 2),
    ngram_copy_reach=64,
    leaky_decay=0.5,
)
CALLS = 2 if numba.config.DISABLE_JIT else 25  # per thread


@pytest.fixture(params=["float", "int8"])
def model(request):
    tree = build_tree("two-level", np.arange(V))
    parameters = initial_parameters(CONFIG, 0, embedding_std=0.5)
    net = Model(CONFIG, parameters, lambda weight, dweight: TreeHead(tree, weight, dweight))
    net.use_activations(request.param)
    return net


def text(seed):
    """Ids whose number differs from call to call."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, V, (1, int(rng.integers(2, 90)))).astype(np.int32)


def forward(model, seed):
    return model.forward(text(seed))


def decode(model, seed):
    """Hidden states of a prompt and eight tokens drawn after it."""
    rng = np.random.default_rng(seed)
    state, h = model.prefill(text(seed)[0])
    found = [h]
    for _ in range(8):
        token = int(model.head.sample(found[-1], rng, 0.9, top_k=20)[0])
        found.append(model.decode_step(state, token).copy())
    return np.concatenate(found)


def documents(model, seed):
    model.sync_weights()  # as every scoring does
    return np.append(token_nll(model, text(seed)[0], eot=0), score(model, [text(seed)[0]], eot=0).nll)


def compare(calls):
    """Each function of a seed, alone and then together with the others."""
    seeds = [range(1000 * index, 1000 * index + CALLS) for index in range(len(calls))]
    work = [lambda c=c, part=part: [c(seed) for seed in part] for c, part in zip(calls, seeds, strict=True)]
    alone = [run() for run in work]
    for expected, found in zip(alone, at_once(work), strict=True):
        wrong = sum(not np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
        assert wrong == 0, f"{wrong} of {CALLS} calls"


@pytest.mark.parametrize("call", [forward, decode, documents])
def test_calls_from_several_threads_are_bit_equal(model, call):
    compare([lambda seed: call(model, seed)] * THREADS)
    assert len(model._buffers.free) <= THREADS


def test_different_calls_at_once_beside_new_weights(model):
    """sync_weights packs the same weights anew, while others read them; so do generate, score and next_tokens."""
    compare(
        [
            *(lambda seed, call=call: call(model, seed) for call in (forward, decode, documents)),
            lambda _: model.sync_weights() or 0,
        ]
    )


def test_gradients_beside_other_calls(model):
    def gradients(seed):
        ids = np.concatenate([text(seed)] * 2)
        model.loss_and_grad(ids, ids, np.full(ids.size, 1 / ids.size, np.float32), accumulate=False)
        return np.concatenate([value.reshape(-1) for value in model.gradients.values()])

    compare([gradients, *(lambda seed, call=call: call(model, seed) for call in (forward, decode, documents))])


def test_a_change_of_the_arithmetic_waits_for_calls_in_flight(model):
    """Every answer is that of one arithmetic or the other."""
    model.use_activations("float")
    expected = {"float": forward(model, 1)}
    model.use_activations("int8")
    expected["int8"] = forward(model, 1)

    def switch():
        for index in range(CALLS):
            model.use_activations(("float", "int8")[index % 2])

    def ask():
        return [forward(model, 1) for _ in range(CALLS)]

    for answers in at_once([switch, ask, ask])[1:]:
        for found in answers:
            assert any(np.array_equal(found, want) for want in expected.values())


def test_a_decoding_state_in_use_is_refused(monkeypatch):
    net = Model(CONFIG, initial_parameters(CONFIG, 0), DenseHead)
    state, _ = net.prefill(text(0)[0])
    other, _ = net.prefill(text(0)[0])
    inside, go_on = threading.Event(), threading.Event()
    step = state.step

    def slow(*args):
        inside.set()
        assert go_on.wait(60)
        return step(*args)

    monkeypatch.setattr(state, "step", slow)

    def second():
        assert inside.wait(60)
        with pytest.raises(RuntimeError, match="another thread is using this state"):
            net.decode_step(state, 3)
        go_on.set()

    at_once([lambda: net.decode_step(state, 3), second])
    monkeypatch.undo()
    np.testing.assert_array_equal(net.decode_step(state, 4), [net.decode_step(other, t).copy() for t in (3, 4)][-1])


def test_backward_uses_this_threads_forward_or_none():
    """Another thread's forward pass may have taken the buffers: a sentence, never its numbers."""
    net = Model(CONFIG, initial_parameters(CONFIG, 0), DenseHead)
    ids = text(0)
    h = net.forward(ids)
    net.backward(np.ones_like(h))
    at_once([lambda: net.forward(ids)])
    with pytest.raises(ValueError, match="call forward first, in the same thread"):
        net.backward(np.ones_like(h))
    net.forward(ids)
    net.prefill(ids[0])
    with pytest.raises(ValueError, match="no other call between"):
        net.backward(np.ones_like(h))


def test_a_second_computation_of_gradients_is_refused(monkeypatch):
    net = Model(CONFIG, initial_parameters(CONFIG, 0), DenseHead)
    ids = text(0)
    weights = np.full(ids.size, 1 / ids.size, np.float32)
    inside, go_on = threading.Event(), threading.Event()
    original = trunks.trunk_backward

    def slow(*args):
        inside.set()
        assert go_on.wait(60)
        return original(*args)

    monkeypatch.setattr(trunks, "trunk_backward", slow)

    def second():
        assert inside.wait(60)
        try:
            for call in (
                lambda: net.loss_and_grad(ids, ids, weights),
                net.zero_grad,
                lambda: net.backward(net.forward(ids)),
            ):
                with pytest.raises(RuntimeError, match="another thread is computing gradients"):
                    call()
            assert np.isfinite(net.forward(ids)).all()  # asking is safe
        finally:
            go_on.set()

    at_once([lambda: net.loss_and_grad(ids, ids, weights), second])
    net.zero_grad()


def test_a_forward_pass_is_the_callers():
    """Not a view of buffers that the next call overwrites."""
    net = Model(CONFIG, initial_parameters(CONFIG, 0), DenseHead)
    ids = text(0)
    first = net.forward(ids)
    kept = first.copy()
    net.forward(np.flip(ids).copy())
    np.testing.assert_array_equal(first, kept)


def test_a_loaded_model_answers_several_threads(run):
    model = fl.load(run)
    prompts = ["the people", "of this nation", "have seen peace and war,", ""]

    def ask(prompt, seed):
        text = model.generate(prompt, max_tokens=12, seed=seed, temperature=0.9, top_k=50)
        streamed = "".join(model.generate(prompt, max_tokens=12, seed=seed, stream=True))
        nll = model.score(prompt + " the people of this nation").token_nll.tolist()
        return text, streamed, nll, model.next_tokens(prompt, k=5)

    def work(prompt):
        return [ask(prompt, seed) for seed in range(2 if numba.config.DISABLE_JIT else 15)]

    expected = [work(prompt) for prompt in prompts]
    assert at_once([lambda prompt=prompt: work(prompt) for prompt in prompts]) == expected
