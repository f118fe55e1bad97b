"""Compression with a model: every file comes back, at the size that the model's probabilities promise."""

import gzip
import re

import numba
import numpy as np
import pytest
from helpers import TINY, command
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import flashlm_numba as fl
from flashlm_numba.heads import DenseHead, TreeHead
from flashlm_numba.heads.tree_shapes import SHAPES, build_tree
from flashlm_numba.inference import compress as coding
from flashlm_numba.model.packed_reading import load_for_generation
from flashlm_numba.system.errors import UserError

SILENT = fl.Progress()
TEXT = "The people of this nation have seen peace and war, and the people of this nation have seen 🙂 ünïcode. " * 3


# --- decisions ---


def all_probabilities(decisions_of, vocab):
    """The probability of every token, as the product over its decisions."""
    p = np.ones(vocab)
    for token in range(vocab):
        decisions, taken = decisions_of(), None
        while taken is None:
            outcomes = decisions.probabilities()
            assert outcomes.dtype == np.float64
            outcome = decisions.outcome_of(token)
            p[token] *= outcomes[outcome] / outcomes.sum()
            taken = decisions.take(outcome)
        assert taken == token
    return p


@pytest.mark.parametrize("name", ["dense", *SHAPES])
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 9, 40]), st.integers(0, 4))
def test_the_decisions_of_a_token_have_its_probability(name, seed, vocab, ways):
    rng = np.random.default_rng(seed)
    weight, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((vocab, 6), 6))
    if name == "dense":
        head = DenseHead(weight)
    else:
        tree = build_tree(name, (rng.pareto(0.8, vocab) * 20).astype(np.int64), rows=weight)
        nodes = rng.standard_normal((tree.n_nodes - 1, 6)).astype(np.float32)
        head = TreeHead(tree, weight, nodes=nodes, soft_cap=3.0 if seed % 2 else None)
    own = head.distribution(x[None])[0].astype(np.float64)
    np.testing.assert_allclose(all_probabilities(lambda: head.decisions(x), vocab), own, atol=1e-5)
    tokens, shares = rng.integers(-1, vocab, ways).astype(np.int32), rng.dirichlet(np.ones(ways + 1))
    shares[1:][tokens < 0] = 0
    shares /= shares.sum()
    want = shares[0] * own
    np.add.at(want, tokens[tokens >= 0], shares[1:][tokens >= 0])
    got = all_probabilities(lambda: head.decisions(x, tokens, shares), vocab)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_small_share_of_the_tree_is_not_lost_in_rounding():
    rng = np.random.default_rng(0)
    weight, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((40, 6), 6))
    head = TreeHead(build_tree("two-level", np.arange(40), rows=weight), weight)
    shares = np.array([1e-20, 1 - 1e-20])
    got = all_probabilities(lambda: head.decisions(x, np.array([7], np.int32), shares), 40)
    others = np.arange(40) != 7
    np.testing.assert_allclose(got[others], 1e-20 * head.distribution(x[None])[0][others], rtol=1e-4)


# --- files ---


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Runs with each head, with a memory, with the vocabulary of bytes, and of the MatMul-free LM: their folders."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    kinds = {
        "tree": ["--head", "tree"],
        "dense": ["--head", "dense"],
        "memory": ["--head", "tree", "--memory", "ngrams"],
        "mmf": ["--recipe", "mmf"],
    }
    for name, options in kinds.items():
        tiny = [part for setting in TINY for part in ("--set", setting)] if name != "mmf" else []
        sizes = ["dim=16", "ffn_dim=24", "n_blocks=1", "phases=2x16x2", "validation_tokens=60", "sample_tokens=0"]
        tiny = tiny or [part for setting in sizes for part in ("--set", setting)]
        done = command("train", corpus, "--out", folder / name, "--steps", 3, "--threads", 1, *options, *tiny)
        assert done.exit_code == 0, done.output
        found[name] = folder / name
    return found


@pytest.fixture(scope="module")
def models(runs, tmp_path_factory):
    """The same, loaded, and the packed model of an exported file."""
    packed = tmp_path_factory.mktemp("export") / "mmf.safetensors"
    assert command("export", runs["mmf"], packed).exit_code == 0
    paths = runs | {"packed": packed}
    return {
        name: load_for_generation(path, uses=["generate", "coding"], progress=SILENT) for name, path in paths.items()
    }


