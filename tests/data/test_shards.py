"""Reading shards: what is refused, windows and documents, batches, counts."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import flat, make_texts, quiet, write_jsonl

from flashlm_numba.data.shards import Split, open_tokens, sample_batch
from flashlm_numba.data.vocabularies import vocabulary_named
from flashlm_numba.system.errors import UserError

GPT2 = vocabulary_named("gpt2")


@pytest.fixture
def prepared(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(120))
    quiet(source, tmp_path / "out", shard_tokens=300)
    return tmp_path / "out"


def test_open_tokens_refuses_what_is_missing_or_damaged(prepared, tmp_path):
    path = prepared / "manifest.json"
    good = path.read_text()

    def refused(message, change):
        manifest = json.loads(good)
        change(manifest)
        path.write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=message):
            open_tokens(prepared)
        path.write_text(good)

    def shard(manifest):
        return manifest["splits"]["train"]["shards"][0]

    open_tokens(prepared)
    refused("not the name of a shard", lambda m: shard(m).update(name="../out/train-00000.bin"))
    refused("not the name of a shard", lambda m: shard(m).update(name="validation-00000.bin"))
    refused("do not add up", lambda m: shard(m).update(tokens=299))
    refused("is wrong", lambda m: shard(m).update(sha256="0"))
    refused("contradict", lambda m: m["splits"]["train"].update(documents=1))
    refused("has format 99, but this version reads 2", lambda m: m.update(format=99))
    refused("is damaged", lambda m: m["splits"].pop("validation"))
    refused("is damaged", lambda m: m.pop("source"))
    refused("says 70000 tokens, but its vocabulary has 50257", lambda m: m.update(vocab_size=70_000))
    refused("its vocabulary has no hash", lambda m: m.update(tokenizer_hash="gpt5"))
    refused("is not the one that its tokens", lambda m: m.update(tokenizer_hash="1" * 64))
    path.write_text(good[:100])
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        open_tokens(prepared)
    path.write_text(good)
    first = prepared / "train-00000.bin"
    whole = first.read_bytes()
    first.write_bytes(whole[:-2])
    with pytest.raises(UserError, match="has 598 bytes, but the manifest says 600"):
        open_tokens(prepared)
    first.write_bytes(b"\xff\xff" + whole[2:])
    tokens = open_tokens(prepared)
    with pytest.raises(UserError, match=r"train-00000.bin is damaged: its SHA-256"):
        tokens.verify()
    with pytest.raises(UserError, match=r"are damaged \(id 65535"):
        tokens.train.windows(np.array([0]), 4)
    first.unlink()
    with pytest.raises(UserError, match=r"train-00000\.bin is missing"):
        open_tokens(prepared)
    with pytest.raises(UserError, match="holds no prepared corpus"):
        open_tokens(tmp_path)
    with pytest.raises(UserError, match="There is no folder"):
        open_tokens(tmp_path / "nowhere")


def test_windows_and_documents_agree_with_the_plain_files(prepared):
    split = open_tokens(prepared).train
    ids = flat(prepared, "train").astype(np.int32)
    assert split.n_tokens == len(ids) > 3 * 300

    @given(st.integers(0, 1_000), st.lists(st.floats(0, 1), max_size=4))
    def check(length, fractions):
        starts = np.array([int(f * (len(ids) - length)) for f in fractions], dtype=np.int64)
        got = split.windows(starts, length)
        assert got.dtype == np.int32
        assert got.shape == (len(starts), length)
        for row, start in zip(got, starts, strict=True):
            np.testing.assert_array_equal(row, ids[start : start + length])

    check()
    for bad in (-1, len(ids) - 9):
        with pytest.raises(ValueError, match=r"starts must be in \[0, "):
            split.windows(np.array([0, bad]), 10)
    ends = np.flatnonzero(ids == GPT2.eot)
    expected = [part[:-1] for part in np.split(ids, ends + 1) if len(part)]
    for size in (7, 300, 1 << 20):  # documents that lie across the pieces in which the file is read
        split.chunks = functools.partial(Split.chunks, split, size)
        got = list(split.documents())
        assert len(got) == split.n_documents
        assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
        first = list(split.documents(100))
        assert all(np.array_equal(a, b) for a, b in zip(first[:-1], expected, strict=False))
        assert sum(len(d) for d in first) == 100


def test_sample_batch_is_a_function_of_its_arguments(prepared):
    split = open_tokens(prepared).train
    ids, targets = sample_batch(split, 1, 2, 3, rows=5, length=40)
    assert ids.shape == targets.shape == (5, 40)
    assert ids.dtype == targets.dtype == np.int32
    assert ids.flags.c_contiguous
    assert targets.flags.c_contiguous
    np.testing.assert_array_equal(ids[:, 1:], targets[:, :-1])
    again = sample_batch(open_tokens(prepared).train, 1, 2, 3, rows=5, length=40)
    np.testing.assert_array_equal(again[0], ids)
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not np.array_equal(sample_batch(split, *other, rows=5, length=40)[0], ids)
    whole, after = sample_batch(split, 0, 0, 0, rows=2, length=split.n_tokens - 1)  # the one window there is
    np.testing.assert_array_equal(whole[0], flat(prepared, "train")[:-1])
    np.testing.assert_array_equal(after[1], flat(prepared, "train")[1:])
    with pytest.raises(UserError, match="use more text or shorter sequences"):
        sample_batch(split, 0, 0, 0, rows=1, length=split.n_tokens)


def test_sample_batch_reaches_the_first_and_the_last_token(prepared):
    split = open_tokens(prepared).validation
    length = split.n_tokens - 3
    rows = {tuple(row) for row in sample_batch(split, 0, 0, 0, rows=64, length=length)[0]}
    assert len(rows) == 3


def test_counts_are_kept_beside_the_shards_and_checked(prepared):
    ids = flat(prepared, "train")
    expected = np.bincount(ids, minlength=GPT2.size)
    np.testing.assert_array_equal(open_tokens(prepared).train.counts(GPT2.size), expected)
    kept = prepared / "counts-train.npz"
    with np.load(kept) as stored:
        np.testing.assert_array_equal(stored["counts"], expected)
        shards = stored["shards"]
    counts = open_tokens(prepared).train.counts(GPT2.size + 7)
    np.testing.assert_array_equal(counts, np.pad(expected, (0, 7)))
    np.savez(kept, counts=expected[:-1], shards=shards)
    np.testing.assert_array_equal(open_tokens(prepared).train.counts(GPT2.size), expected)
    for damaged in (b"damaged", b""):
        kept.write_bytes(damaged)
        np.testing.assert_array_equal(open_tokens(prepared).train.counts(GPT2.size), expected)


def test_counts_of_another_corpus_of_the_same_size_are_not_used(tmp_path):
    for name, seed in (("a", 1), ("b", 2), ("v", 3)):
        write_jsonl(tmp_path / f"{name}.jsonl", make_texts(80, seed=seed))
    out = tmp_path / "out"
    for name in ("a", "b"):  # --max-tokens makes both equally long
        options = {"validation": str(tmp_path / "v.jsonl"), "max_tokens": 2_000}
        quiet(str(tmp_path / f"{name}.jsonl"), out, **options)
        train = open_tokens(out).train
        assert train.n_tokens == 2_000
        np.testing.assert_array_equal(train.counts(GPT2.size), np.bincount(flat(out, "train"), minlength=GPT2.size))
        for path in (out / "manifest.json", *out.glob("*.bin")):
            path.unlink()


def damage_json(change):
    def damage(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "train-00000.bin").unlink(),
        lambda folder: (folder / "train-00000.bin").write_bytes(b"\1\1"),
        lambda folder: (folder / "train-00000.bin").write_bytes(bytes(600)),
        lambda folder: (folder / "manifest.json").write_text('{"form'),
        lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"),
        damage_json(lambda manifest: manifest.update(format=99)),
        damage_json(lambda manifest: manifest.pop("licence")),
        damage_json(lambda manifest: manifest["splits"]["train"]["shards"].pop()),
    ],
)
def test_the_remedy_in_a_message_works(prepared, damage):
    """Preparing again, after deleting the folder where the message says so, makes the corpus usable."""
    before = open_tokens(prepared).hash
    damage(prepared)
    with pytest.raises(UserError) as caught:
        open_tokens(prepared).verify()
    assert "prepare the corpus again" in str(caught.value)
    if "delete the folder" in str(caught.value):
        shutil.rmtree(prepared)
    quiet(str(prepared.parent / "a.jsonl"), prepared, shard_tokens=300)
    data = open_tokens(prepared)
    data.verify()
    assert data.hash == before
