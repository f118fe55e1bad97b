"""Every kind of vocabulary: any text comes back, `tokenizers` gives the same ids, and the end of text is no text."""

from __future__ import annotations

import json
import re

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import make_texts

from flashlm_numba.data import bpe, byte_level, vocabularies
from flashlm_numba.data.byte_level import ByteLevelVocabulary, ByteVocabulary, json_text, pre_tokenizer
from flashlm_numba.data.documents import without_surrogates
from flashlm_numba.data.gpt2 import GPT2Vocabulary
from flashlm_numba.data.tokenizer_file import read
from flashlm_numba.data.vocabularies import read_vocabulary, requested, vocabulary_named
from flashlm_numba.system.errors import UserError


def trained(size):
    return ByteLevelVocabulary(bpe.train(make_texts(60) * 2, size))


def of_a_file(tmp_path_factory):
    """A vocabulary as `tokenizers` trains and saves it, with tokens that are special there, and another pattern."""
    path = tmp_path_factory.mktemp("file") / "tokenizer.json"
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|endoftext|>"],
        initial_alphabet=byte_level.BYTE_NAMES,
        show_progress=False,
    )
    made.train_from_iterator(make_texts(60), trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 1)]
    )
    made.enable_truncation(5)
    made.enable_padding(pad_id=0, pad_token="<|pad|>")
    made.save(str(path))
    return ByteLevelVocabulary(read(path))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Vocabulary and the library's tokenizer, by kind."""
    made = {
        "gpt2": GPT2Vocabulary(),
        "bytes": ByteVocabulary(),
        "257": trained(257),
        "340": trained(340),
        "file": of_a_file(tmp_path_factory),
    }
    folder = tmp_path_factory.mktemp("json")
    found = {}
    for name, vocabulary in made.items():
        (folder / f"{name}.json").write_text(vocabulary.to_json(), encoding="utf-8")
        found[name] = vocabulary, tokenizers.Tokenizer.from_file(str(folder / f"{name}.json"))
    return found


KINDS = ("gpt2", "bytes", "257", "340", "file")
AWKWARD = st.text(
    st.sampled_from("ab1 .,'s\n\t\r\x00\x0b\x1c\x7f\u0085\u00a0é\u0301中。مرحبا🙂\u200d\u2028\ufeff\ufffd<|>"),
    max_size=80,
)
ANY_TEXT = st.one_of(st.text(max_size=80), AWKWARD)
ANY_BYTES = st.binary(max_size=60).map(lambda data: data.decode("utf-8", "ignore").encode())  # of what decodes
TEXTS = [
    *(
        "",
        " ",
        "\u0301",
        "e\u0301",
        "中文，没有空格。",
        "مرحبا بالعالم",
        "👩\u200d👩\u200d👧🙂",
        "<|endoftext|>",
        "a <|endoftext|><|pad|> b",
    ),
    *(
        "don't 'll DON'T ''s",
        "  two  spaces \n\n\n x \t",
        "1234567890 12,5",
        "\r\n\x0b\x0c\x1f",
        "x" * 3_000,
        "\x00\x01\x7f",
    ),
]


def check(vocabulary, library, text):
    ids = vocabulary.encode(text)
    assert vocabulary.decode_bytes(ids) == text.encode()
    assert vocabulary.decode(ids) == text
    assert b"".join(vocabulary.token_bytes[i] for i in ids) == text.encode()
    assert vocabulary.eot not in ids
    assert library.encode(text).ids == ids
    assert library.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
@given(text=ANY_TEXT)
def test_any_text_comes_back_and_the_library_gives_the_same_ids(kinds, kind, text):
    check(*kinds[kind], text)


@pytest.mark.parametrize("kind", KINDS)
@given(data=ANY_BYTES)
def test_any_bytes_that_decode_come_back(kinds, kind, data):
    check(*kinds[kind], data.decode())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_awkward_texts_come_back(kinds, kind, text):
    check(*kinds[kind], text)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_ids_and_hashes(kinds, kind):
    vocabulary, library = kinds[kind]
    assert len(vocabulary.token_bytes) == vocabulary.size == library.get_vocab_size()
    assert library.id_to_token(vocabulary.eot) == "<|endoftext|>"
    assert library.get_added_tokens_decoder() == {}
    assert set(byte_level.BYTE_NAMES) <= set(library.get_vocab())
    assert vocabulary.hash == byte_level.hash_of(vocabulary.to_json())
    assert json.loads(vocabulary.to_json())["model"]["type"] == "BPE"
    with pytest.raises(ValueError, match=rf"must be in \[0, {vocabulary.size}\)"):
        vocabulary.decode([vocabulary.size])
    with pytest.raises(ValueError, match=r"got -1"):
        vocabulary.decode([-1])
    assert vocabulary.decode([vocabulary.eot]) == "<|endoftext|>"


@pytest.mark.parametrize("kind", KINDS)
def test_unpaired_surrogates_become_the_replacement_character(kinds, kind):
    vocabulary, _ = kinds[kind]
    text = "a\ud800b\udce9"
    assert vocabulary.encode(text) == vocabulary.encode(without_surrogates(text)) == vocabulary.encode("a\ufffdb\ufffd")


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_long_text_have_its_ids(kinds, kind, monkeypatch):
    vocabulary, library = kinds[kind]
    monkeypatch.setattr(byte_level, "PIECE", 50)
    monkeypatch.setattr(byte_level, "LONG_PIECE", 50)
    monkeypatch.setattr("flashlm_numba.data.tokenizer.PIECE", 50)
    text = "\n\n".join(make_texts(40))
    pieces = list(vocabulary.pieces(text))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in vocabulary.encode(piece)] == library.encode(text).ids


