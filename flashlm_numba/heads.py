"""The heads: from hidden states to the probability of a token, its loss and its gradients. One interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flashlm_numba.kernels import dense_head
from flashlm_numba.sampling import sample_rows
from flashlm_numba.tree_head import TreeHead

__all__ = ["DenseHead", "Head", "TreeHead"]


class Head(Protocol):
    """What the model, training, evaluation and generation ask of a head.

    h is (N, C) float32; targets are token ids (N,) int32; weights (N,) float32 are each position's share of a step's
    loss. `parameters` and `gradients` hold the head's own arrays by name (not the rows that it shares with the
    embedding); `row_of_token` is (V,) int32, or None where row v of the embedding belongs to token v.
    """

    name: str
    vocab_size: int
    parameters: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    row_of_token: np.ndarray | None

    def forward_backward(
        self, h: np.ndarray, targets: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """loss (N,), nll (N,), dh (N, C), float32; adds the gradients of sum(weights * loss) to the parameters'."""
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


@dataclass
class HeadOptions:
    """Options of the training loss, the same for every head."""

    label_smoothing: float = 0.0  # share of the target's probability spread evenly
    z_loss: float = 0.0  # weight of log(Z)**2
    soft_cap: float | None = None  # logits become cap * tanh(logit / cap)


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
        self.options = HeadOptions(label_smoothing, z_loss, soft_cap)
        self.log_prior = log_prior
        self.vocab_size = weight.shape[0]
        self.parameters: dict[str, np.ndarray] = {}
        self.gradients: dict[str, np.ndarray] = {}
        self._scratch: dense_head.DenseScratch | None = None

    def _buffers(self) -> dense_head.DenseScratch:
        import numba

        if self._scratch is None or self._scratch.threads != numba.get_num_threads():
            self._scratch = dense_head.DenseScratch(*self.weight.shape)
        return self._scratch

    def forward_backward(
        self, h: np.ndarray, targets: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """loss (N,), nll (N,), dh (N, C); adds the gradient of sum(weights * loss) to dweight."""
        return dense_head.dense_head_forward_backward(
            h,
            self.weight,
            targets,
            weights,
            self.dweight,
            log_prior=self.log_prior,
            scratch=self._buffers(),
            label_smoothing=self.options.label_smoothing,
            z_loss=self.options.z_loss,
            soft_cap=self.options.soft_cap,
        )

    def log_prob(self, h: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """log p(target), (N,) float32."""
        _, nll = dense_head.dense_head_forward(
            h,
            self.weight,
            targets,
            log_prior=self.log_prior,
            soft_cap=self.options.soft_cap,
            scratch=self._buffers(),
        )
        return -nll

    def distribution(self, h: np.ndarray) -> np.ndarray:
        """Probabilities (N, V) float32."""
        logits = h @ self.weight.T
        if self.options.soft_cap is not None:
            logits = self.options.soft_cap * np.tanh(logits / np.float32(self.options.soft_cap))
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
