"""Dropout: in a training step random channels are set to 0, so that a model cannot learn a small text by heart.

    hidden states       h[n, c] m / (1 - p),   m = 0 with probability p, else 1; drawn per position n and channel c
    embedding's rows    E[v, c] m / (1 - p),   drawn per token v of the batch and channel c, so that all occurrences of
                                               a token, as input and as copy, lose the same channels

Both have the mean that they have without dropout, so that scoring and generating change nothing. The rows that the head
shares with the embedding are whole. Srivastava et al. 2014 (jmlr.org/papers/v15/srivastava14a.html); by token as in Gal
& Ghahramani 2016, arXiv:1512.05287.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Dropout:
    """The random choices of one micro-batch.

    rng : where they come from; each mask is drawn once, first that of the embedding
    hidden, embedding : probability that a number becomes 0, in [0, 1)
    """

    rng: np.random.Generator
    hidden: float = 0.0
    embedding: float = 0.0

    def embedding_gains(self, tokens: int, channels: int) -> np.ndarray | None:
        """The factors (tokens, channels) float32 of the rows of a batch's different tokens; None if they are all 1."""
        return self._gains(tokens, channels, self.embedding)

    def hidden_gains(self, positions: int, channels: int) -> np.ndarray | None:
        """The factors (positions, channels) float32 of the hidden states; None if they are all 1."""
        return self._gains(positions, channels, self.hidden)

    def _gains(self, rows: int, channels: int, rate: float) -> np.ndarray | None:
        """0 with probability `rate`, else 1 / (1 - rate).

        >>> gains = Dropout(np.random.default_rng(0), hidden=0.5).hidden_gains(1, 6)
        >>> gains.tolist()
        [[2.0, 2.0, 2.0, 0.0, 0.0, 0.0]]
        """
        if rate <= 0:
            return None
        kept = self.rng.random((rows, channels), np.float32) >= np.float32(rate)
        return kept * np.float32(1 / (1 - rate))


NO_DROPOUT = Dropout(np.random.default_rng(0))  # draws nothing


class InputRows:
    """The rows that a training pass reads from the embedding: all of them, or with dropout copies of those in use.

    weight : (R, C) float32, the rows;  rows : (N,) int32, the row in `weight` of each position
    """

    def __init__(self, embedding: np.ndarray, rows: np.ndarray, dropout: Dropout) -> None:
        self.weight, self.rows = embedding, rows
        self._gains: np.ndarray | None = None
        if dropout.embedding > 0:
            self._used, places = np.unique(rows, return_inverse=True)
            self._gains = dropout.embedding_gains(len(self._used), embedding.shape[1])
            # equal rows stay equal, so that the n-gram copies are found as before
            self.weight, self.rows = embedding[self._used] * self._gains, places.reshape(-1).astype(np.int32)

    def gradient_into(self, dembedding: np.ndarray) -> np.ndarray:
        """Where the gradient of `weight` (R, C) is added: to dembedding (V, C) itself, or to new zeros."""
        return dembedding if self._gains is None else np.zeros_like(self.weight)

    def add_gradient(self, dembedding: np.ndarray, dweight: np.ndarray) -> None:
        """Add the gradient of `weight` to dembedding, unless it is there already."""
        if self._gains is not None:
            dembedding[self._used] += dweight * self._gains
