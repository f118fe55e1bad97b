"""Prompts that end in whitespace: the first generated token begins with it, whatever the head and the options."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.data.tokenizer import Vocabulary
from flashlm_numba.data.vocabularies import vocabulary_named
from flashlm_numba.heads import BitLinearHead, DenseHead, SampledHead, TreeHead
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.inference.generate import generate_text
from flashlm_numba.inference.healing import Healing, sample_allowed, split_prompt
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters
from flashlm_numba.system.errors import UserError

GPT2 = vocabulary_named("gpt2")
PROMPTS = ["the ", "the  ", "the\n", " ", "war\u2003"]
OPTIONS = [{"temperature": 0.8}, {"temperature": 1.0}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.3}]


class Few(Vocabulary):
    """Bytes, and words with the space before them, as GPT-2's; the end of text is the last id."""

    name, hash = "few", "3" * 64
    words = tuple(f"{space}{word}".encode() for word in ("the", "people", "peace", "war") for space in ("", " "))
    tokens = (*(bytes([byte]) for byte in range(256)), *words, b"  ", b" \n", "\u2003".encode()[:2])
    size, eot = len(tokens) + 1, len(tokens)

    def encode_batch(self, texts):
        found = []
        for text in texts:
            data, ids = text.encode("utf-8", "surrogatepass"), []
            while data:
                token = max((t for t in self.tokens if data.startswith(t)), key=len)
                ids.append(self.tokens.index(token))
                data = data[len(token) :]
            found.append(ids)
        return found

    def to_json(self):
        raise NotImplementedError("these tokens are no merges")

    def decode_bytes(self, ids):
        return b"".join(b"<end>" if i == self.eot else self.tokens[i] for i in ids)


FEW = Few()
CONFIG = ModelConfig(FEW.size, 12, 10, 2, kernel_size=2, dilations=(1,), n_passes=1)
HEADS = {
    "dense": DenseHead,
    "sampled": lambda w, dw: SampledHead(w, dw, counts=np.arange(FEW.size), candidates=20),
    "tree": lambda w, dw: TreeHead(build_tree("two-level", np.arange(FEW.size)), w, dw),
    "huffman": lambda w, dw: TreeHead(build_tree("huffman", np.arange(FEW.size)), w, dw),
    "bitlinear": lambda w, dw: BitLinearHead(w.copy()),
}


@pytest.fixture(scope="module")
def models():
    parameters = initial_parameters(CONFIG, seed=1, embedding_std=1.0)
    made = {name: Model(CONFIG, parameters, make) for name, make in HEADS.items()}
    made["dense int8"] = Model(CONFIG, parameters, DenseHead)
    made["dense int8"].sync_weights()
    made["dense int8"].head.use_int8()
    return made


def test_split_prompt_takes_one_character_and_only_whitespace():
    assert split_prompt("") == ("", b"")
    assert split_prompt(" ") == ("", b" ")
    assert split_prompt("a \n\n") == ("a \n", b"\n")
    assert split_prompt("日\u3000") == ("日", "\u3000".encode())
    for prompt in ("a", " a", "\x00", "lone \udce9"):
        assert split_prompt(prompt) == (prompt, b"")


def test_gpt2_allows_every_token_that_begins_with_the_space():
    allowed = Healing(GPT2, b" ").allowed()
    for token in (" people", " ", " citizens"):
        assert allowed[GPT2.encode(token)[0]]
    for token in ("people", "\n", "."):
        assert not allowed[GPT2.encode(token)[0]]
    assert not allowed[GPT2.eot]


def test_pending_bytes_may_take_several_tokens():
    healing = Healing(FEW, "\u2003".encode())  # three bytes; no token has them all
    first, second, third = (bytes([byte]) for byte in "\u2003".encode())
    assert [FEW.tokens[i] for i in np.flatnonzero(healing.allowed())] == [first, first + second]
    assert healing.take(first) == b""
    assert [FEW.tokens[i] for i in np.flatnonzero(healing.allowed())] == [second]
    assert healing.take(second) == b""
    assert healing.take(third) == b""
    assert healing.pending == b""
    healing = Healing(FEW, b" ")
    assert healing.take(b" people") == b"people"
    assert healing.pending == b""