def there_and_back(model, vocabulary, data):
    """The compressed file; asserts that it comes back."""
    kind = model.config.activations
    found = coding.compress(model, vocabulary, data, activations=kind, progress=SILENT)
    header = coding.read_header(found.data)
    parts = (model, vocabulary) if header else (None, None)
    assert coding.decompress(found.data, *parts, progress=SILENT) == data
    assert len(found.data) <= len(data) + 30
    return found


@pytest.mark.parametrize("name", ["tree", "dense", "memory", "mmf", "packed"])
def test_a_text_takes_as_many_bits_as_its_score_says(name, models, runs):
    model, vocabulary = models[name]
    text = TEXT * 2
    found = there_and_back(model, vocabulary, text.encode())
    nll = fl.load(runs["mmf" if name == "packed" else name]).score(text).token_nll.sum() / np.log(2)
    tolerance = 0.02 if name == "packed" else 1e-3  # the packed model's rows are rounded
    np.testing.assert_allclose(found.ideal_bits, nll, rtol=tolerance)
    header = 60 + len(coding.computed_by())
    if name != "packed":
        assert found.tokens == len(vocabulary.encode(text))
        assert len(found.data) < nll / 8 * 1.01 + header


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=200), st.text(max_size=60).map(str.encode)))
@example(b"")
@example(b"\xff")
@example(b"\x00" * 300)
@example(b"words and\xe9 more words\xff\xfe")
@example("a\ufffdb<|endoftext|>c\r\n\u2028\U0001f642".encode())
@example("combining e\u0301 and \ud55c\uad6d\uc5b4".encode() + b"\xe2\x82")
@pytest.mark.parametrize("name", ["tree", "dense"])
def test_any_file_comes_back(name, models, data):
    there_and_back(*models[name], data)


def test_a_repetition_is_worth_its_while(models):
    """The n-gram copies: a text that repeats takes less than when it is read first."""
    model, vocabulary = models["tree"]
    once, often = (len(there_and_back(model, vocabulary, (TEXT * n).encode()).data) for n in (4, 8))
    assert often < 2 * once


@given(st.lists(st.one_of(st.text(max_size=30).map(str.encode), st.binary(max_size=9)), max_size=6).map(b"".join))
def test_sections_are_the_file_in_turn(data):
    from flashlm_numba.data.gpt2 import GPT2Vocabulary

    vocabulary = GPT2Vocabulary()
    found = coding.sections_of(data, vocabulary)
    assert b"".join(part for part, _ in found) == data
    assert [ids is None for _, ids in found] == [n % 2 == 1 for n in range(len(found))]
    assert all(part for part, _ in found[1:])
    for part, ids in found:
        assert ids is None or b"".join(vocabulary.token_bytes[token] for token in ids) == part


@pytest.mark.parametrize("name", ["tree", "dense", "memory", "mmf", "packed"])
def test_the_number_of_threads_does_not_matter(name, models, threads):
    model, vocabulary = models[name]
    files = []
    for count in (1, numba.config.NUMBA_NUM_THREADS):
        threads(count)
        found = coding.compress(model, vocabulary, TEXT.encode(), activations=model.config.activations, progress=SILENT)
        files.append(found.data)
    assert files[0] == files[1]


def test_every_damaged_byte_is_noticed(models):
    model, vocabulary = models["tree"]
    data = TEXT.encode()
    packed = coding.compress(model, vocabulary, data, activations="int8", progress=SILENT).data
    assert coding.read_header(packed) is not None
    head = len(packed) - len(coding._parsed(packed)[1])
    places = [*range(head), *np.random.default_rng(0).integers(head, len(packed), 40)]
    for at in places:
        damaged = bytearray(packed)
        damaged[at] ^= 0x41
        try:
            back = coding.decompress(bytes(damaged), model, vocabulary, progress=SILENT)
        except UserError as error:
            message = str(error)
        else:  # the last bits of the last word may say nothing
            assert (back, at >= len(packed) - 4) == (data, True)
            continue
        assert re.search("damaged|not a file from|another model", message), at
    for end in (0, 3, head - 1, head, len(packed) - 4, len(packed) - 1):
        with pytest.raises(UserError, match=r"damaged|not a file from"):
            coding.decompress(packed[:end], model, vocabulary, progress=SILENT)


