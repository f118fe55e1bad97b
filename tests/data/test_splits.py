"""Which documents are for validation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import GPT2, make_texts, quiet, texts_of, write_jsonl

from flashlm_numba.data import splits
from flashlm_numba.data.shards import open_tokens
from flashlm_numba.data.splits import Sized, choose_validation
from flashlm_numba.system.errors import UserError


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


def sized(tokens, cut=False):
    return [Sized(bytes([n]), size, size, cut and n == len(tokens) - 1) for n, size in enumerate(tokens)]


@given(st.lists(st.integers(2, 10**6), min_size=2, max_size=60), st.booleans())
def test_training_keeps_at_least_half_of_the_tokens(tokens, cut):
    cut = cut and len(tokens) > 2
    chosen, share = choose_validation(sized(tokens, cut))
    taken = sum(size for n, size in enumerate(tokens) if bytes([n]) in chosen)
    assert chosen
    assert taken <= sum(tokens) / 2 or cut
    assert share == taken / sum(tokens)
    assert not cut or bytes([len(tokens) - 1]) not in chosen


def test_share_of_a_small_source_is_one_of_tokens():
    assert choose_validation(sized([10] * 100)) == ({bytes([n]) for n in range(5)}, 0.05)
    assert choose_validation(sized([90_794, 821]))[0] == {b"\1"}
    assert choose_validation(sized([821, 90_794]))[0] == {b"\0"}
    assert choose_validation(sized([500, 10, 10, 10, 10, 460]))[0] == {bytes([n]) for n in (1, 2, 3, 4)}
    assert choose_validation(sized([300, 400, 300])) == ({b"\0"}, 0.3)
    assert choose_validation(sized([1] * 5 + [9] * 95))[1] >= 0.05  # five short ones would be 0.6 %


def test_novel_with_a_note_trains_on_the_novel(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "novel.txt").write_text("\n".join(make_texts(300)), encoding="utf-8")
    (tmp_path / "in" / "note.txt").write_text("\n".join(make_texts(3)), encoding="utf-8")
    manifest = quiet(str(tmp_path / "in"), tmp_path / "out")
    assert manifest.splits["train"].tokens > 50 * manifest.splits["validation"].tokens
    share = manifest.splits["validation"].text_bytes / sum(split.text_bytes for split in manifest.splits.values())
    assert manifest.split_rule.startswith(f"{share:.1%} of the text for validation: whole documents")


def test_long_documents_of_a_large_source_are_for_training(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "SMALL", 40)
    texts = make_texts(300)
    bound = int(0.05 * 2**64).to_bytes(8, "big")
    long = next(text for n in range(999) if splits._digest(text := f"{n} " + "word " * 5_000) < bound)
    quiet(write_jsonl(tmp_path / "a.jsonl", [*texts, long]), tmp_path / "out")
    tokens = open_tokens(tmp_path / "out")
    assert long in texts_of(tokens.train)
    assert tokens.validation.n_documents > 2
    # only a source made for it gets past that bound
    quiet_texts = [f"{n}" for n in range(300)]
    half = [text for n in range(9_999) if splits._digest(text := f"{n} b c d") < bound]
    with pytest.raises(UserError, match="would hold more than half of its tokens"):
        quiet(write_jsonl(tmp_path / "b.jsonl", [*quiet_texts, *half]), tmp_path / "b")


@pytest.mark.parametrize("count", [2, 3, 8])
def test_max_tokens_anywhere_leaves_both_splits_text(tmp_path, count):
    texts = make_texts(count + 1, seed=count)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    end = 0
    for number, text in enumerate(texts[:count], 1):
        end += len(GPT2.encode(text)) + 1
        for limit in (end - 1, end, end + 1, end + 2, end + 3, end + 9):
            if limit < 20:
                continue
            out = tmp_path / f"{limit}"
            manifest = quiet(source, out, max_tokens=limit)
            train, validation = manifest.splits["train"], manifest.splits["validation"]
            assert train.tokens >= validation.tokens
            assert validation.tokens >= 0.02 * limit
            if number > 2:
                assert set(texts_of(open_tokens(out).validation)) <= set(texts)
