"""Initial embedding E (V, C) from the training corpus; model/pretrained.py takes it from a checkpoint instead.

The initial embedding is a truncated SVD of a positive pointwise mutual information matrix between tokens and their
neighbours, shortly before and shortly after (docs/embeddings.md). It is computed in a separate process,
`python -m flashlm_numba.model.embedding_init DATA OUT`, so that training does not hold its memory and threads. The
result is stored in the user's cache folder under the hash of the data.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from flashlm_numba.system.cache import from_cache, writable_cache
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import write_atomically
from flashlm_numba.system.process import PYTHON, environment
from flashlm_numba.system.threads import available_cores

if TYPE_CHECKING:
    from flashlm_numba.data.shards import Split, TokenData

WINDOW = 5  # tokens of context on either side; a token at distance d counts 1/d
MAX_TOKENS = 8_000_000  # maximum number of tokens read, in evenly spread blocks of the corpus
MAX_PAIRS = 16_000_000  # maximum number of distinct (token, next token) pairs; the rarest are dropped
CONTEXT_POWER = 0.75  # context frequencies are raised to this power, which damps rare contexts
DISCOUNT = 1.0  # a pair counted n times weighs n / (n + DISCOUNT), since single occurrences are weak evidence
LENGTH_POWER = 0.5  # row lengths are raised to this power, which makes frequent tokens' rows less long
RMS = 0.02  # root mean square over the rows of the tokens that occur
UNSEEN_RMS = 0.1  # root mean square of the random rows of tokens that do not occur, times RMS
CACHE = "embeddings"  # subfolder of the cache
_CHUNK = 1 << 20  # tokens counted at a time

Report = Callable[[str], None]


def from_corpus(
    split: Split,
    vocab_size: int,
    dim: int,
    seed: int = 0,
    *,
    eot: int,
    max_tokens: int = MAX_TOKENS,
    rms: float = RMS,
    threads: int | None = None,
    report: Report | None = None,
) -> np.ndarray:
    """Embedding (vocab_size, dim) float32 in which tokens with similar contexts have similar rows.

    split : any object with `n_tokens` and `windows(starts, length)`; at most max_tokens of it are read
    eot : id of the end of text; no pair of tokens is counted across it
    threads : threads of the sparse products (default: all cores). They do not change the result, but the number of
        BLAS threads can change last bits.
    report : called with a sentence after each stage

    The rows of all tokens that occur have root mean square `rms`; frequent tokens have longer rows. The other rows are
    small and random. The same seed, data and thread count give the same rows. The function needs about 1 GB of memory.
    Raises UserError if the split is empty or has ids outside the vocabulary.
    """
    say = report or (lambda sentence: None)
    rng = np.random.default_rng(seed)
    pairs = count_pairs(_blocks(split, max_tokens), vocab_size, eot=eot)
    say(f"counted {pairs.nnz:,} pairs of tokens in {min(split.n_tokens, max_tokens):,}")
    associations, tokens = ppmi(pairs)
    del pairs
    rows = np.zeros((vocab_size, dim), np.float32)
    rank = min(dim, *associations.shape)
    if rank:
        u, s = truncated_svd(associations, rank, rng, threads=threads)
        say(f"took {rank} singular vectors of {associations.nnz:,} associations")
        factors = u * np.sqrt(s)
        length = np.sqrt(np.sum(np.square(factors), axis=1, keepdims=True))
        rows[tokens, :rank] = factors / np.maximum(length, 1e-12) ** (1 - LENGTH_POWER)
        scale = float(np.sqrt(np.mean(np.square(rows[tokens], dtype=np.float64))))
        rows *= np.float32(rms / scale) if scale > 0 else 0.0
    rest = np.flatnonzero(~rows.any(axis=1))  # tokens that do not occur, or whose row is zero
    rows[rest] = rng.standard_normal((len(rest), dim), dtype=np.float32) * np.float32(rms * UNSEEN_RMS)
    return rows


def _blocks(split: Split, max_tokens: int) -> Iterator[np.ndarray]:
    """At most max_tokens ids of the split in blocks (n,) int32: the complete split, or evenly spread blocks."""
    if split.n_tokens < 1:
        raise UserError("The training split is empty, so there is no initial embedding; prepare more text.")
    n_blocks = -(-min(split.n_tokens, max_tokens) // _CHUNK)
    edges = np.linspace(0, split.n_tokens, n_blocks + 1).astype(np.int64)
    length = -(-min(split.n_tokens, max_tokens) // n_blocks)
    for start, end in itertools.pairwise(edges):
        yield split.windows(np.array([start]), int(min(length, end - start)))[0]


def count_pairs(blocks: Iterator[np.ndarray], vocab_size: int, window: int = WINDOW, *, eot: int) -> sparse.csr_matrix:
    """counts[a, b] (V, V) float32: the sum of 1/d over all places where b occurs d <= window tokens after a.

    Pairs with an end of text (id eot) between them do not count. The end of text itself is a neighbour in both
    documents.

    >>> pairs = count_pairs(iter([np.array([3, 4, 3, 5])]), vocab_size=6, window=2, eot=0)
    >>> pairs.toarray()[3].tolist()
    [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
    """
    total = sparse.csr_matrix((vocab_size, vocab_size), dtype=np.float32)
    for ids in blocks:
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise UserError(
                f"The tokens have ids from {ids.min()} to {ids.max()}, but the vocabulary has {vocab_size}; "
                "prepare the data with this vocabulary."
            )
        total = total + _count_block(ids.astype(np.int32), vocab_size, window, eot)
        if total.nnz > MAX_PAIRS:
            excess = total.nnz - MAX_PAIRS
            total.data[np.argpartition(total.data, excess)[:excess]] = 0.0
            total.eliminate_zeros()
    return total


def _count_block(ids: np.ndarray, vocab_size: int, window: int, eot: int) -> sparse.csr_matrix:
    """count_pairs for one block: the product of (V, n) "a is at position i" and (n, V) "b follows i closely"."""
    n = len(ids)
    places = np.argsort(ids.astype(np.uint16) if vocab_size <= 1 << 16 else ids, kind="stable").astype(np.int32)
    ends = np.cumsum(np.bincount(ids, minlength=vocab_size))
    stands = sparse.csr_matrix((np.ones(n, np.float32), places, np.concatenate([[0], ends])), shape=(vocab_size, n))
    documents = np.cumsum(ids == eot)  # ends of text up to and including i
    after = np.zeros((n, window), np.int32)
    weights = np.zeros((n, window), np.float32)
    for d in range(1, min(window, n - 1) + 1):
        after[:-d, d - 1] = ids[d:]
        same = documents[d - 1 : -1] == documents[:-d]  # no end of text strictly between i and i + d
        weights[:-d, d - 1] = same * np.float32(1 / d)
    follows = sparse.csr_matrix(
        (weights.ravel(), after.ravel(), np.arange(0, n * window + 1, window)), shape=(n, vocab_size)
    )
    counts = stands @ follows
    counts.eliminate_zeros()
    return counts


def ppmi(pairs: sparse.csr_matrix) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Positive pointwise mutual information of tokens with their left and right contexts.

    pairs : (V, V), the result of count_pairs
    Returns a matrix (n, m) float32 and the token ids (n,) of its rows. The matrix has one row per token that occurs,
    and one column per context that occurs: "b shortly before" or "b shortly after". Its entries are
    max(0, log(p(a, b) / (p(a) q(b)))) * count / (count + DISCOUNT), where q(b) is proportional to p(b)**CONTEXT_POWER.
    Source: Levy, Goldberg and Dagan 2015, TACL 3, sections 2.1 and 3.1 (context distribution smoothing).
    """
    counts = sparse.hstack([pairs.T, pairs], format="csr")
    tokens = np.flatnonzero(np.diff(counts.indptr))
    used = np.unique(counts.indices)
    counts = counts[tokens][:, used]
    p_token = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    p_context = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
    q_context = p_context**CONTEXT_POWER
    q_context /= q_context.sum()
    value = np.log(counts.data)
    value -= np.repeat(np.log(p_token).astype(np.float32), np.diff(counts.indptr))
    value -= np.log(q_context).astype(np.float32)[counts.indices]
    np.maximum(value, 0.0, out=value)
    value *= counts.data / (counts.data + np.float32(DISCOUNT))
    counts.data = value
    counts.eliminate_zeros()
    return counts, tokens


def truncated_svd(
    matrix: sparse.csr_matrix,
    rank: int,
    rng: np.random.Generator,
    *,
    oversampling: int = 16,
    iterations: int = 2,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors u (n, rank) and values s (rank,), largest first, of a sparse (n, m) matrix.

    The method is randomised subspace iteration (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1). It
    orthogonalises with the Gram matrix, that is with a few large products; a Householder QR is ten times slower here.
    The sign of each vector makes its largest entry positive.
    """
    threads = threads or available_cores()
    width = min(rank + oversampling, *matrix.shape)
    with ThreadPoolExecutor(threads) as pool:
        transposed = matrix.T.tocsr()

        def product(a: sparse.csr_matrix, b: np.ndarray) -> np.ndarray:
            return _sparse_product(a, b, pool, threads)

        q = _orthonormal(product(matrix, rng.standard_normal((matrix.shape[1], width), dtype=np.float32)))
        for _ in range(iterations):
            q = _orthonormal(product(matrix, _orthonormal(product(transposed, q))))
        b = product(transposed, q)  # (m, width) = (q.T @ matrix).T
    squares, vectors = np.linalg.eigh((b.T @ b).astype(np.float64))
    order = np.argsort(-squares, kind="stable")[:rank]
    u = q @ vectors[:, order].astype(np.float32)
    largest = u[np.abs(u).argmax(axis=0), np.arange(rank)]
    return u * np.where(largest < 0, np.float32(-1), np.float32(1)), np.sqrt(np.maximum(squares[order], 0.0))


def _orthonormal(y: np.ndarray) -> np.ndarray:
    """A basis (n, k) of the columns of y, orthonormal to about 1e-6; vanishing directions stay small."""
    squares, vectors = np.linalg.eigh((y.T @ y).astype(np.float64))
    floor = max(float(squares[-1]), 1e-30) * 1e-12
    return y @ (vectors / np.sqrt(np.maximum(squares, floor))).astype(np.float32)


def _sparse_product(a: sparse.csr_matrix, b: np.ndarray, pool: ThreadPoolExecutor, threads: int) -> np.ndarray:
    """a @ b, in slices of rows with about equally many entries. SciPy's loops release Python's lock."""
    out = np.empty((a.shape[0], b.shape[1]), np.float32)
    cuts = np.searchsorted(a.indptr, np.linspace(0, a.nnz, 4 * threads + 1))
    cuts[0], cuts[-1] = 0, a.shape[0]

    def rows(piece: int) -> None:
        low, high = cuts[piece], cuts[piece + 1]
        out[low:high] = a[low:high] @ b

    list(pool.map(rows, range(4 * threads)))
    return out


# --- in a separate process, with a cache


def cached_start(
    data: TokenData,
    dim: int,
    seed: int = 0,
    *,
    threads: int | None = None,
    report: Report | None = None,
) -> tuple[np.ndarray, float]:
    """from_corpus of data.train, from the cache (see cache.py) or computed by a separate process.

    Returns (V, dim) float32, where V is the size of the data's vocabulary, and the seconds that computing it took, now
    or earlier. `report` receives a sentence at the beginning and after each stage. A damaged cache file is replaced.
    Raises UserError if no folder can be written.
    """
    threads = threads or available_cores()
    vocab_size = data.vocabulary.size
    name = cache_name(data, dim, seed, threads)
    found = from_cache(f"{CACHE}/{name}", lambda path: _load(path, (vocab_size, dim)))
    if found is not None:
        return found
    folder = writable_cache(CACHE)
    if report:
        report(f"computing the initial embedding from {data.folder} (once, then cached in {folder})")
    _run_apart(data.folder, folder / name, dim, seed, threads, report)
    found = _load(folder / name, (vocab_size, dim))
    if found is None:
        raise RuntimeError(f"the embedding process left no usable {name}")
    return found


def cache_name(data: TokenData, dim: int, seed: int, threads: int) -> str:
    """Name of cached_start's file in CACHE, a hash of data, shape, seed, threads and the settings of this module.

    It includes the threads because another number of threads changes the last digits.
    """
    tokens = data.vocabulary
    settings = (WINDOW, MAX_TOKENS, MAX_PAIRS, CONTEXT_POWER, DISCOUNT, LENGTH_POWER, RMS, UNSEEN_RMS, tokens.eot)
    key = hashlib.sha256(f"{data.hash} {tokens.size} {dim} {seed} {threads} {settings}".encode()).hexdigest()
    return f"corpus-{key[:24]}.npz"


def _load(path: Path, shape: tuple[int, int]) -> tuple[np.ndarray, float] | None:
    """The rows of a cache file and the seconds that they took, or None if the file is missing or invalid."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            rows, seconds = found["rows"], float(found["seconds"])
    # TypeError: the array is not in an archive, or the seconds are not a number
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    if rows.shape != shape or rows.dtype != np.float32 or not np.isfinite(rows).all():
        return None
    return (rows, seconds) if 0 <= seconds < float("inf") else None


def _run_apart(folder: Path, out: Path, dim: int, seed: int, threads: int, report: Report | None) -> None:
    """Run this module as a process, and report the sentences that it prints."""
    count = str(threads)
    command = [*PYTHON, "-m", "flashlm_numba.model.embedding_init", str(folder), str(out)]
    command += ["--dim", str(dim), "--seed", str(seed), "--threads", count]
    variables = environment(
        OPENBLAS_NUM_THREADS=count,
        OMP_NUM_THREADS=count,
        MKL_NUM_THREADS=count,
        PYTHONIOENCODING="utf-8:surrogateescape",  # sentences may hold names of files, which are any bytes
    )
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="surrogateescape",
        env=variables,
    ) as process:
        try:
            lines = []
            for line in process.stdout or ():
                lines.append(line)
                if report and line.startswith("embedding: "):
                    report(line.removeprefix("embedding: ").rstrip())
        except BaseException:
            process.kill()
            raise
    if process.returncode == 2 and lines:
        raise UserError(lines[-1].rstrip())
    if process.returncode < 0:
        raise UserError(
            f"Signal {-process.returncode} ended the computation of the initial embedding; if memory ran out (it "
            "needs about 1 GB), free some, or use --set embedding_init=random."
        )
    if process.returncode:
        raise RuntimeError("the embedding process failed:\n" + "".join(lines[-20:]))


def main(arguments: list[str] | None = None) -> int:
    """Command line of the process: compute the initial embedding of prepared data and write it atomically as .npz."""
    parser = argparse.ArgumentParser(prog="python -m flashlm_numba.model.embedding_init", description=__doc__)
    parser.add_argument("data", type=Path, help="folder of prepared tokens")
    parser.add_argument("out", type=Path, help="file to write, .npz")
    parser.add_argument("--dim", type=int, default=256, help="channels C")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None, help="default: all cores")
    options = parser.parse_args(arguments)
    from flashlm_numba.data.shards import open_tokens

    began = time.perf_counter()

    def say(sentence: str) -> None:
        print(f"embedding: {sentence}", flush=True)

    try:
        data = open_tokens(options.data)
        tokens = data.vocabulary
        rows = from_corpus(
            data.train, tokens.size, options.dim, options.seed, eot=tokens.eot, threads=options.threads, report=say
        )
        seconds = time.perf_counter() - began
        write_atomically(options.out, lambda file: np.savez(file, rows=rows, seconds=seconds))
    except UserError as error:
        print(error, flush=True)
        return 2
    except MemoryError as error:
        print(
            f"There is not enough memory for the initial embedding ({error}); free some (it needs about 1 GB), or "
            "use --set embedding_init=random.",
            flush=True,
        )
        return 2
    except OSError as error:
        print(
            f"The initial embedding cannot be stored in {options.out.parent}: {error.strerror or error}; free some "
            "space there, or name another cache folder with the variable XDG_CACHE_HOME.",
            flush=True,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
