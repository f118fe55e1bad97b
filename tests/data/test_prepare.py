"""What prepare() writes, and what it says when it cannot."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest
from texts import content, flat, make_texts, quiet, texts_of, write_jsonl

from flashlm_numba.data.manifest import Manifest
from flashlm_numba.data.prepare import prepare
from flashlm_numba.data.shards import open_tokens
from flashlm_numba.data.vocabularies import vocabulary_named
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.locks import locked

GPT2 = vocabulary_named("gpt2")


def test_prepare_writes_documents_in_order_each_closed_by_eot(tmp_path):
    texts = make_texts(200)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = quiet(source, tmp_path / "out", shard_tokens=700)
    tokens = open_tokens(tmp_path / "out")
    validation = set(texts_of(tokens.validation))
    assert len(validation) == 10  # 5 % of a small source, exactly
    train = [text for text in texts if text not in validation]
    encode = GPT2.encode
    expected = np.array([i for text in train for i in [*encode(text), GPT2.eot]])
    np.testing.assert_array_equal(flat(tmp_path / "out", "train"), expected)
    assert texts_of(tokens.train) == train
    split = manifest.splits["train"]
    assert (split.documents, split.tokens) == (190, len(expected))
    assert split.text_tokens == len(expected) - 190
    assert split.text_bytes == sum(len(text.encode()) for text in train)
    assert len(split.shards) == -(-len(expected) // 700)
    for shard in split.shards:
        raw = (tmp_path / "out" / shard.name).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (2 * shard.tokens, shard.sha256)
    assert Manifest.read(tmp_path / "out" / "manifest.json") == manifest
    tokens.verify()
    assert manifest.source["files"]["all"][0]["name"] == "a.jsonl"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["", " \n\t"], "contains no document with text"),
        (["x"], "too short to cut off a validation part"),
        (["same", "same", "same"], "No training document of .* is left"),
    ],
)
def test_too_little_text_is_one_sentence_and_can_be_mended(tmp_path, texts, message):
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(UserError, match=message):
        quiet(source, tmp_path / "out")
    write_jsonl(tmp_path / "a.jsonl", make_texts(10))
    quiet(source, tmp_path / "out")


def test_blank_documents_are_skipped_and_counted(tmp_path):
    texts = make_texts(20)
    manifest = quiet(write_jsonl(tmp_path / "a.jsonl", ["", *texts, "  \n"]), tmp_path / "out")
    assert manifest.skipped_empty == 2
    assert sum(split.documents for split in manifest.splits.values()) == 20


def test_max_tokens_and_max_docs_limit_the_corpus(tmp_path):
    texts = make_texts(300)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = quiet(source, tmp_path / "docs", max_docs=100)
    assert sum(split.documents for split in manifest.splits.values()) == 100
    (tmp_path / "roles").mkdir()
    for name in ("train", "test"):
        write_jsonl(tmp_path / "roles" / f"{name}.jsonl", make_texts(70, seed=len(name)))
    for limit, found in ((60, 60), (100, 100), (200, 140)):  # of all files together
        manifest = quiet(str(tmp_path / "roles"), tmp_path / f"roles-{limit}", split="validation", max_docs=limit)
        assert manifest.splits["validation"].documents == found
    for limit in (1_000, 1_001, 1_002, 1_003):
        manifest = quiet(source, tmp_path / f"tokens-{limit}", max_tokens=limit)
        tokens = open_tokens(tmp_path / f"tokens-{limit}")
        assert sum(split.tokens for split in manifest.splits.values()) in (limit - 1, limit)
        assert manifest.splits["validation"].documents >= 1
        documents = [ids for split in (tokens.train, tokens.validation) for ids in split.documents()]
        n_bytes = sum(len(GPT2.decode_bytes(ids)) for ids in documents)
        assert n_bytes == sum(split.text_bytes for split in manifest.splits.values())
    validation = write_jsonl(tmp_path / "v.jsonl", make_texts(50, seed=1))
    manifest = quiet(source, tmp_path / "v", max_tokens=500, validation=validation)
    assert manifest.splits["validation"].documents == 50
    assert 499 <= manifest.splits["train"].tokens <= 500
    with pytest.raises(UserError, match=r"first document within --max-tokens is too short .*: raise --max-tokens"):
        quiet(source, tmp_path / "one", max_tokens=1)
    with pytest.raises(UserError, match="max_docs must be at least 1"):
        quiet(source, tmp_path / "zero", max_docs=0)


def test_folder_is_reused_for_the_same_corpus_and_refused_for_another(tmp_path, capfd):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(30))
    out = tmp_path / "out"
    manifest = prepare(source, out)
    before = content(out)
    assert prepare(source, out) == manifest
    said = capfd.readouterr()
    assert said.out == ""
    assert "Prepared" in said.err
    assert "already prepared" in said.err
    with pytest.raises(UserError, match="holds a corpus from another source"):
        quiet(source, out, max_docs=5)
    os.utime(tmp_path / "a.jsonl", ns=(0, 0))
    with pytest.raises(UserError, match=r"holds a corpus from another source \(or its files have changed\)"):
        quiet(source, out)
    assert content(out) == before
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds shards without a manifest"):
        quiet(source, out)
    with locked(out / "prepare.lock"), pytest.raises(UserError, match="Another process is preparing"):
        quiet(source, out)
    with pytest.raises(UserError, match=r"Cannot prepare .*a\.jsonl.below-a-file: Not a directory; choose another"):
        quiet(source, tmp_path / "a.jsonl" / "below-a-file")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("a.jsonl", "link"):
        with pytest.raises(UserError, match=rf"Cannot prepare .*{name}: it is not a folder; choose another folder"):
            quiet(source, tmp_path / name)