def test_another_machine_is_named_if_the_file_does_not_come_back(models, monkeypatch):
    model, vocabulary = models["tree"]
    data = TEXT.encode()
    packed = coding.compress(model, vocabulary, data, activations="int8", progress=SILENT).data
    monkeypatch.setattr(coding, "computed_by", lambda: "another machine")
    assert coding.decompress(packed, model, vocabulary, progress=SILENT) == data
    with pytest.raises(UserError, match=r"compressed by flashlm-numba .* this is another machine"):
        coding.decompress(packed[:-8] + b"\0" * 8, model, vocabulary, progress=SILENT)


def test_the_methods_of_a_loaded_model(runs):
    data = TEXT.encode()
    exact, rounded = (fl.load(runs["tree"], activations=kind) for kind in ("float", "int8"))
    packed = exact.compress(data)
    assert coding.read_header(packed).activations == "float"
    text = rounded.generate("The people", max_tokens=9, seed=1)
    assert rounded.decompress(packed) == data
    assert rounded.generate("The people", max_tokens=9, seed=1) == text  # in its own arithmetic again
    assert rounded.compress(data) != packed


# --- the commands ---


def test_the_commands_restore_a_file(runs, tmp_path):
    text, packed, back = tmp_path / "text", tmp_path / "text.flz", tmp_path / "back"
    text.write_bytes(TEXT.encode() + gzip.compress(b"x" * 999))
    done = command("compress", runs["tree"], text, packed)
    assert done.exit_code == 0, done.output
    assert f"{len(text.read_bytes()):,} bytes" in done.output
    assert "bits per byte (ideal" in done.output
    done = command("decompress", runs["tree"], packed, back)
    assert done.exit_code == 0, done.output
    assert back.read_bytes() == text.read_bytes()


def test_the_arithmetic_of_the_file_is_used(runs, tmp_path):
    text, packed, back = tmp_path / "text", tmp_path / "text.flz", tmp_path / "back"
    text.write_text(TEXT)
    for kind in ("float", "int8"):
        assert command("compress", runs["tree"], text, packed, "--activations", kind, "--force").exit_code == 0
        assert coding.read_header(packed.read_bytes()).activations == kind
        assert command("decompress", runs["tree"], packed, back, "--force").exit_code == 0
        assert back.read_text() == TEXT


def test_mistakes_are_told_in_a_sentence_and_nothing_is_lost(runs, tmp_path):
    text, packed, back = tmp_path / "text", tmp_path / "text.flz", tmp_path / "back"
    text.write_text(TEXT)
    assert command("compress", runs["tree"], text, packed).exit_code == 0
    before = packed.read_bytes()
    cases = [
        (("compress", runs["tree"], text, packed), "exists; give another name, or --force"),
        (("compress", runs["tree"], tmp_path / "none", back), "cannot be read"),
        (("compress", runs["tree"], text, tmp_path / "no" / "folder"), "There is no folder"),
        (("compress", runs["tree"], text, tmp_path, "--force"), "is a folder"),
        (("compress", tmp_path / "none", text, back), "none"),
        (("decompress", runs["tree"], text, back), "not a file from `flashlm-numba compress`"),
        (("decompress", runs["dense"], packed, back), "compressed with another model"),
    ]
    for arguments, message in cases:
        done = command(*arguments)
        assert done.exit_code == 1, (arguments, done.output)
        assert message in done.output
        assert done.output.count("\n") == 1
        assert packed.read_bytes() == before
        assert not back.exists()


def test_a_missing_package_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "constriction", None)
    (tmp_path / "text").write_text(TEXT)
    done = command("compress", runs["tree"], tmp_path / "text", tmp_path / "out")
    assert done.exit_code == 1
    assert "pip install 'flashlm-numba[compress]'" in done.output
