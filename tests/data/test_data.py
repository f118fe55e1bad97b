"""Token shards: what prepare() writes, when it is stopped, and what is read back."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import filelock
import numpy as np
import platformdirs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.data import prepare as preparing
from flashlm_numba.data import shards as token_data
from flashlm_numba.data import sources
from flashlm_numba.data import splits as splitting
from flashlm_numba.data.prepare import prepare
from flashlm_numba.data.shards import Manifest, Split, default_corpus, open_run_tokens, open_tokens, sample_batch
from flashlm_numba.data.tokenizer import EOT, VOCAB_SIZE, Tokenizer
from flashlm_numba.system.errors import UserError

WORDS = ["the", "river", "Ångström", "runs", "<|endoftext|>", "42", "\n\n", "中文", "slowly,", "and", "."]
quiet = functools.partial(prepare, progress=False)


def make_texts(n, seed=0):
    """n different documents of 1 to 60 words."""
    rng = np.random.default_rng(seed)
    return [f"{i}: " + " ".join(rng.choice(WORDS, size=rng.integers(1, 60))) for i in range(n)]


def write_jsonl(path: Path, texts) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def write_parquet(path: Path, texts) -> None:
    pq.write_table(pa.table({"text": texts, "id": [str(i) for i in range(len(texts))]}), path)


def texts_of(split: Split) -> list[str]:
    tokenizer = Tokenizer()
    return [tokenizer.decode(ids) for ids in split.documents()]


def flat(folder: Path, split: str) -> np.ndarray:
    """The shards as plain files, without the code under test."""
    names = sorted(p for p in folder.iterdir() if p.name.startswith(f"{split}-"))
    return np.concatenate([np.fromfile(p, dtype="<u2") for p in names] or [np.zeros(0, "<u2")])


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".bin", ".json")}


def test_prepare_writes_documents_in_order_each_closed_by_eot(tmp_path):
    texts = make_texts(200)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = quiet(source, tmp_path / "out", shard_tokens=700)
    tokens = open_tokens(tmp_path / "out")
    validation = set(texts_of(tokens.validation))
    assert len(validation) == 10  # 5 % of a small source, exactly
    train = [text for text in texts if text not in validation]
    encode = Tokenizer().encode
    expected = np.array([i for text in train for i in [*encode(text), EOT]])
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


def test_prepare_gives_the_same_bytes_for_any_number_of_workers(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(150))
    quiet(source, tmp_path / "one", workers=1)
    monkeypatch.setattr(preparing, "BATCH_CHARACTERS", 100)
    quiet(source, tmp_path / "three", workers=3)
    assert content(tmp_path / "one") == content(tmp_path / "three")


@pytest.mark.parametrize("small", [1_000, 50])
def test_split_keeps_every_validation_document_out_of_training(tmp_path, monkeypatch, small):
    monkeypatch.setattr(splitting, "SMALL", small)  # 50: the rule of large sources
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


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["", " \n\t"], "holds no document with text"),
        (["x"], "too short to set a validation part apart"),
        (["same", "same", "same"], "No training document is left"),
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
        n_bytes = sum(len(Tokenizer().decode_bytes(ids)) for ids in documents)
        assert n_bytes == sum(split.text_bytes for split in manifest.splits.values())
    validation = write_jsonl(tmp_path / "v.jsonl", make_texts(50, seed=1))
    manifest = quiet(source, tmp_path / "v", max_tokens=500, validation=validation)
    assert manifest.splits["validation"].documents == 50
    assert 499 <= manifest.splits["train"].tokens <= 500
    with pytest.raises(UserError, match="max_docs must be at least 1"):
        quiet(source, tmp_path / "zero", max_docs=0)


def test_long_document_is_encoded_in_pieces_without_a_change(tmp_path):
    text = " ".join(make_texts(1_500))
    assert len(text) > 250_000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    quiet(str(tmp_path / "a.txt"), tmp_path / "out", split="train")
    expected = [*Tokenizer()._tiktoken.encode_ordinary(text), EOT]
    np.testing.assert_array_equal(flat(tmp_path / "out", "train"), expected)


def test_reading_stays_a_few_batches_ahead_of_writing(monkeypatch):
    monkeypatch.setattr(preparing, "BATCH_CHARACTERS", 10)
    read = 0

    def documents():
        nonlocal read
        for _ in range(1_000):
            read += 1
            yield splitting.Document("train", "ten chars.", True, splitting.Tally())

    written = 0
    for _ in preparing._encoded(Tokenizer(), documents(), workers=2):
        written += 1
        assert read - written <= 8
    assert written == 1_000


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_after", [0, 1, 40, 77])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_stopped_prepare_continues_to_the_same_bytes(tmp_path, monkeypatch, stop_after, error):
    source = write_jsonl(tmp_path / "a.jsonl", ["", *make_texts(150)])
    options = {"shard_tokens": 500, "max_tokens": 4_000}
    quiet(source, tmp_path / "whole", **options)
    append = preparing._ShardWriter.append
    calls = 0

    def failing(self, ids):
        nonlocal calls
        calls += 1
        if calls > stop_after:
            append(self, ids[: len(ids) // 2])  # part of a document reaches the file
            self.sync()
            raise OSError(errno.ENOSPC, "No space left on device") if error is OSError else KeyboardInterrupt
        append(self, ids)

    for journal_seconds in (0.0, 3600.0):
        out = tmp_path / f"out-{journal_seconds}"
        calls = 0
        monkeypatch.setattr(preparing, "JOURNAL_SECONDS", journal_seconds)
        monkeypatch.setattr(preparing._ShardWriter, "append", failing)
        with pytest.raises(UserError, match="run the same command again to continue"):
            quiet(source, out, **options)
        with pytest.raises(UserError, match="is not finished"):
            open_tokens(out)
        monkeypatch.setattr(preparing._ShardWriter, "append", append)
        if stop_after > 1 and journal_seconds == 0.0:
            with pytest.raises(UserError, match="holds an unfinished corpus of another source"):
                quiet(source, out, shard_tokens=500)
        quiet(source, out, **options)
        assert content(out) == content(tmp_path / "whole")


def test_killed_prepare_continues_to_the_same_bytes(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(3_000))
    quiet(source, tmp_path / "whole")
    out = tmp_path / "out"
    code = (
        "import sys; from flashlm_numba.data import prepare as preparing\n"
        "preparing.JOURNAL_SECONDS = 0.0; preparing.BATCH_CHARACTERS = 5_000\n"
        "preparing.prepare(sys.argv[1], sys.argv[2], progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, source, str(out)])
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline and process.poll() is None:
            if (out / "progress.json").exists() and json.loads((out / "progress.json").read_text())["documents"]:
                break
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    encoded = []
    encode = preparing._encode
    monkeypatch.setattr(preparing, "_encode", lambda *args: encoded.extend(args[1]) or encode(*args))
    quiet(source, out)
    assert 0 < len(encoded) < 3_000  # what was done is not done again
    assert content(out) == content(tmp_path / "whole")


def test_stopped_prepare_of_a_hub_dataset_does_not_read_finished_files_again(tmp_path, monkeypatch):
    texts = make_texts(90)
    for i in range(3):  # three files, the first and the last document of each without text
        write_parquet(tmp_path / f"{i}.parquet", ["", *texts[30 * i : 30 * i + 30], ""])
    source = sources.Source("some/dataset", "hub", hub_splits={"all": ("train",)}, revision="f00d")
    datasets = sources.quiet_datasets()
    load = datasets.load_dataset
    files = [str(tmp_path / f"{i}.parquet") for i in range(3)]

    def load_dataset(name, subset, **options):
        assert (name, subset, options.pop("revision")) == ("some/dataset", None, "f00d")
        return load("parquet", data_files={"train": files}, cache_dir=str(tmp_path), **options)

    read = 0
    rows = sources._texts

    def counted(*args):
        nonlocal read
        for text in rows(*args):
            read += 1
            yield text

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(preparing.sources, "resolve", lambda *args, **kwargs: source)
    monkeypatch.setattr(splitting, "SMALL", 2)
    monkeypatch.setattr(preparing, "JOURNAL_SECONDS", 0.0)
    manifest = quiet("some/dataset", tmp_path / "whole", max_docs=85)
    assert (manifest.skipped_empty, sum(s.documents for s in manifest.splits.values())) == (5, 85)
    append = preparing._ShardWriter.append
    calls = 0

    def failing(self, ids):
        nonlocal calls
        calls += 1
        if calls > 2 * 65:  # in the third file
            raise KeyboardInterrupt
        append(self, ids)

    monkeypatch.setattr(preparing._ShardWriter, "append", failing)
    with pytest.raises(UserError, match="Stopped"):
        quiet("some/dataset", tmp_path / "out", max_docs=85)
    monkeypatch.setattr(preparing._ShardWriter, "append", append)
    monkeypatch.setattr(sources, "_texts", counted)
    quiet("some/dataset", tmp_path / "out", max_docs=85)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert read == 4 + 26  # the first look at the source, then the third file up to the limit


def test_damaged_unfinished_shards_are_made_anew(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(100))
    quiet(source, tmp_path / "whole", shard_tokens=500)
    out = tmp_path / "out"
    monkeypatch.setattr(preparing, "JOURNAL_SECONDS", 0.0)
    monkeypatch.setattr(preparing, "_check_splits", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(UserError, match="Stopped"):
        quiet(source, out, shard_tokens=500)
    monkeypatch.undo()
    shard = out / "train-00001.bin"
    shard.write_bytes(b"\1\2" + shard.read_bytes()[2:])
    quiet(source, out, shard_tokens=500)
    assert content(out) == content(tmp_path / "whole")


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
    with pytest.raises(UserError, match="holds a corpus of another source"):
        quiet(source, out, max_docs=5)
    os.utime(tmp_path / "a.jsonl", ns=(0, 0))
    with pytest.raises(UserError, match=r"holds a corpus of another source \(or its files have changed\)"):
        quiet(source, out)
    assert content(out) == before
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds shards without a manifest"):
        quiet(source, out)
    with (
        filelock.FileLock(out / "prepare.lock"),
        pytest.raises(UserError, match="Another process is preparing"),
    ):
        quiet(source, out)
    with pytest.raises(UserError, match=r"Cannot prepare .*a\.jsonl"):
        quiet(source, tmp_path / "a.jsonl" / "below-a-file")


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
    refused("no name of a shard", lambda m: shard(m).update(name="../out/train-00000.bin"))
    refused("no name of a shard", lambda m: shard(m).update(name="validation-00000.bin"))
    refused("do not add up", lambda m: shard(m).update(tokens=299))
    refused("is wrong", lambda m: shard(m).update(sha256="0"))
    refused("contradict", lambda m: m["splits"]["train"].update(documents=1))
    refused("has format 99, and this version reads 1", lambda m: m.update(format=99))
    refused("is damaged", lambda m: m["splits"].pop("validation"))
    refused("is damaged", lambda m: m.pop("source"))
    refused("does not fit 16 bits", lambda m: m.update(vocab_size=70_000))
    path.write_text(good[:100])
    with pytest.raises(UserError, match="Cannot read"):
        open_tokens(prepared)
    path.write_text(good)
    first = prepared / "train-00000.bin"
    whole = first.read_bytes()
    first.write_bytes(whole[:-2])
    with pytest.raises(UserError, match="has 598 bytes, and the manifest says 600"):
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
    ends = np.flatnonzero(ids == EOT)
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
    expected = np.bincount(ids, minlength=VOCAB_SIZE)
    np.testing.assert_array_equal(open_tokens(prepared).train.counts(VOCAB_SIZE), expected)
    kept = prepared / "counts-train.npy"
    np.testing.assert_array_equal(np.load(kept), expected)
    np.save(kept, expected + 1)  # of another corpus
    counts = open_tokens(prepared).train.counts(VOCAB_SIZE + 7)
    np.testing.assert_array_equal(counts, np.pad(expected, (0, 7)))
    for damaged in (b"damaged", b""):
        kept.write_bytes(damaged)
        np.testing.assert_array_equal(open_tokens(prepared).train.counts(VOCAB_SIZE), expected)


def test_default_corpus_is_the_whole_built_in_text_and_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *args, **kwargs: str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where a cache that cannot be written goes
    folder = default_corpus(progress=False)
    assert folder.parent == tmp_path
    tokens = open_tokens(folder)
    assert tokens.train.n_text_tokens + tokens.validation.n_text_tokens == 2_388_908
    assert (tokens.train.n_documents, tokens.validation.n_documents) == (237, 12)
    assert not set(texts_of(tokens.train)) & set(texts_of(tokens.validation))
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "prepare", None)
        assert default_corpus(progress=False) == folder
    assert sources.resolve(None).content_hash == tokens.manifest.source["sha256"]


def test_a_run_finds_the_built_in_text_again_after_the_cache_was_emptied(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(token_data, "_corpus_name", lambda: "corpus-0")
    monkeypatch.setattr(token_data, "default_corpus", lambda: corpus)
    assert open_run_tokens(tmp_path / "gone" / "corpus-0").hash == open_tokens(corpus).hash
    with pytest.raises(UserError, match="There is no folder"):
        open_run_tokens(tmp_path / "gone" / "tokens")


def test_default_corpus_is_made_anew_where_it_is_damaged(tmp_path, monkeypatch):
    (tmp_path / "speeches").mkdir()
    for i, text in enumerate(make_texts(30)):
        (tmp_path / "speeches" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sources, "built_in_folder", lambda: tmp_path / "speeches")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *args, **kwargs: str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where a cache that cannot be written goes
    folder = default_corpus(progress=False)
    before = content(folder)
    (folder / "train-00000.bin").unlink()
    assert default_corpus(progress=False) == folder
    assert content(folder) == before
    (tmp_path / "speeches" / "30.txt").write_text("one more")
    assert default_corpus(progress=False) != folder
