"""Training a vocabulary: on training documents alone, a bounded and evenly spread sample, the same every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import make_texts, write_jsonl

from flashlm_numba.data import bpe, prepare, splits
from flashlm_numba.data.byte_level import BYTE_NAMES, ByteLevelVocabulary, bytes_of
from flashlm_numba.data.documents import ALL, Source
from flashlm_numba.data.shards import open_tokens
from flashlm_numba.data.splits import Plan
from flashlm_numba.data.vocabularies import vocabulary_named
from flashlm_numba.system.errors import UserError


def test_ids_are_bytes_then_the_end_of_text_then_merges():
    texts = make_texts(200)
    large, small = (ByteLevelVocabulary(bpe.train(texts, size)) for size in (305, 290))
    assert (large.size, large.eot, small.size) == (305, 256, 290)
    assert large.token_bytes[:256] == [bytes([byte]) for byte in range(256)]
    assert large.token_bytes[:290] == small.token_bytes
    assert max(map(len, large.token_bytes[257:])) <= bpe.LONGEST
    model = json.loads(large.to_json())["model"]
    assert [*model["vocab"].values()] == [*range(305)]
    assert [bytes_of(merge.replace(" ", "")) for merge in model["merges"]] == large.token_bytes[257:]


def test_a_frequent_pair_becomes_a_token_and_one_seen_once_does_not():
    vocabulary = ByteLevelVocabulary(bpe.train(["xyxy xy", "qj"], 258))
    assert vocabulary.token_bytes[257] == b"xy"
    with pytest.raises(UserError, match=r"too short for 300 tokens, as it gives \d+: use more text, or --vocab \d+ or"):
        bpe.train(["xyxy xy", "qj"], 300)


def test_training_is_the_same_every_time_and_for_any_number_of_threads():
    code = (
        "import sys; sys.path.insert(0, 'tests/data'); from texts import make_texts; "
        "from flashlm_numba.data import bpe, byte_level; "
        "print(byte_level.hash_of(bpe.train(make_texts(300), 305)))"
    )
    hashes = set()
    for variables in ({}, {"TOKENIZERS_PARALLELISM": "true"}, {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=True
        )
        hashes.add(done.stdout.strip())
    assert len(hashes) == 1


def test_text_without_spaces_is_learnt_as_it_is():
    words = ["ꦲꦤꦕ", "ꦫꦏꦢ", "ꦠꦱꦮ"]
    rng = np.random.default_rng(0)
    vocabulary = ByteLevelVocabulary(bpe.train(["".join(rng.choice(words, 500)) for _ in range(20)], 300))
    assert any(word.encode() in vocabulary.token_bytes for word in words)
    assert not any(token.startswith((b" \xea", b"\n\xea")) for token in vocabulary.token_bytes)  # where training cuts


# --- the sample


@given(st.lists(st.integers(1, 60), max_size=300), st.integers(50, 2_000))
def test_a_sample_is_bounded_and_in_order(lengths, most):
    sample = bpe.Sample(most)
    for number, length in enumerate(lengths):
        sample.add(f"{number} ".ljust(length, "é"))
    kept = list(sample.texts())
    assert sample.size == sum(len(text.encode()) for text in kept)
    assert sample.size <= most or len(kept) == 1
    numbers = [int(text.split(" ")[0]) for text in kept]
    assert numbers == sorted(numbers)
    if sum(len(f"{n} ".ljust(length, "é").encode()) for n, length in enumerate(lengths)) <= most:
        assert len(kept) == len(lengths)


@pytest.mark.parametrize("period", [1, 2, 3, 4, 7, 8, 64])
def test_a_sample_is_evenly_spread_also_over_texts_that_alternate(period):
    sample = bpe.Sample(40_000)
    for number in range(64_000):
        sample.add(f"{number:08}")
    numbers = np.array([int(text) for text in sample.texts()])
    assert 20_000 < sample.size <= 40_000
    for counts in (np.bincount(numbers * 16 // 64_000, minlength=16), np.bincount(numbers % period, minlength=period)):
        assert counts.min() > 0.8 * counts.mean()
        assert counts.max() < 1.2 * counts.mean()


def test_a_long_document_is_sampled_in_pieces():
    sample = bpe.Sample(200_000)
    text = " ".join(f"{n:07}" for n in range(125_000))
    sample.add(text)
    pieces = list(sample.texts())
    assert 10 < len(pieces) < 60
    assert max(map(len, pieces)) < 3 * bpe.SAMPLE_PIECE
    assert all(piece in text for piece in pieces)
    assert int(pieces[-1].split()[0]) - int(pieces[0].split()[0]) > 100_000


# --- which documents


def corpus(folder, names):
    """A folder with files of documents, each document marked by the file's letter; the marks must be seen twice."""
    for name, letter in names.items():
        write_jsonl(folder / f"{name}.jsonl", [f"{text} {letter * 9} {letter * 9}" for text in make_texts(30, seed=3)])
    return str(folder)


def token_texts(folder):
    return b" ".join(open_tokens(folder).vocabulary.token_bytes)


