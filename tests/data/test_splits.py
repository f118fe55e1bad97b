"""Which documents are for validation."""

from __future__ import annotations

import pytest
from texts import make_texts, quiet, texts_of, write_jsonl

from flashlm_numba.data import splits
from flashlm_numba.data.shards import open_tokens


@pytest.mark.parametrize("small", [1_000, 50])
def test_split_keeps_every_validation_document_out_of_training(tmp_path, monkeypatch, small):
    monkeypatch.setattr(splits, "SMALL", small)  # 50: the rule of large sources
    texts = make_texts(400)
    texts += texts[:200:2] + texts[:100]  # copies must fall on the side of their originals
    quiet(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out")
    tokens = open_tokens(tmp_path / "out")
    train, validation = texts_of(tokens.train), texts_of(tokens.validation)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(texts)
    assert len(set(validation)) == 20 if small == 1_000 else 8 <= len(set(validation)) <= 36


def test_validation_source_is_used_and_kept_out_of_training(tmp_path):
    texts = make_texts(60)
    held_out = [texts[3], "only here", texts[50]]
    validation = write_jsonl(tmp_path / "v.jsonl", held_out)
    manifest = quiet(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out", validation=validation)
    tokens = open_tokens(tmp_path / "out")
    assert texts_of(tokens.validation) == held_out
    assert texts_of(tokens.train) == [text for text in texts if text not in held_out]
    assert manifest.skipped_held_out == 2
    assert manifest.validation_source["name"] == validation


def test_roles_of_files_are_kept_and_nothing_more_is_split_off(tmp_path):
    texts = make_texts(50)
    folder = tmp_path / "in"
    write_jsonl(folder / "train-0.jsonl", [*texts[:40], "in test too"])
    write_jsonl(folder / "validation.jsonl", texts[40:45])
    write_jsonl(folder / "test.jsonl", [*texts[45:], "in test too"])
    quiet(str(folder), tmp_path / "out")
    tokens = open_tokens(tmp_path / "out")
    assert texts_of(tokens.train) == texts[:40]
    assert texts_of(tokens.validation) == texts[40:45]
    assert texts_of(tokens.test) == [*texts[45:], "in test too"]
    quiet(str(folder / "tr*"), tmp_path / "only-train")
    tokens = open_tokens(tmp_path / "only-train")
    assert (tokens.train.n_documents, tokens.validation.n_documents, tokens.test) == (41, 0, None)
    quiet(str(folder), tmp_path / "one", split="validation")
    tokens = open_tokens(tmp_path / "one")
    assert (tokens.train.n_documents, texts_of(tokens.validation)) == (0, texts[40:45])
    quiet(str(folder / "test.jsonl"), tmp_path / "all", split="validation")
    assert open_tokens(tmp_path / "all").validation.n_documents == 6


def test_single_document_is_cut_near_its_end(tmp_path):
    text = "\n".join(make_texts(100))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    manifest = quiet(str(tmp_path / "book.txt"), tmp_path / "out")
    tokens = open_tokens(tmp_path / "out")
    [train], [validation] = texts_of(tokens.train), texts_of(tokens.validation)
    assert train + validation == text
    assert 0.04 < len(validation) / len(text) < 0.1
    assert "one document" in manifest.split_rule
    quiet(str(tmp_path / "book.txt"), tmp_path / "short", max_tokens=500)
    short = open_tokens(tmp_path / "short")
    assert 490 <= short.train.n_tokens + short.validation.n_tokens <= 500
    assert 15 <= short.validation.n_text_tokens <= 50
