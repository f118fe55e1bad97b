"""The vocabulary of an imported model."""

import json

import pytest
from mmf_tokenizer import tokenizer_json

from flashlm_numba.data.byte_level import BYTE_NAMES, pre_tokenizer
from flashlm_numba.data.imported import ImportedVocabulary, imported_text, read_tokenizer
from flashlm_numba.data.tokenizer_file import PROBES
from flashlm_numba.data.vocabularies import vocabulary_of
from flashlm_numba.system.errors import UserError

SIZE = 310


def vocabulary(content=None, size=SIZE, start=1, end=2):
    return ImportedVocabulary(imported_text(content or json.loads(tokenizer_json()), size, start, end))


def test_it_encodes_as_the_library_and_gives_the_bytes_back():
    import tokenizers

    found = vocabulary()
    library = tokenizers.Tokenizer.from_str(tokenizer_json())
    for text in ("the people", "  the  é\n", "", "a", "🙂"):
        ids = found.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert found.decode(ids) in (text, " " + text)
        assert library.decode(ids).strip() == text.strip()
    assert found.lost() is None
    assert (found.size, found.start, found.eot) == (SIZE, 1, 2)


def test_merges_are_not_dropped_at_random():
    content = json.loads(tokenizer_json())
    content["model"]["dropout"] = 0.9
    found = vocabulary(content)
    assert found.encode("the people") == vocabulary().encode("the people")


def test_text_that_spells_a_special_token_stays_text():
    found = vocabulary()
    ids = found.encode("</s><s>")
    assert not {1, 2} & set(ids)
    assert found.decode(ids) == " </s><s>"


def test_special_tokens_and_ids_without_a_token_have_no_bytes():
    found = vocabulary()
    assert len(found.token_bytes) == SIZE
    assert found.token_bytes[:4] == [b"", b"", b"", b"\x00"]
    assert found.token_bytes[-1] == b""
    assert found.decode_bytes([1, 3 + 0xC3, 3 + 0xA9, SIZE - 1]) == "é".encode()
    with pytest.raises(ValueError, match=r"ids must be in \[0, 310\), got 310"):
        found.decode_bytes([SIZE])


def test_the_text_makes_it_again():
    found = vocabulary()
    again = vocabulary_of(found.to_json(), found.hash, "here")
    assert isinstance(again, ImportedVocabulary)
    assert again.hash == found.hash
    assert again.encode("the people") == found.encode("the people")
    with pytest.raises(UserError, match="restore the file"):
        vocabulary_of(found.to_json(), "0" * 64, "here")


def test_without_a_tokenizer_there_are_only_ids():
    found = ImportedVocabulary(imported_text(None, 9, 0, 0))
    found.load()
    assert found.token_bytes == [b""] * 9
    assert found.lost() is None
    for call in (lambda: found.encode("a"), lambda: found.decode([1])):
        with pytest.raises(
            UserError, match="imported without a tokenizer, so it takes token ids and no text; import it"
        ):
            call()


def test_what_a_tokenizer_loses_is_found():
    content = json.loads(tokenizer_json())
    content["model"]["byte_fallback"] = False
    probe, back = vocabulary(content).lost()
    assert probe != back
    content = json.loads(tokenizer_json())
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, content["normalizer"]]}
    probe, back = vocabulary(content).lost()
    assert back == " " + probe.lower()


@pytest.mark.parametrize(
    ("decoder", "name", "expected"),
    [
        ({"type": "ByteLevel"}, "Ġa", b" a"),
        ({"type": "Metaspace", "replacement": "\u2581"}, "\u2581a", b" a"),
        ({"type": "WordPiece", "prefix": "##"}, "##a", b"a"),
        ({"type": "WordPiece", "prefix": "##"}, "a", b" a"),
        ({"type": "BPEDecoder", "suffix": "</w>"}, "a</w>", b"a "),
        (None, "a", b"a"),
    ],
)
def test_a_tokens_bytes_follow_from_the_decoder(decoder, name, expected):
    content = json.loads(tokenizer_json()) | {"decoder": decoder}
    content["model"]["vocab"] = {name: 0}
    content["added_tokens"] = []
    assert vocabulary(content, 1, 0, 0).token_bytes == [expected]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "cannot be used"),
        ("[]", "is not in the format"),
        ('{"model": {"vocab": 3}}', "is not in the format"),
        ('{"model": {"vocab": {"a": 99}}}', "it has the id 99, but the model has 40 tokens"),
        ('{"model": {"vocab": {"a": 0}}}', "cannot be used"),
        ('{"model": {"vocab": {"a": -1, "b": 2}}}', "it has the id -1, but the model has 40 tokens"),
        ('{"model": {"vocab": {"a": 1e400}}}', "is not in the format"),
        (tokenizer_json(), "but the model has 40 tokens"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, text, why):
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="or remove it to import by ids only") as error:
        read_tokenizer(path, 40)
    assert why in str(error.value)


