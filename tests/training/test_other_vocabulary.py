"""A vocabulary that is not GPT-2's, from documents to a generated text: nothing else knows which tokens there are."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from helpers import TINY, command

from flashlm_numba.data import tokenizer
from flashlm_numba.data.builtin import open_run_tokens
from flashlm_numba.data.prepare import prepare
from flashlm_numba.data.shards import open_tokens
from flashlm_numba.data.tokenizer import VOCABULARIES, Vocabulary
from flashlm_numba.inference.evaluate import evaluate_run
from flashlm_numba.model import embedding_init
from flashlm_numba.model.build import read_config, vocabulary_of
from flashlm_numba.system.errors import UserError


class Letters(Vocabulary):
    """The 256 bytes, some pairs of letters, and an end of text in the middle of them."""

    name, size, hash, eot = "letters", 300, "1" * 64, 77
    tokens: tuple[bytes, ...] = (
        *(bytes([b]) for b in range(77)),
        b"",
        *(bytes([b]) for b in range(77, 256)),
        *(bytes([a, b]) for a in b"etaoin " for b in b"hrst n"),
        b"peace",
    )

    def encode_batch(self, texts):
        ids = {token: i for i, token in enumerate(self.tokens)}
        encoded = []
        for text in texts:
            rest, found = text.encode("utf-8", "replace"), []
            while rest:
                length = next(n for n in (5, 2, 1) if rest[:n] in ids and len(rest) >= n)
                found.append(ids[rest[:length]])
                rest = rest[length:]
            encoded.append(found)
        return encoded

    def decode_bytes(self, ids):
        return b"".join(self.tokens[i] for i in ids)


class Wide(Letters):
    """The same at the upper end of so many ids that 2 bytes do not hold them."""

    name, size, hash, eot = "wide", 70_000, "2" * 64, 69_777
    first = 69_700

    def encode_batch(self, texts):
        return [[i + self.first for i in ids] for ids in super().encode_batch(texts)]

    def decode_bytes(self, ids):
        return super().decode_bytes(i - self.first for i in ids)


@pytest.fixture(scope="module", autouse=True)
def without_gpt2(corpus):
    """The table has these two, and GPT-2's files cannot be read any more (`corpus` needed them)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VOCABULARIES, "letters", Letters)
        patch.setitem(VOCABULARIES, "wide", Wide)
        patch.setattr(tokenizer, "_encoding", lambda: pytest.fail("GPT-2's vocabulary was used"))
        yield


@pytest.fixture(scope="module")
def letters(corpus_files, tmp_path_factory, without_gpt2):
    """The corpus of the other tests in letters."""
    out = tmp_path_factory.mktemp("letters") / "tokens"
    prepare(str(corpus_files), out, progress=False, vocabulary="letters", shard_tokens=1_000)
    return out