def test_held_out_documents_are_not_in_the_sample(tmp_path):
    source = corpus(tmp_path / "in", {"train": "w", "validation": "v", "test": "u"})
    other = corpus(tmp_path / "other", {"some": "z"})
    prepare.prepare(source, tmp_path / "out", progress=False, vocab=300)
    assert b"wwww" in token_texts(tmp_path / "out")
    assert not any(mark in token_texts(tmp_path / "out") for mark in (b"vvv", b"uuu"))
    prepare.prepare(f"{source}/train.jsonl", tmp_path / "named", progress=False, vocab=300, validation=other)
    assert b"wwww" in token_texts(tmp_path / "named")
    assert b"zzz" not in token_texts(tmp_path / "named")


@pytest.mark.parametrize("small", [5, 1_000])
@pytest.mark.parametrize("limits", [{}, {"max_docs": 90}, {"max_tokens": 8_000}])
def test_documents_split_off_are_not_in_the_sample(tmp_path, monkeypatch, small, limits):
    monkeypatch.setattr(splits, "SMALL", small)
    texts = make_texts(200)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    seen = []
    add = bpe.Sample.add
    monkeypatch.setattr(bpe.Sample, "add", lambda self, text: (seen.append(text), add(self, text))[1])
    manifest = prepare.prepare(source, tmp_path / "out", progress=False, vocab=300, **limits)
    tokens = open_tokens(tmp_path / "out")
    train, validation = (
        [tokens.vocabulary.decode(ids) for ids in split.documents()] for split in (tokens.train, tokens.validation)
    )
    assert not set(seen) & set(validation)
    assert set(validation) <= set(texts)
    if "max_tokens" in limits:  # as many bytes, and the last document is cut
        assert seen[:-1] == train[: len(seen) - 1]
        assert train[len(seen) - 1].startswith(seen[-1])
        assert sum(len(text.encode()) for text in seen) <= 8_000
        assert manifest.splits["train"].tokens + manifest.splits["validation"].tokens == 8_000
    else:
        assert seen == train


def test_the_splits_do_not_depend_on_the_vocabulary(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(120))
    found = set()
    for vocab in ("gpt2", "bytes", 257, 300):
        prepare.prepare(source, tmp_path / str(vocab), progress=False, vocab=vocab)
        tokens = open_tokens(tmp_path / str(vocab))
        texts = [tokens.vocabulary.decode(ids) for ids in tokens.validation.documents()]
        found.add((tuple(texts), tokens.manifest.split_rule))
    assert len(found) == 1


class Parts(Source):
    """A source elsewhere of many parts with ten documents each."""

    name, kind, column, licence = "parts", "hub", "text", None
    roles = (ALL,)

    def __init__(self):
        self.read = []

    def parts(self, role):
        return 320

    def documents(self, role, first_part=0, started=lambda part: None, note=lambda sentence: None):
        for part in range(first_part, 320):
            started(part)
            for number in range(10):
                self.read.append(part)
                yield f"{part} {number} " + "word " * 200


def test_a_source_elsewhere_is_read_at_the_beginnings_of_parts_spread_over_it(monkeypatch):
    monkeypatch.setattr(splits, "SMALL", 20)

    def texts(source, **limits):
        options = {"max_docs": None, "max_tokens": None} | limits
        plan = Plan(source, None, "auto", **options, measure=vocabulary_named("bytes"))
        return list(plan.training_texts(100_000))

    source = Parts()
    found = texts(source)
    parts = [int(text.split()[0]) for text in found]
    assert sorted(set(parts)) == [*range(0, 320, 10)]
    assert len(found) <= 4 * splits.PARTS
    held_out = {text for text in found if splits._digest(text) < int(0.05 * 2**64).to_bytes(8, "big")}
    assert not held_out
    assert len(source.read) < 32 * 5 + 30  # and the first documents, which tell how to split
    # under a limit, from the beginning
    assert {int(text.split()[0]) for text in texts(Parts(), max_docs=35)} == {0, 1, 2, 3}
    assert sum(len(text) for text in texts(Parts(), max_tokens=5_000)) <= 5_000
    assert sum(len(text) for text in texts(Parts(), max_docs=3_000)) < 110_000


# --- bad input


def test_a_vocabulary_larger_than_the_text_can_train_leaves_nothing(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(30))
    with pytest.raises(UserError, match="The training text is too short for 5,000 tokens"):
        prepare.prepare(source, tmp_path / "out", progress=False, vocab=5_000)
    assert {entry.name for entry in (tmp_path / "out").iterdir()} <= {"prepare.lock"}
    prepare.prepare(source, tmp_path / "out", progress=False, vocab=257)
    before = {entry.name: entry.read_bytes() for entry in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="holds a corpus from another source"):
        prepare.prepare(source, tmp_path / "out", progress=False, vocab=5_000)
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "out").iterdir()} == before


def test_a_source_without_training_documents_trains_no_vocabulary(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(30))
    with pytest.raises(UserError, match="has no training document to train a vocabulary on"):
        prepare.prepare(source, tmp_path / "out", progress=False, vocab=300, split="validation")


def test_an_interrupt_while_words_are_counted_stops(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(30))

    def interrupted(self):
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr(bpe.Sample, "texts", interrupted)
        with pytest.raises(UserError, match="Stopped"):
            prepare.prepare(source, tmp_path / "out", progress=False, vocab=300)
    prepare.prepare(source, tmp_path / "out", progress=False, vocab=300)
    assert set(open_tokens(tmp_path / "out").vocabulary.token_bytes[:256]) == {bytes_of(name) for name in BYTE_NAMES}