def test_bytes_are_ids():
    vocabulary = vocabulary_named("bytes")
    assert (vocabulary.size, vocabulary.eot, vocabulary.dtype) == (257, 256, "<u2")
    assert vocabulary.encode("é\n") == [0xC3, 0xA9, 10]
    assert trained(340).encode("\x00é")[0] == 0


# --- the rule that a C program can follow


def split_by_rule(data):
    """The pre-tokens of UTF-8 bytes by the classes of ASCII alone, as docs/vocabulary.md words the rule."""

    def kind(byte):
        if byte >= 0x80 or chr(byte).isalpha():
            return "letter"
        if byte in b"0123456789":
            return "digit"
        return "space" if byte in b" \t\n\v\f\r" else "sign"

    parts, i = [], 0
    while i < len(data):
        ending = re.match(rb"'(?:[sdmt]|ll|ve|re)", data[i:])
        first = i + (data[i : i + 1] == b" " and i + 1 < len(data) and kind(data[i + 1]) != "space")
        end = first + 1
        while end < len(data) and kind(data[end]) == kind(data[first]):
            end += 1
        if ending:
            end = i + ending.end()
        elif kind(data[first]) == "space" and end < len(data) and end - i > 1:
            end -= 1  # the last white space of a run may belong to what follows
        parts.append(data[i:end])
        i = end
    return parts


@given(ANY_TEXT)
@settings(max_examples=200)
def test_a_trained_vocabulary_splits_by_classes_of_ascii(text):
    assert b"".join(split_by_rule(text.encode())) == text.encode()
    library = tokenizers.Tokenizer.from_str(json_text(byte_level.BYTE_NAMES, [], byte_level.ASCII_PRE_TOKENIZER))
    found = [byte_level.bytes_of(part) for part, _ in library.pre_tokenizer.pre_tokenize_str(text)]
    assert found == split_by_rule(text.encode())


def test_tiktoken_is_used_only_where_it_gives_the_same_ids():
    names = [*byte_level.BYTE_NAMES, "<|endoftext|>", "ab", "bc", "abc"]
    usual = [("a", "b"), ("b", "c"), ("ab", "c")]
    never = [("a", "b"), ("b", "c"), ("a", "bc")]  # the library never comes to these parts; tiktoken would make abc
    for merges, fast in ((usual, True), (never, False), (usual[::-1], False)):
        vocabulary = ByteLevelVocabulary(json_text(names, merges, byte_level.ASCII_PRE_TOKENIZER))
        assert (vocabulary._fast is not None) == fast
        library = tokenizers.Tokenizer.from_str(vocabulary.to_json())
        for text in ("abc", "xabc ab bc abcabc", "bcabc"):
            assert vocabulary.encode(text) == library.encode(text).ids
    assert trained(340)._fast is not None


# --- finding one


def test_requests(tmp_path, monkeypatch):
    assert requested("gpt2").vocabulary.hash == GPT2Vocabulary.hash
    assert requested("bytes").name == "bytes"
    for text in ("8192", 8192, "8,192", "8_192"):
        assert (requested(text).vocabulary, requested(text).size, requested(text).name) == (None, 8192, "8192")
    path = tmp_path / "t.json"
    path.write_text(ByteVocabulary().to_json(), encoding="utf-8")
    assert isinstance(requested(path).vocabulary, ByteVocabulary)
    path.write_text(GPT2Vocabulary().to_json(), encoding="utf-8")
    assert isinstance(requested(str(path)).vocabulary, GPT2Vocabulary)
    monkeypatch.chdir(tmp_path)
    for name in ("bytes", "300"):  # names and numbers come first; ./300 is a file
        (tmp_path / name).write_text("{}")
        assert requested(name).path is None
    with pytest.raises(UserError, match="300 is not in the format"):
        requested("./300")


@pytest.mark.parametrize("vocab", ["256", "65537", "-1", "0", "1,000,000", 12])
def test_a_number_out_of_range_is_one_sentence(vocab):
    with pytest.raises(UserError, match=r"has 257 to 65,536 tokens, got [-\d,]+\.$"):
        requested(vocab)


@pytest.mark.parametrize("vocab", ["gtp2", "8k", "1e4", "", "no/such.json"])
def test_what_is_no_vocabulary_is_one_sentence(vocab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"(choose gpt2, bytes, a number of tokens|The path is empty)"):
        requested(vocab)


def test_a_stored_vocabulary_is_checked(tmp_path):
    small = trained(300)
    vocabularies.write_vocabulary(tmp_path, small)
    assert read_vocabulary(tmp_path, small.hash).encode("the river") == small.encode("the river")
    with pytest.raises(UserError, match="is not the one"):
        read_vocabulary(tmp_path, "0" * 64)
    with pytest.raises(UserError, match="is not overwritten"):
        vocabularies.check_free(tmp_path, ByteVocabulary())
    vocabularies.check_free(tmp_path, small)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        read_vocabulary(tmp_path, small.hash)
    path.unlink()
    with pytest.raises(UserError, match=r"There is no .*tokenizer\.json"):
        read_vocabulary(tmp_path, small.hash)
    assert read_vocabulary(tmp_path, GPT2Vocabulary.hash).name == "gpt2"
    for text in ("{}", "[]", '{"model": {}}', json_text(["a"], [], pre_tokenizer(use_regex=False))):
        path.write_text(text)
        with pytest.raises(UserError, match=r"cannot be used: it is no vocabulary of this program"):
            read_vocabulary(tmp_path, byte_level.hash_of(text))