@pytest.fixture(scope="module")
def trained(letters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("letters") / "run"
    settings = [part for setting in (*TINY, "validate_every=1") for part in ("--set", setting)]
    done = command("train", letters, "--out", folder, "--steps", 2, "--threads", 1, *settings)
    assert done.exit_code == 0, done.output
    return folder


def texts_in(folder):
    return [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("vocabulary", "dtype", "shard_tokens"), [(Letters(), "<u2", 1_000), (Wide(), "<u4", 999)])
def test_documents_come_back_from_shards_of_any_vocabulary(corpus_files, tmp_path, vocabulary, dtype, shard_tokens):
    manifest = prepare(
        str(corpus_files), tmp_path, progress=False, vocabulary=vocabulary.name, shard_tokens=shard_tokens
    )
    assert (manifest.tokenizer, manifest.tokenizer_hash) == (vocabulary.name, vocabulary.hash)
    assert manifest.vocab_size == vocabulary.size
    texts = texts_in(corpus_files)
    expected = [i for text in texts for i in [*vocabulary.encode(text), vocabulary.eot]]
    files = sorted(tmp_path.glob("train-*.bin"))
    assert len(files) > 2
    np.testing.assert_array_equal(np.concatenate([np.fromfile(file, dtype) for file in files]), expected)
    data = open_tokens(tmp_path)
    data.verify()
    assert [vocabulary.decode(ids) for ids in data.train.documents()] == texts
    np.testing.assert_array_equal(data.train.windows(np.array([1_990]), 20)[0], expected[1_990:2_010])
    np.testing.assert_array_equal(data.train.counts(vocabulary.size), np.bincount(expected, minlength=vocabulary.size))


def test_an_id_of_4_bytes_outside_the_vocabulary_is_damage(corpus_files, tmp_path):
    prepare(str(corpus_files), tmp_path, progress=False, vocabulary="wide")
    for bad in (70_000, 1 << 31, (1 << 32) - 1):
        with (tmp_path / "train-00000.bin").open("r+b") as file:
            file.write(bad.to_bytes(4, "little"))
        with pytest.raises(UserError, match=rf"are damaged \(id {bad}, vocabulary 70000"):
            open_tokens(tmp_path).train.windows(np.array([0]), 4)


def test_a_stopped_prepare_in_4_bytes_goes_on_to_the_same_bytes(corpus_files, tmp_path, monkeypatch):
    from flashlm_numba.data import prepare as preparing
    from flashlm_numba.data.writer import ShardWriter

    def make(out):
        prepare(str(corpus_files), out, progress=False, vocabulary="wide", shard_tokens=900)

    make(tmp_path / "whole")
    append, calls = ShardWriter.append, 0

    def failing(self, ids):
        nonlocal calls
        calls += 1
        if calls > 25:
            append(self, ids[: len(ids) // 2])
            raise KeyboardInterrupt
        append(self, ids)

    monkeypatch.setattr(preparing, "JOURNAL_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", failing)
        with pytest.raises(UserError, match="Stopped"):
            make(tmp_path / "out")
    make(tmp_path / "out")
    for file in (tmp_path / "whole").glob("*.bin"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_run_takes_its_size_from_the_data_and_is_scored_and_continued(letters, trained, corpus_files):
    run = read_config(trained)
    assert run.model.vocab_size == 300
    assert vocabulary_of(run).name == "letters"
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert 1 < line["val_nll"] < math.log(300)
    assert "=== step 2 ===" in (trained / "samples.txt").read_text()
    own = evaluate_run(trained)
    assert own["documents"] == 5
    assert own["tokens"] == open_run_tokens(run.data, trained, run.data_hash).validation.n_text_tokens
    source = evaluate_run(trained, str(corpus_files / "validation.jsonl"))
    assert source["nll"] == pytest.approx(own["nll"], rel=1e-6)
    assert (source["bytes"], source["tokens"]) == (own["bytes"], own["tokens"])


def test_a_run_continues_a_prompt_and_so_does_an_exported_model(trained, tmp_path):
    options = ("--prompt", "The people", "--seed", 3, "--max-tokens", 30, "--threads", 1)
    texts = [command("generate", trained, *options).stdout]
    command("export", trained, tmp_path / "model.safetensors")
    texts.append(command("generate", tmp_path / "model.safetensors", *options).stdout)
    assert texts[0].startswith("The people")
    assert len(texts[0]) > len("The people\n") + 5
    assert texts[1] == texts[0]


def test_the_start_of_the_embedding_counts_across_no_end_of_this_text(letters, tmp_path):
    assert embedding_init.main([str(letters), str(tmp_path / "rows.npz"), "--dim", "8", "--threads", "1"]) == 0
    split = open_tokens(letters).train
    with np.load(tmp_path / "rows.npz") as found:
        rows = found["rows"]
    assert rows.shape == (300, 8)
    np.testing.assert_array_equal(rows, embedding_init.from_corpus(split, 300, 8, eot=77, threads=1))
    assert not np.array_equal(rows, embedding_init.from_corpus(split, 300, 8, eot=76, threads=1))


def test_what_does_not_fit_together_is_one_sentence(letters, corpus, trained, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"use the vocabulary gpt2, but .* was trained with letters; name the original"):
        evaluate_run(trained, str(corpus))
    done = command("train", letters, "--out", tmp_path / "run", "--steps", 1, "--set", "vocab_size=1000")
    assert done.exit_code == 1
    assert "have a vocabulary of 300, but model.vocab_size is 1,000; leave out that setting" in done.stderr
    with pytest.raises(UserError, match="holds a corpus from another source"):
        prepare(json.loads((letters / "manifest.json").read_text())["source"]["name"], letters, vocabulary="wide")
    monkeypatch.delitem(VOCABULARIES, "letters")
    with pytest.raises(UserError, match="there is no vocabulary 'letters'"):
        open_tokens(letters)
    with pytest.raises(UserError, match="No known vocabulary has the model's 300 tokens"):
        vocabulary_of(read_config(trained))
