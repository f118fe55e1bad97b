"""Generation: contexts, options, and text that arrives in whole characters."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.data.vocabularies import vocabulary_named
from flashlm_numba.heads import DenseHead, TreeHead
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.inference.generate import Utf8Stream, generate_ids, generate_text
from flashlm_numba.kernels import decode
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters
from flashlm_numba.system.errors import UserError

GPT2 = vocabulary_named("gpt2")
CONFIG = ModelConfig(
    61, 32, 40, 4, kernel_size=3, dilations=(1, 2), n_passes=2, mixer_residual_scale=0.25, ffn_residual_scale=0.01
)


@pytest.fixture(scope="module")
def model():
    return Model(CONFIG, initial_parameters(CONFIG, seed=1, embedding_std=1.0), DenseHead)


@given(st.text(), st.lists(st.integers(1, 3)))
def test_utf8_stream_never_breaks_a_character(text, sizes):
    data, stream, pieces = text.encode("utf-8", "surrogatepass"), Utf8Stream(), []
    for size in sizes:
        pieces.append(stream.feed(data[:size]))
        data = data[size:]
    pieces += [stream.feed(data), stream.end()]
    assert "".join(pieces) == text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def test_utf8_stream_holds_back_and_gives_up():
    stream = Utf8Stream()
    assert [stream.feed(bytes([byte])) for byte in "🙂".encode()] == ["", "", "", "🙂"]
    assert stream.feed(b"\xf0\x9f") == ""
    assert stream.end() == "\ufffd"
    assert stream.feed(b"\xffa") == "\ufffda"


def test_greedy_ids_are_those_of_the_whole_context(model):
    """The context cut to the receptive field and padded gives what a pass over everything gives."""
    context = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 7).tolist()
    found = generate_ids(model, context, rng=np.random.default_rng(0), temperature=0)
    for _ in range(CONFIG.receptive_field + 9):
        want = model.head.distribution(model.forward(np.array([context], np.int32))[-1:])[0]
        token = next(found)
        assert want[token] == pytest.approx(want.max(), rel=1e-5)
        context.append(token)


SHAPES = [(32, 4, 3, (1, 2)), (24, 3, 2, (3,)), (20, 1, 4, (1, 5))]


def with_gains(parameters):
    """The same with gains of the leaky average and of n-gram copies, where there are any: they start at zero."""
    rng = np.random.default_rng(3)
    for name, value in parameters.items():
        if ".mixer.leaky." in name or name.startswith("ngram_copy."):
            value[:] = rng.standard_normal(len(value))
    return parameters


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 60),
    st.sampled_from(SHAPES),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.3, 0.98]),
    st.sampled_from([(), (1,), (3, 1, 1, 1)]),
    st.sampled_from([1, 8, 200]),
    st.sampled_from([(2, 1), (61, 1), (61, 2)]),
)
def test_decoding_agrees_with_the_whole_forward_pass(seed, prompt, shape, n_passes, decay, orders, reach, sizes):
    """Hidden states token by token after a prompt of any length, far beyond the receptive field."""
    (dim, groups, taps, dilations), (tokens, n_blocks) = shape, sizes
    config = ModelConfig(
        vocab_size=61,
        dim=dim,
        ffn_dim=37,
        groups=groups,
        kernel_size=taps,
        dilations=dilations,
        n_blocks=n_blocks,
        n_passes=n_passes,
        leaky_decay=decay,
        ngram_copy_orders=orders,
        ngram_copy_reach=reach,
    )
    tree = build_tree("two-level", np.arange(61))
    parameters = with_gains(initial_parameters(config, seed % 100, embedding_std=1.0))
    model = Model(config, parameters, lambda w, dw: TreeHead(tree, w, dw))
    ids = np.random.default_rng(seed).integers(0, tokens, prompt + 30).astype(np.int32)
    want = model.forward(ids[None]).copy()
    state, h = model.prefill(ids[:prompt])
    np.testing.assert_allclose(h[0], want[prompt - 1], atol=2e-5)
    for t in range(prompt, len(ids)):
        np.testing.assert_allclose(model.decode_step(state, int(ids[t]))[0], want[t], atol=2e-5, err_msg=str(t))


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from(SHAPES))
def test_decoding_with_int8_activations_agrees_with_the_batched_pass(seed, prompt, shape):
    """Both round the same numbers to int8, but for one in many thousands whose last bit differs before it is rounded:
    that moves the states after it by a step of the rounding.
    """
    dim, groups, taps, dilations = shape
    config = ModelConfig(
        vocab_size=61, dim=dim, ffn_dim=37, groups=groups, kernel_size=taps, dilations=dilations, n_passes=2
    )
    model = Model(config, initial_parameters(config, seed % 100, embedding_std=1.0), DenseHead)
    ids = np.random.default_rng(seed).integers(0, 61, prompt + 30).astype(np.int32)
    plain = model.forward(ids[None]).copy()
    model.use_activations("int8")
    want = model.forward(ids[None]).copy()
    rounding = np.abs(want - plain).max()
    assert rounding > 1e-4
    state, h = model.prefill(ids[:prompt])
    errors = [np.abs(h[0] - want[prompt - 1]).max()]
    for t in range(prompt, len(ids)):
        errors.append(np.abs(model.decode_step(state, int(ids[t]))[0] - want[t]).max())
    assert np.median(errors) < 2e-5
    assert max(errors) < 2 * rounding
    model.use_activations("float")
    np.testing.assert_array_equal(model.forward(ids[None]), plain)


def test_unknown_activations_are_refused(model):
    with pytest.raises(ValueError, match="activations must be one of float, int8, got 'int4'"):
        model.use_activations("int4")


def test_decoding_refuses_what_is_no_token(model):
    state, _ = model.prefill(np.array([3], np.int32))
    for token in (-1, CONFIG.vocab_size):
        with pytest.raises(ValueError, match=r"token must be in \[0, 61\)"):
            model.decode_step(state, token)
    with pytest.raises(ValueError, match="at least one token"):
        model.prefill(np.empty(0, np.int32))
    model.forward(np.zeros((2, 4), np.int32))
    with pytest.raises(ValueError, match="one sequence"):
        decode.prefill(model._weights, model._buffers.free[0], np.zeros(8, np.int32))


def test_same_seed_same_ids_and_top_k_one_is_greedy(model):
    def first(count=20, seed=0, **options):
        ids = generate_ids(model, [3, 4], rng=np.random.default_rng(seed), **options)
        return [token for _, token in zip(range(count), ids, strict=False)]

    assert first(seed=5) == first(seed=5) != first(seed=6)
    assert first(top_k=1, seed=1) == first(temperature=0, seed=2)
    assert first(top_p=1e-9, seed=1) == first(temperature=0, seed=2)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"temperature": 0}, {"top_k": 3}])
def test_weights_beyond_floats_are_told_of(options):
    parameters = initial_parameters(CONFIG, 0)
    parameters["final_norm.weight"][:] = 3e38
    parameters["embedding.weight"][:] = 3e38
    ids = generate_ids(Model(CONFIG, parameters, DenseHead), [3], rng=np.random.default_rng(0), **options)
    with np.errstate(all="ignore"), pytest.raises(UserError, match="weights are too large; use an earlier checkpoint"):
        next(ids)


def test_settings_out_of_range_are_refused_before_anything_is_drawn(model):
    with pytest.raises(ValueError, match="temperature must be a number of at least 0"):
        next(generate_ids(model, [3], rng=np.random.default_rng(0), temperature=-1.0))


class _Parrot:
    """A model that says fixed tokens, whatever it reads, and keeps what it read."""

    config, vocab_size, remembered, prompt_part = CONFIG, GPT2.size, 1, None

    def __init__(self, tokens):
        self.tokens, self.read, self.head = iter(tokens), [], self

    def sync_weights(self):
        pass

    def writer(self, state, **settings):
        return None

    def head_after(self, ids):
        return self

    def prefill(self, ids):
        self.read.append(ids.tolist())
        return None, np.zeros((1, 2), np.float32)

    def announce(self, state, token):
        pass

    def decode_step(self, state, token):
        return np.zeros((1, 2), np.float32)

    def sample(self, h, rng, **options):
        return np.array([next(self.tokens)], np.int32)


def _say(tokens, prompt="", **options):
    parrot = _Parrot(tokens)
    pieces = list(generate_text(parrot, GPT2, prompt, **{"max_tokens": 50, **options}))
    return pieces, parrot


def test_text_streams_in_whole_characters_and_ends_at_end_of_text():
    hedgehog = GPT2.encode(" 🦔!")
    assert len(hedgehog) > 2  # several tokens for one character
    pieces, _ = _say([*hedgehog, GPT2.eot, 11])
    assert "".join(pieces) == " 🦔!"
    assert "\ufffd" not in "".join(pieces)
    cut = "".join(_say([hedgehog[0], GPT2.eot])[0])
    assert cut.endswith("\ufffd")
    assert "".join(_say(hedgehog * 3, max_tokens=len(hedgehog))[0]) == " 🦔!"


@pytest.mark.parametrize("prompt", ["", "Hello", "日本語 🙂\n\x00", "<|endoftext|>", "lone \udce9 surrogate"])
def test_any_prompt_starts_from_end_of_text(prompt):
    ids = [GPT2.eot, *GPT2.encode(prompt)]
    _, parrot = _say([GPT2.eot], prompt)
    assert parrot.read == [ids]
    assert ids.count(GPT2.eot) == 1
