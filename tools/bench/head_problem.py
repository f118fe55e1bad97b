"""The problem on which heads are measured: one batch for all candidates, and the type of a candidate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flashlm_numba.data.shards import TokenData
from flashlm_numba.model.embedding_init import cached_start

Found = dict[str, np.ndarray]  # "loss" (N,), or () where a head gives only the mean, and gradients by name


class UnavailableError(Exception):
    """A candidate needs a package that is not installed; the message names it."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One batch for every candidate."""

    h: np.ndarray  # (N, C) float32
    weight: np.ndarray  # (V, C) float32, rows by token id
    targets: np.ndarray  # (N,) int32
    counts: np.ndarray  # (V,) int64, of the training documents
    by_meaning: bool = True  # trees may cluster the rows of weight, as training does

    @property
    def weights(self) -> np.ndarray:
        """Each position's share of the mean loss, (N,) float32."""
        return np.full(len(self.targets), 1 / len(self.targets), np.float32)

    def first(self, rows: int) -> Problem:
        """The same problem with only the first positions."""
        return dataclasses.replace(self, h=self.h[:rows].copy(), targets=self.targets[:rows].copy())


@dataclass(frozen=True)
class Candidate:
    """A head on one batch: forward and backward with all gradients of the mean loss."""

    run: Callable[[], Found]
    reference: Callable[[type], Found]  # the same by plain code, in float64 (the truth) or float32 (the yardstick)
    flop: float  # of a call's matrix products
    nbytes: float  # least memory traffic of a call: h, rows read, dh and all gradients, each once
    scratch_mb: Callable[[], float | None] = lambda: None  # held by the head after a call, MB (1e6 bytes); not torch's


def make_problem(data: TokenData, rows: int, dim: int, vocab: int, seed: int) -> Problem:
    """A problem with `rows` positions of the training text, mapped to a smaller vocabulary if vocab is given."""
    rng = np.random.default_rng(seed)
    ids = data.train.windows(np.array([0]), min(rows + 1, data.train.n_tokens))[0]
    targets = np.resize(ids[1:], rows).astype(np.int32) % vocab
    folded = np.arange(data.manifest.vocab_size) % vocab
    counts = np.bincount(folded, data.train.counts(data.manifest.vocab_size), minlength=vocab)
    h = rng.standard_normal((rows, dim), np.float32)
    if vocab == data.manifest.vocab_size:
        weight, _ = cached_start(data, dim)
    else:
        weight = rng.standard_normal((vocab, dim), np.float32) * np.float32(0.05)
    return Problem(h, weight, targets, counts[:vocab].astype(np.int64))


def zipf_problem(rows: int, dim: int, vocab: int, seed: int = 0) -> Problem:
    """A problem with `rows` positions sampled by Zipf's law, for any vocabulary; trees use only the counts."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(2.0, vocab + 2)
    share /= share.sum()
    targets = rng.choice(vocab, rows, p=share).astype(np.int32)
    h, weight = rng.standard_normal((rows, dim), np.float32), rng.standard_normal((vocab, dim), np.float32)
    return Problem(h, weight * np.float32(0.05), targets, (1e9 * share).astype(np.int64), by_meaning=False)