LETTERS = [*"abcdefgh ", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def model_of(kind, names=LETTERS, **settings):
    """A tokenizer.json with a model of this kind."""
    vocab = [[name, -1.0] for name in names] if kind == "Unigram" else {name: i for i, name in enumerate(names)}
    own = {
        "BPE": {"merges": []},
        "WordPiece": {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
    }.get(kind, {})
    return {"version": "1.0", "model": {"type": kind, "vocab": vocab} | own | settings}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (model_of("BPE", unk_token="<x>"), "its unk_token '<x>' is not in its vocabulary"),
        (model_of("BPE", unk_token=3), "its unk_token 3 is not in its vocabulary"),
        (
            model_of("BPE", BYTES[1:], unk_token="<x>", byte_fallback=True),
            "its unk_token '<x>' is not in its vocabulary",
        ),
        (model_of("WordPiece", unk_token="<x>"), "its unk_token '<x>' is not in its vocabulary"),
        (model_of("WordPiece", unk_token=None), "its WordPiece model has no unk_token"),
        (model_of("WordLevel", unk_token="<x>"), "its unk_token '<x>' is not in its vocabulary"),
        (model_of("WordLevel"), "its WordLevel model has no unk_token"),
        (model_of("Unigram", unk_id=99), "its unk_id 99 is not in its vocabulary"),
        (model_of("Unigram", unk_id=-1), "its unk_id -1 is not in its vocabulary"),
        (model_of("Unigram", unk_id=None), "its Unigram model has no unk_id"),
        (model_of("Unigram", BYTES, unk_id=None, byte_fallback=True), "its Unigram model has no unk_id"),
    ],
)
def test_a_tokenizer_that_cannot_encode_unknown_text_is_refused(tmp_path, content, why):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_tokenizer(path, 310)
    sentence = f"{path} cannot be used ({why}, so it cannot encode unknown text); restore it, or remove it to import"
    assert str(error.value) == f"{sentence} by ids only."


@pytest.mark.parametrize(
    "content",
    [
        model_of("BPE", unk_token="<unk>"),
        model_of("BPE", unk_token=None),  # drops what it does not know
        model_of("BPE", [*LETTERS, *BYTES], unk_token="<x>", byte_fallback=True),  # knows all
        model_of("BPE", BYTE_NAMES, unk_token="<x>") | {"pre_tokenizer": pre_tokenizer(use_regex=True)},
        model_of("WordPiece", unk_token="<unk>"),
        model_of("WordLevel", unk_token="<unk>"),
        model_of("Unigram", unk_id=9),
        model_of("Unigram", BYTE_NAMES) | {"pre_tokenizer": pre_tokenizer(use_regex=True)},
    ],
)
def test_one_that_can_encodes_every_text(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    found = vocabulary(read_tokenizer(path, 310))
    for text in (*PROBES, "abc"):
        assert max(found.encode(text), default=0) < 310
    found.lost()


@pytest.mark.parametrize(
    "own", [{}, {"size": 4, "start": 0}, {"size": 0, "start": 0, "end": 0}, {"size": 4, "start": 4, "end": 0}]
)
def test_a_forged_text_is_refused(own):
    with pytest.raises(ValueError, match=r"it is no imported vocabulary|are not both in"):
        ImportedVocabulary(json.dumps({"flashlm_numba": own, "tokenizer": None}))