@pytest.mark.parametrize(
    ("kind", "options", "prompt"),
    [
        (kind, options, PROMPTS[number % len(PROMPTS)])
        for number, (kind, options) in enumerate(itertools.product([*HEADS, "dense int8"], OPTIONS + OPTIONS[:1]))
    ],
)
def test_the_text_continues_the_prompt_exactly(models, kind, options, prompt):
    """The tokens that the model has seen, put together, are the prompt and what was printed."""
    model, seen = models[kind], []
    prefill, step = model.prefill, model.decode_step
    model.prefill = lambda ids: seen.extend(ids.tolist()) or prefill(ids)
    model.decode_step = lambda state, token: seen.append(token) or step(state, token)
    try:
        said = []
        pieces = generate_text(
            model, FEW, prompt, max_tokens=6, seed=3, on_token=lambda: said.append(1), **{"temperature": 1.0} | options
        )
        text = "".join(pieces)
    finally:
        model.prefill, model.decode_step = prefill, step
    read = len(FEW.encode(prompt[:-1]))
    assert seen[: 1 + read] == [FEW.eot, *FEW.encode(prompt[:-1])]
    # the last token is not read any more, so what was read is the beginning of the text
    data = FEW.decode_bytes(seen[1:])
    whole = (prompt + text).encode("utf-8", "surrogatepass")
    if "\ufffd" not in text:
        assert whole.startswith(data)
    assert prompt[:-1].encode() in data


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_first_token_is_drawn_from_the_limited_distribution(models, kind, options):
    model = models[kind]
    _, h = model.prefill(np.array([FEW.eot, *FEW.encode("the")], np.int32))
    h = h.copy()
    p = model.head.distribution(h)[0].astype(np.float64)
    allowed = Healing(FEW, b" ").allowed()
    p[~allowed] = 0
    options = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    rng = np.random.default_rng(0)
    drawn = np.array([sample_allowed(model.head, h, allowed, rng, **options) for _ in range(200)])
    assert allowed[drawn].all()
    if options["temperature"] == 0:
        assert (drawn == p.argmax()).all()
    elif options["top_k"]:
        assert set(drawn) <= set(np.argsort(-p)[:5])
    elif options["temperature"] == 1 and options["top_p"] is None:
        found = np.bincount(drawn, minlength=FEW.size) / len(drawn)
        assert np.abs(found - p / p.sum()).max() < 0.15


def test_probabilities_below_the_smallest_float_still_give_an_allowed_token(models):
    head, h = models["dense"].head, np.zeros((1, CONFIG.dim), np.float32)
    allowed = Healing(FEW, b" ").allowed()

    class Sure:
        def distribution(self, h):
            p = np.zeros((1, FEW.size), np.float32)
            p[0, 65] = 1
            return p

    for temperature in (0.0, 1.0):
        token = sample_allowed(
            Sure(), h, allowed, np.random.default_rng(0), temperature=temperature, top_k=None, top_p=None
        )
        assert allowed[token]
    with pytest.raises(ValueError, match="at least one token"):
        sample_allowed(head, h, ~(allowed | True), np.random.default_rng(0), temperature=1, top_k=None, top_p=None)


def test_a_vocabulary_without_such_tokens_reads_the_whole_prompt(models):
    class Spaceless(Few):
        tokens = tuple(token if b"\n" not in token else b"" for token in Few.tokens)

        def encode_batch(self, texts):
            return super().encode_batch([text.replace("\n", "-") for text in texts])

    assert isinstance("".join(generate_text(models["dense"], Spaceless(), "the\n", max_tokens=3)), str)


def test_weights_beyond_floats_are_told_of():
    parameters = initial_parameters(CONFIG, 0)
    parameters["final_norm.weight"][:] = 3e38
    parameters["embedding.weight"][:] = 3e38
    model = Model(CONFIG, parameters, DenseHead)
    for temperature in (0.0, 1.0):
        pieces = generate_text(model, FEW, "the ", max_tokens=3, temperature=temperature)
        with np.errstate(all="ignore"), pytest.raises(UserError, match="weights are too large"):
            next(pieces)


@given(st.text(alphabet="ab \n\t\u2003é", max_size=8), st.integers(0, 99))
def test_any_prompt_is_continued(models, prompt, seed):
    text, pending = split_prompt(prompt)
    healing = Healing(FEW, pending)
    rng, new = np.random.default_rng(seed), b""
    data = text.encode()
    while healing.pending:
        token = int(rng.choice(np.flatnonzero(healing.allowed())))
        data += FEW.tokens[token]
        new += healing.take(FEW.tokens[token])
    assert data == prompt.encode() + new
