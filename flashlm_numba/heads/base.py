"""The heads: from hidden states to the probability of a token, its loss and its gradients. One interface."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Head(Protocol):
    """What the model, training, evaluation and generation ask of a head.

    h is (N, C) float32; targets are token ids (N,) int32; weights (N,) float32 are each position's share of a step's
    loss. `parameters` and `gradients` hold the head's own arrays by name (not the rows that it shares with the
    embedding); `row_of_token` is (V,) int32, or None where row v of the embedding belongs to token v;
    `log_prior` (V,) float32 is added to the logits, by token id, and kept with the weights, or None.
    """

    name: str
    vocab_size: int
    parameters: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    row_of_token: np.ndarray | None
    log_prior: np.ndarray | None

    def begin(self, rng: np.random.Generator, *, full: bool) -> None:
        """Before a micro-batch of training: whatever its loss draws comes from rng; full: draw nothing."""
        ...

    def prepare(self) -> None:
        """Bring up to date what is computed from the parameters; after every change of these."""
        ...

    def forward_backward(
        self, h: np.ndarray, targets: np.ndarray, weights: np.ndarray, *, accumulate: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """loss (N,), nll (N,), dh (N, C), float32; adds the gradients of sum(weights * loss) to the parameters'.

        accumulate=False: the gradients take the place of whatever was there, those of the shared rows too.
        """
        ...

    def log_prob(self, h: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Natural logarithm of the probability of each target, (N,) float32."""
        ...

    def distribution(self, h: np.ndarray) -> np.ndarray:
        """Probabilities of every token, (N, V) float32, columns by token id. For tests and small use."""
        ...

    def sample(
        self,
        h: np.ndarray,
        rng: np.random.Generator,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> np.ndarray:
        """One token id per row, (N,) int32; temperature, then top-k, then top-p, on the token distribution."""
        ...
