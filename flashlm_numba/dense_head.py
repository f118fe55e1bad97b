"""The dense head: a softmax over all tokens, tied to the embedding. Exact."""

from __future__ import annotations

from typing import Any

import numpy as np

from flashlm_numba.kernels import dense_head as kernels
from flashlm_numba.kernels.embedding import zero
from flashlm_numba.sampling import sample_rows

__all__ = ["DenseHead"]


class DenseHead:
    """softmax(h @ weight.T): exact, every token's logit for every position, in bounded scratch.

    weight (V, C) float32 may be shared with the embedding; its gradient is added to dweight (V, C) (made here if not
    given). log_prior (V,) float32: a fixed log-frequency added to the logits, so that training starts at the unigram.
    Raises ValueError if a shape or dtype is wrong.

    >>> head = DenseHead(np.zeros((5, 2), np.float32))
    >>> head.distribution(np.ones((1, 2), np.float32)).round(2).tolist()
    [[0.20000000298023224, 0.20000000298023224, 0.20000000298023224, 0.20000000298023224, 0.20000000298023224]]
    """

    name = "dense"
    row_of_token = None

    def __init__(
        self,
        weight: np.ndarray,
        dweight: np.ndarray | None = None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        soft_cap: float | None = None,
        log_prior: np.ndarray | None = None,
    ) -> None:
        self.weight = weight
        self.dweight = np.zeros_like(weight) if dweight is None else dweight
        self.settings: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss, "soft_cap": soft_cap}
        self.log_prior = log_prior
        self.vocab_size = weight.shape[0]
        self.parameters: dict[str, np.ndarray] = {}
        self.gradients: dict[str, np.ndarray] = {}
        self._scratch: kernels.DenseScratch | None = None

    def _buffers(self) -> kernels.DenseScratch:
        self._scratch = kernels.scratch_for(self._scratch, *self.weight.shape)
        return self._scratch

    def begin(self, rng: np.random.Generator, *, full: bool) -> None:
        """Nothing: this loss draws nothing."""

    def forward_backward(
        self, h: np.ndarray, targets: np.ndarray, weights: np.ndarray, *, accumulate: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """loss (N,), nll (N,), dh (N, C); adds the gradient of sum(weights * loss) to dweight, or puts it there."""
        if not accumulate:
            zero(self.dweight)
        return kernels.dense_head_forward_backward(
            h,
            self.weight,
            targets,
            weights,
            self.dweight,
            log_prior=self.log_prior,
            scratch=self._buffers(),
            **self.settings,
        )

    def log_prob(self, h: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """log p(target), (N,) float32."""
        _, nll = kernels.dense_head_forward(
            h,
            self.weight,
            targets,
            log_prior=self.log_prior,
            soft_cap=self.settings["soft_cap"],
            scratch=self._buffers(),
        )
        return -nll

    def distribution(self, h: np.ndarray) -> np.ndarray:
        """Probabilities (N, V) float32."""
        logits = h @ self.weight.T
        if (cap := self.settings["soft_cap"]) is not None:
            logits = cap * np.tanh(logits / np.float32(cap))
        if self.log_prior is not None:
            logits = logits + self.log_prior
        p = np.exp(logits - logits.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    def sample(
        self,
        h: np.ndarray,
        rng: np.random.Generator,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> np.ndarray:
        """One token id per row, (N,) int32."""
        return sample_rows(self.distribution(h), rng, temperature, top_k, top_p)
