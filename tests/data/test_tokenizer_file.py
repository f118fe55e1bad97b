"""A tokenizer.json of others: what is used of it, and what is refused, with an example of what it loses."""

from __future__ import annotations

import copy
import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from texts import make_texts, write_jsonl

from flashlm_numba.data.byte_level import BYTE_NAMES, ByteLevelVocabulary, json_text, pre_tokenizer
from flashlm_numba.data.gpt2 import GPT2Vocabulary
from flashlm_numba.data.prepare import prepare
from flashlm_numba.data.tokenizer_file import read
from flashlm_numba.system.errors import UserError

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]
NAMES = [*BYTE_NAMES, "<|endoftext|>", "th", "the", "Ġthe"]
GOOD = json.loads(json_text(NAMES, MERGES, pre_tokenizer(use_regex=True)))


def changed(**parts):
    """The good file with other parts; model__x changes the model's."""
    content = copy.deepcopy(GOOD)
    for name, value in parts.items():
        place = content["model"] if name.startswith("model__") else content
        place[name.removeprefix("model__")] = value
    return content


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def token(content, i, **options):
    own = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": i, "content": content} | own | options


def without(names, vocab):
    return {name: i for name, i in vocab.items() if name not in names}


def sequence(part):
    return {"type": "Sequence", "pretokenizers": [part, pre_tokenizer(use_regex=True)]}


def split(pattern, behavior):
    return sequence({"type": "Split", "pattern": {"String": pattern}, "behavior": behavior, "invert": False})


def replacing(**pattern):
    return {"type": "Replace", "pattern": pattern, "content": "z"}


