"""Start of E from the corpus: its associations, and the cache."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse

from flashlm_numba.data.vocabularies import vocabulary_named
from flashlm_numba.model import embedding_init as embeddings
from flashlm_numba.model.embedding_init import count_pairs, from_corpus, ppmi, truncated_svd
from flashlm_numba.system.cache import writable_cache
from flashlm_numba.system.errors import UserError


class Tokens:
    """What from_corpus needs of a split."""

    def __init__(self, ids):
        self.ids = np.asarray(ids, np.int32)
        self.n_tokens = len(self.ids)
        self.read = 0

    def windows(self, starts, length):
        self.read += length * len(starts)
        return np.stack([self.ids[s : s + length] for s in starts])


def grammar(n, seed):
    """Tokens 10..19 and 20..29 are two classes that follow each other; 5 stands between sentences."""
    rng = np.random.default_rng(seed)
    ids = np.where(np.arange(n) % 2, rng.integers(10, 20, n), rng.integers(20, 30, n))
    ids[::7] = 5
    return ids


def test_count_pairs_is_what_a_plain_loop_counts_and_crosses_no_end_of_text():
    ids = np.random.default_rng(0).integers(0, 10, 500)
    window, expected = 3, np.zeros((10, 10))
    for i in range(len(ids)):
        for j in range(i + 1, min(i + window + 1, len(ids))):
            if 9 not in ids[i + 1 : j]:
                expected[ids[i], ids[j]] += 1 / (j - i)
    got = count_pairs(iter([ids]), 10, window, eot=9).toarray()
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_count_pairs_of_almost_nothing(n):
    assert count_pairs(iter([np.arange(n)]), 5, eot=4).nnz == max(0, n - 1)


def test_count_pairs_drops_the_rarest_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(embeddings, "MAX_PAIRS", 3)
    pairs = count_pairs(iter([np.array([1, 2] * 50 + [3, 4, 6, 7])]), 8, window=1, eot=0)
    assert pairs.nnz == 3
    assert (pairs[1, 2], pairs[2, 1]) == (50, 49)
    with pytest.raises(UserError, match="ids from 1 to 7, but the vocabulary has 5"):
        count_pairs(iter([np.array([1, 7])]), 5, eot=0)


def test_ppmi_is_its_definition():
    pairs = sparse.csr_matrix(np.array([[0, 4, 1], [2, 0, 0], [0, 0, 0]], np.float32))
    got, tokens = ppmi(pairs)
    np.testing.assert_array_equal(tokens, [0, 1, 2])
    both = np.hstack([pairs.toarray().T, pairs.toarray()])
    both = both[:, both.sum(0) > 0]
    q = both.sum(0) ** embeddings.CONTEXT_POWER
    with np.errstate(divide="ignore"):
        pmi = np.log(both / both.sum(1, keepdims=True) / (q / q.sum()))
    expected = np.maximum(pmi, 0) * both / (both + embeddings.DISCOUNT)
    np.testing.assert_allclose(got.toarray(), expected, rtol=2e-5, atol=1e-6)


def test_truncated_svd_finds_the_leading_vectors_for_any_thread_count():
    rng = np.random.default_rng(1)
    low = rng.standard_normal((60, 5)) @ rng.standard_normal((5, 90)) + 0.01 * rng.standard_normal((60, 90))
    matrix = sparse.csr_matrix(low.astype(np.float32))
    u, s = truncated_svd(matrix, 5, np.random.default_rng(0), threads=1)
    exact_u, exact_s, _ = np.linalg.svd(low)
    np.testing.assert_allclose(s, exact_s[:5], rtol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(u * exact_u[:, :5], axis=0)), 1, atol=1e-3)
    again, _ = truncated_svd(matrix, 5, np.random.default_rng(0), threads=3)
    np.testing.assert_array_equal(u, again)


def test_from_corpus_puts_tokens_used_alike_together():
    start = from_corpus(Tokens(grammar(20_000, 0)), 40, 8, seed=3, eot=0)
    assert start.shape == (40, 8)
    assert start.dtype == np.float32
    unit = start / np.linalg.norm(start, axis=1, keepdims=True)
    cosine = unit @ unit.T
    same = (cosine[10:20, 10:20].sum() - 10) / 90
    assert same > cosine[10:20, 20:30].mean() + 0.5
    seen = start[[5, *range(10, 30)]]
    assert np.sqrt(np.mean(seen.astype(np.float64) ** 2)) == pytest.approx(embeddings.RMS, rel=1e-4)
    unseen = np.delete(start, [5, *range(10, 30)], axis=0)
    assert unseen.any(axis=1).all()  # rows of their own
    assert np.abs(unseen).max() < embeddings.RMS


def test_from_corpus_is_deterministic_and_reads_no_more_than_it_may():
    ids = grammar(9_000, 1)
    first, second = (from_corpus(Tokens(ids), 40, 8, seed=3, eot=0) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, from_corpus(Tokens(ids), 40, 8, seed=4, eot=0))
    tokens = Tokens(ids)
    from_corpus(tokens, 40, 8, eot=0, max_tokens=4_000)
    assert tokens.read == 4_000


def test_from_corpus_copes_with_a_corpus_smaller_than_the_model():
    for ids in ([7], [7, 7], [7, 8, 9]):
        start = from_corpus(Tokens(ids), 300, 256, seed=0, eot=0)
        assert start.shape == (300, 256)
        assert np.isfinite(start).all()
        assert start.any(axis=1).all()
    with pytest.raises(UserError, match="training split is empty"):
        from_corpus(Tokens([]), 300, 256, eot=0)


def test_cached_start_runs_apart_once_and_mends_a_damaged_cache(tmp_path, monkeypatch):
    from flashlm_numba.data.prepare import prepare
    from flashlm_numba.data.shards import open_tokens

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where a cache that cannot be written goes
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The {w} is a {w} and no other {w} is {w}." for w in "abcdefghijklmnopqrstuvw"))
    prepare(str(text), tmp_path / "tokens", lines=True, progress=False)
    data = open_tokens(tmp_path / "tokens")
    said: list[str] = []
    start, seconds = embeddings.cached_start(data, 16, 5, report=said.append)
    assert seconds > 0
    assert start.shape == (50_257, 16)
    assert any("singular vectors" in sentence for sentence in said)
    np.testing.assert_array_equal(start, from_corpus(data.train, 50_257, 16, 5, eot=50_256))

    path = writable_cache("embeddings") / embeddings.cache_name(data, 16, 5, os.cpu_count())
    assert path.is_file()
    assert path.is_relative_to(tmp_path)
    monkeypatch.setattr(embeddings, "_run_apart", lambda *_: pytest.fail("made again although cached"))
    again, as_long = embeddings.cached_start(data, 16, 5)
    np.testing.assert_array_equal(again, start)
    assert as_long == seconds
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where a cache that cannot be written goes
    path.write_bytes(path.read_bytes()[:-1000])
    np.testing.assert_array_equal(embeddings.cached_start(data, 16, 5)[0], start)
    with path.open("wb") as file:
        np.savez(file, rows=start, seconds=np.nan)
    assert embeddings.cached_start(data, 16, 5)[1] > 0
    np.save(path.with_suffix(".npy"), start)  # an array that is in no archive
    path.with_suffix(".npy").replace(path)
    np.testing.assert_array_equal(embeddings.cached_start(data, 16, 5)[0], start)
    assert len(list(path.parent.iterdir())) == 1  # no half-written files


def test_cached_start_hands_on_what_the_process_says_is_wrong(tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        embeddings._run_apart(tmp_path / "nowhere", tmp_path / "out.npy", 8, 0, 1, None)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot be stored in .*No space left on device; free some"),
        (MemoryError("Unable to allocate 1 GiB"), "not enough memory .*Unable to allocate 1 GiB"),
    ],
)
def test_the_process_says_in_a_sentence_what_is_wrong(tmp_path, monkeypatch, capsys, error, sentence):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(
        "flashlm_numba.data.shards.open_tokens",
        lambda folder: SimpleNamespace(train=None, vocabulary=vocabulary_named("gpt2")),
    )
    monkeypatch.setattr(embeddings, "from_corpus", lambda *arguments, **options: np.zeros((300, 8), np.float32))
    monkeypatch.setattr(embeddings, "write_atomically", fail)
    assert embeddings.main([str(tmp_path), str(tmp_path / "out.npz")]) == 2
    said = capsys.readouterr().out.splitlines()
    assert re.search(sentence, said[-1])


@pytest.mark.skipif(os.name != "posix", reason="a script and a signal")
def test_a_process_that_is_killed_is_told_of(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(embeddings, "PYTHON", (str(script),))
    with pytest.raises(UserError, match="Signal 9 ended the computation of the initial embedding; if memory ran out"):
        embeddings._run_apart(tmp_path, tmp_path / "out.npz", 8, 0, 1, None)
