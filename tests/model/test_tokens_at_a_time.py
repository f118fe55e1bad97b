"""Several tokens per call of compiled code: the same tokens as one at a time, for every trunk and setting."""

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlm_numba.heads import TreeHead
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.inference.generate import generate_ids
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters
from flashlm_numba.system.errors import UserError

VOCAB = 30
OPTIONS = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 3},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.7},
    {"temperature": 0.5},  # needs Python
)


def make_model(linear, output, activations="int8", seed=0):
    orders = () if output is None else (1, 2, 1)
    mixer = {"ternary": "conv", "bitlinear": "mlgru"}[linear]
    own = {"groups": 4, "dilations": (1, 2), "mixer_residual_scale": 0.25, "ffn_residual_scale": 2**-7}
    config = ModelConfig(
        *(VOCAB, 16, 24),
        mixer=mixer,
        linear=linear,
        ngram_copy_orders=orders,
        ngram_copy_reach=9,
        ngram_copy_output=output or "add",
        activations=activations,
        **(own if linear == "ternary" else {"n_blocks": 2, "n_passes": 1}),
    )
    parameters = initial_parameters(config, seed, embedding_std=0.5)
    rng = np.random.default_rng(seed)
    for name, value in parameters.items():
        if name.startswith("ngram_copy."):
            value += rng.standard_normal(value.shape).astype(np.float32)
    tree = build_tree("adaptive", rng.integers(0, 50, VOCAB))
    return Model(config, parameters, lambda w, dw: TreeHead(tree, w, dw, log_prior=rng.standard_normal(VOCAB)))


def one_at_a_time(model, context, count, options):
    tokens = generate_ids(model, context, rng=np.random.default_rng(1), on_sample=lambda *_: None, **options)
    return [next(tokens) for _ in range(count)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("output", ["mixture", "add", None])
@pytest.mark.parametrize("linear", ["ternary", "bitlinear"])
def test_the_tokens_are_those_of_one_at_a_time(linear, output, options):
    model = make_model(linear, output)
    for context in ([3], [3, 4, 5, 3, 4], np.random.default_rng(2).integers(0, VOCAB, 70).tolist()):
        tokens = generate_ids(model, context, rng=np.random.default_rng(1), **options)
        assert [next(tokens) for _ in range(90)] == one_at_a_time(model, context, 90, options)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.sampled_from(OPTIONS[:4]), st.booleans())
def test_any_division_into_calls_gives_the_same_tokens(counts, options, bit):
    model = make_model("bitlinear" if bit else "ternary", "mixture", activations="float")
    context = np.array([3, 4, 5, 3, 4], np.int32)

    def write(counts):
        writer = model.writer(model.prefill(context)[0], **options)
        uniforms = np.random.default_rng(5).random((sum(counts), writer.uniforms))
        parts = np.split(uniforms, np.cumsum(counts)[:-1])
        return np.concatenate([writer.write(part) for part in parts]).tolist()

    assert write(counts) == write([sum(counts)])


@pytest.mark.parametrize("linear", ["ternary", "bitlinear"])
def test_a_state_goes_on_after_a_call(linear):
    """The state has read all tokens but the last."""
    model = make_model(linear, "mixture")
    state, _ = model.prefill(np.array([3, 4, 5], np.int32))
    other, _ = model.prefill(np.array([3, 4, 5], np.int32))
    writer = model.writer(state)
    tokens = writer.write(np.random.default_rng(0).random((6, writer.uniforms)))
    for token in tokens[:-1]:
        model.decode_step(other, int(token))
    assert state.position == other.position
    np.testing.assert_array_equal(model.decode_step(state, int(tokens[-1])), model.decode_step(other, int(tokens[-1])))


def test_weights_that_are_too_large_are_an_error():
    model = make_model("ternary", "mixture")
    tokens = generate_ids(model, [3], rng=np.random.default_rng(0))
    model.parameters["final_norm.weight"][:] = np.inf
    with pytest.raises(UserError, match="use an earlier checkpoint"):
        next(tokens)


def test_tokens_before_one_that_cannot_be_drawn_are_passed_on(monkeypatch):
    """A block that ends early is followed by the error, not by another draw."""
    model, blocks = make_model("ternary", "mixture"), [[5], [6], [7, 8]]

    class Short:
        uniforms = 1

        def write(self, uniforms):
            return np.array(blocks.pop(0), np.int32)

    monkeypatch.setattr(model, "writer", lambda state, **settings: Short())
    monkeypatch.setattr("flashlm_numba.inference.generate.BLOCK_SECONDS", 1e6)  # a pause must not shorten the block
    tokens = generate_ids(model, [3], rng=np.random.default_rng(0))
    assert [next(tokens), next(tokens)] == [5, 6]  # the second block was to have two
    with pytest.raises(UserError, match="use an earlier checkpoint"):
        next(tokens)
    assert blocks == [[7, 8]]


def test_a_state_in_use_is_refused_and_wrong_numbers_are_named():
    model = make_model("ternary", "mixture")
    state, _ = model.prefill(np.array([3], np.int32))
    writer = model.writer(state)
    with state.alone("the test"), pytest.raises(RuntimeError, match="another thread is using this state"):
        writer.write(np.zeros((1, writer.uniforms)))
    with pytest.raises(ValueError, match="uniforms must have shape"):
        writer.write(np.zeros((1, writer.uniforms + 1)))
    with pytest.raises(ValueError, match="temperature must be"):
        model.writer(state, temperature=-1.0)
    assert writer.write(np.zeros((0, writer.uniforms))).tolist() == []


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="plain Python compiles nothing")
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 3}], ids=str)
@pytest.mark.parametrize("linear", ["ternary", "bitlinear"])
def test_calls_from_python_and_by_address_are_compiled_once(linear, options):
    model = make_model(linear, "mixture")
    state, h = model.prefill(np.array([3, 4, 5, 3], np.int32))
    writer = model.writer(state, **options)
    writer.write(np.zeros((2, writer.uniforms)))
    drawn = model.head.drawing(**options).function
    before = len(state.step.overloads), len(drawn.overloads)
    model.decode_step(state, 3)
    model.head_after(np.array([3, 4, 5, 3], np.int32)).sample(h, np.random.default_rng(0), **options)
    assert (len(state.step.overloads), len(drawn.overloads)) == before
