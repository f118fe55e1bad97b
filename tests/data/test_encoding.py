"""Documents to ids by several threads."""

from __future__ import annotations

import numpy as np
from texts import content, flat, make_texts, quiet, write_jsonl

from flashlm_numba.data import encoding, gpt2, splits
from flashlm_numba.data.vocabularies import vocabulary_named

GPT2 = vocabulary_named("gpt2")


def test_prepare_gives_the_same_bytes_for_any_number_of_workers(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(150))
    quiet(source, tmp_path / "one", workers=1)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 100)
    quiet(source, tmp_path / "three", workers=3)
    assert content(tmp_path / "one") == content(tmp_path / "three")


def test_long_document_is_encoded_in_pieces_without_a_change(tmp_path):
    text = " ".join(make_texts(1_500))
    assert len(text) > 250_000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    quiet(str(tmp_path / "a.txt"), tmp_path / "out", split="train")
    expected = [*gpt2._encoding().encode_ordinary(text), GPT2.eot]
    np.testing.assert_array_equal(flat(tmp_path / "out", "train"), expected)


def test_reading_stays_a_few_batches_ahead_of_writing(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 10)
    read = 0

    def documents():
        nonlocal read
        for _ in range(1_000):
            read += 1
            yield splits.Document("train", "ten chars.", True, splits.Tally())

    written = 0
    for _ in encoding.encoded(GPT2, documents(), workers=2):
        written += 1
        assert read - written <= 8
    assert written == 1_000