PREFIX = pre_tokenizer(use_regex=True) | {"add_prefix_space": True}
VOCAB = GOOD["model"]["vocab"]
REFUSED = {
    "broken": ('{"model": {"type": "BPE", ', r"is not JSON \("),
    "empty": ("", r"is not JSON \("),
    "other JSON": ([1, 2], "is not in the format of Hugging Face's tokenizers"),
    "no model": ({"version": "1.0"}, "is not in the format"),
    "config": ({"model": "gpt2"}, "is not in the format"),
    "word piece": (changed(model__type="WordPiece"), r"is not byte-level BPE \(its model is WordPiece, its pre-"),
    "unigram": ({"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}, "its model is Unigram, its pre-tokenizer miss"),
    "metaspace": (changed(pre_tokenizer={"type": "Metaspace"}), "its pre-tokenizer Metaspace"),
    "no pre-tokenizer": (changed(pre_tokenizer=None), "its pre-tokenizer missing"),
    "suffix": (changed(model__end_of_word_suffix="</w>"), "marks the parts of words"),
    "vocab list": (changed(model__vocab=["a"]), "has no vocabulary of names and ids"),
    "vocab texts": (changed(model__vocab={"a": "0"}), "has no vocabulary of names and ids"),
    "merges": (changed(model__merges=["t h e"]), "has a merge that is not a pair"),
    "merges of nothing": (changed(model__merges=["t q"]), "merges 't' and 'q', which are not tokens of bytes"),
    "gap": (changed(model__vocab=without(["th"], VOCAB), model__merges=[]), "has 259 tokens, but none with the id 257"),
    "twice": (changed(model__vocab=VOCAB | {"the": 257}), "gives the id 257 to both 'th' and 'the'"),
    "negative": (changed(model__vocab=VOCAB | {"th": -1}), "but none with the id"),
    "no byte": (changed(model__vocab=VOCAB | {"x0": VOCAB["Ā"]} | {}), "gives the id 0 to both"),
    "a byte less": (
        changed(model__vocab={("<x>" if name == "Ā" else name): i for name, i in VOCAB.items()}),
        "has no token for 1 of the 256 bytes, such as 0x00",
    ),
    "swallows": (changed(added_tokens=[token("the", 258, special=False)]), "has the added token 'the', which swallows"),
    "two names": (changed(added_tokens=[token("<|x|>", 3)]), "gives the id 3 to both"),
    "two ids": (changed(added_tokens=[token("th", 260)]), "gives two ids to one token"),
    "nameless": (changed(added_tokens=[{"id": 3}]), "has an added token without a name"),
    "ends": (changed(model__merges=["< |"], model__vocab=VOCAB), "which are not tokens of bytes"),
    # what loses text, with an example
    "prefix": (changed(pre_tokenizer=PREFIX), "'Hello world' comes back as ' Hello world'"),
    "removed": (changed(pre_tokenizer=split(" ", "Removed")), "'Hello world' comes back as 'Helloworld'"),
    "rare": (changed(pre_tokenizer=split("qzq", "Removed")), "'qzq' comes back as ''"),
    "lower": (changed(normalizer={"type": "Lowercase"}), "'Hello world' comes back as 'hello world'"),
    "nfc": (changed(normalizer={"type": "NFC"}), "comes back as 'é'"),
    "nfkc": (changed(normalizer={"type": "NFKC"}), r"loses text, as 'a\\xa0b' comes back as 'a b'"),
    "replace": (changed(normalizer=replacing(String="qzq")), "'qzq' comes back as 'z'"),
    "regex": (changed(normalizer=replacing(Regex="q{7}")), "has the normalizer Replace, which may"),
    "library": (changed(pre_tokenizer=sequence({"type": "X"})), "is refused by `tokenizers`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_one_sentence_and_nothing_is_written(tmp_path, name):
    content, sentence = REFUSED[name]
    path = written(tmp_path / "tokenizer.json", content)
    source = write_jsonl(tmp_path / "in" / "a.jsonl", make_texts(20))
    with pytest.raises(UserError, match=sentence) as caught:
        prepare(source, tmp_path / "out", progress=False, vocab=path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("or train one with --vocab N.")
    assert not (tmp_path / "out").exists()


def test_a_folder_or_a_huge_file_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is a folder, not a tokenizer"):
        read(tmp_path)
    monkeypatch.setattr("flashlm_numba.data.tokenizer_file.MOST_BYTES", 10)
    with pytest.raises(UserError, match="too many for a tokenizer"):
        read(written(tmp_path / "t.json", GOOD))


ANY_JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(ANY_JSON, st.sampled_from([*GOOD, *(f"model__{name}" for name in GOOD["model"])]))
def test_any_value_in_any_part_is_used_or_refused(tmp_path_factory, value, part):
    path = written(tmp_path_factory.mktemp("any") / "tokenizer.json", changed(**{part: value}))
    try:
        found = ByteLevelVocabulary(read(path))
    except UserError:
        return
    assert found.decode(found.encode("the é")) == "the é"


def test_what_does_not_change_ids_is_left_out(tmp_path):
    plain = read(written(tmp_path / "plain.json", GOOD))
    more = changed(
        version="1.0",
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        post_processor=pre_tokenizer(use_regex=True),
        decoder=pre_tokenizer(use_regex=True),
        added_tokens=[token("<|endoftext|>", 256)],
        model__dropout=0.5,
        model__unk_token="",
        model__merges=[list(pair) for pair in MERGES],
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False},
    )
    assert read(written(tmp_path / "more.json", more)) == plain
    assert read(written(tmp_path / "mark.json", "\ufeff" + json.dumps(GOOD))) == plain
    assert json.loads(plain) == GOOD
    vocabulary = ByteLevelVocabulary(plain)
    assert (vocabulary.size, vocabulary.eot) == (260, 256)
    assert vocabulary.encode("in the<|endoftext|>")[2] == 259
    assert vocabulary.decode(vocabulary.encode("in the<|endoftext|>")) == "in the<|endoftext|>"


@pytest.mark.parametrize(
    ("added", "eot", "size"),
    [
        ([token("<|endoftext|>", 256), token("<|pad|>", 260)], 256, 261),
        ([token("</s>", 260), token("<s>", 261)], 256, 262),
        ([], 256, 260),
    ],
)
def test_special_tokens_become_entries_that_no_text_yields(tmp_path, added, eot, size):
    vocabulary = ByteLevelVocabulary(read(written(tmp_path / "t.json", changed(added_tokens=added))))
    assert (vocabulary.size, vocabulary.eot) == (size, eot)
    for part in added:
        ids = vocabulary.encode(f"a{part['content']}b")
        assert part["id"] not in ids
        assert vocabulary.decode(ids) == f"a{part['content']}b"


def test_a_file_without_an_end_of_text_gets_one(tmp_path):
    names = [*BYTE_NAMES, "th"]
    content = json.loads(json_text(names, [("t", "h")], pre_tokenizer(use_regex=True)))
    vocabulary = ByteLevelVocabulary(read(written(tmp_path / "t.json", content)))
    assert (vocabulary.size, vocabulary.eot) == (258, 257)
    content["added_tokens"] = [token("</s>", 257)]
    vocabulary = ByteLevelVocabulary(read(written(tmp_path / "t.json", content)))
    assert (vocabulary.size, vocabulary.eot, vocabulary.decode([257])) == (258, 257, "</s>")
    # with one pre-token for a whole text, and no merges asked for, the text would be the token
    whole = json.loads(json_text(NAMES, MERGES, pre_tokenizer(use_regex=False), ignore_merges=True))
    with pytest.raises(UserError, match=r"reads the text '<\|endoftext\|>' as the end of a text"):
        read(written(tmp_path / "t.json", whole))


def test_gpt2_as_others_store_it_is_gpt2(tmp_path):
    content = json.loads(GPT2Vocabulary().to_json())
    content["added_tokens"] = [token("<|endoftext|>", 50256)]
    content["post_processor"] = pre_tokenizer(use_regex=True) | {"add_prefix_space": True}
    content["pre_tokenizer"].pop("use_regex")
    path = written(tmp_path / "t.json", content)
    source = write_jsonl(tmp_path / "in" / "a.jsonl", make_texts(20))
    manifest = prepare(source, tmp_path / "out", progress=False, vocab=path)
    assert (manifest.tokenizer, manifest.tokenizer_hash) == ("gpt2", GPT2Vocabulary.hash)


@pytest.mark.parametrize("behavior", ["Isolated", "MergedWithPrevious", "Contiguous"])
def test_other_patterns_give_the_ids_of_the_library(tmp_path, behavior):
    path = written(tmp_path / "t.json", changed(pre_tokenizer=split(" ", behavior)))
    vocabulary, library = ByteLevelVocabulary(read(path)), tokenizers.Tokenizer.from_file(str(path))
    assert vocabulary._fast is None
    for text in make_texts(30):
        assert vocabulary.encode(text) == library.encode(text).ids


def test_the_folder_of_the_vocabulary_does_not_become_that_of_the_tokens(tmp_path):
    source = write_jsonl(tmp_path / "in" / "a.jsonl", make_texts(20))
    out = tmp_path / "out"
    out.mkdir()
    path = written(out / "tokenizer.json", GOOD)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"contains the vocabulary tokenizer\.json; choose another folder"):
        prepare(source, out, progress=False, vocab=path)
    for vocab in ("bytes", 257):
        with pytest.raises(UserError, match=r"tokenizer\.json is another vocabulary, which is not overwritten"):
            prepare(source, out, progress=False, vocab=vocab)
    assert path.read_bytes() == before
    assert {entry.name for entry in out.iterdir()} <= {"tokenizer.json", "prepare.lock"}
