"""The dense head: an exact softmax over all tokens, tied to the embedding."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from flashlm_numba.heads.base import (
    Head,
    check_options,
    check_rows,
    likeliest_of_mixture,
    loss_options,
    mixed_with,
    one_training_call,
)
from flashlm_numba.heads.config import HeadConfig
from flashlm_numba.heads.decisions import NO_TOKENS, Decisions, OneDecision
from flashlm_numba.heads.sampling import check_settings, sample_rows
from flashlm_numba.kernels import _check, dense_inference, draw
from flashlm_numba.kernels import dense_head as kernels
from flashlm_numba.kernels.embedding import zero
from flashlm_numba.kernels.ternary_gemv import quantize_rows
from flashlm_numba.system.arrays import for_reading
from flashlm_numba.system.calls import Pool
from flashlm_numba.system.threads import adopt_threads

__all__ = ["DenseHead"]

RESCORED = 64  # number of largest int8 logits computed again in float32; nearly all samples are among them


class DenseHead(Head):
    """softmax(h @ weight.T), exact. It computes every token's logit for every position, in scratch of bounded size.

    weight : (V, C) float32, may be shared with the embedding
    dweight : (V, C) float32, to which the gradient of weight is added; allocated if None
    log_prior : (V,) float32, a fixed log frequency added to the logits, so that training starts at the unigram
        distribution
    Raises ValueError if a shape, a dtype or a number is wrong.

    >>> head = DenseHead(np.zeros((5, 2), np.float32))
    >>> head.distribution(np.ones((1, 2), np.float32)).round(2).tolist()
    [[0.20000000298023224, 0.20000000298023224, 0.20000000298023224, 0.20000000298023224, 0.20000000298023224]]
    """

    name = "dense"
    has_int8 = True
    joins = True

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
        self._weight, self._log_prior = for_reading(weight), for_reading(log_prior)  # for kernels, which only read
        check_rows("DenseHead", self._weight, dweight)
        check_options("DenseHead", label_smoothing=label_smoothing, z_loss=z_loss, soft_cap=soft_cap)
        if log_prior is not None:
            _check.array("DenseHead", "log_prior", self._log_prior, self._weight.shape[:1])
            log_prior = np.asarray(log_prior)
        self.weight = np.asarray(weight)
        self.dweight = np.zeros(self.weight.shape, np.float32) if dweight is None else dweight
        self.settings: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss, "soft_cap": soft_cap}
        self.log_prior = log_prior
        self.vocab_size = self.weight.shape[0]
        self.parameters: dict[str, np.ndarray] = {}
        self.gradients: dict[str, np.ndarray] = {}
        self._scratch: Pool[kernels.DenseScratch] = Pool()
        self._training = one_training_call(type(self).__name__)
        self._int8: tuple[np.ndarray, np.ndarray] | None = None  # quantised rows and their scales

    @classmethod
    def training_bytes(cls, settings: HeadConfig, vocab_size: int, dim: int, positions: int) -> int:
        """See Head.training_bytes: the logits of a chunk of positions, and three arrays of the hidden states' size."""
        return min(kernels.SCRATCH_BYTES, 4 * positions * vocab_size) + 12 * positions * dim

    @classmethod
    def from_settings(
        cls,
        settings: HeadConfig,
        weight: np.ndarray,
        dweight: np.ndarray,
        *,
        constants: dict[str, np.ndarray],
        parameters: dict[str, np.ndarray],
        counts: np.ndarray | None,
    ) -> DenseHead:
        """See Head.from_settings; this head does not use the counts."""
        return DenseHead(weight, dweight, **loss_options(settings, constants))

    def _buffers(self) -> AbstractContextManager[kernels.DenseScratch]:
        """Scratch for one call; the number of threads is determined first, because scratch depends on it."""
        adopt_threads()
        shape = self.weight.shape
        return self._scratch.item(
            lambda scratch: kernels.scratch_for(scratch, *shape) is scratch, lambda: kernels.DenseScratch(*shape)
        )

    def forward_backward(
        self, h: np.ndarray, targets: np.ndarray, weights: np.ndarray, *, accumulate: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns loss (N,), nll (N,), dh (N, C), and adds the gradient of sum(weights * loss) to dweight.

        accumulate : False replaces the previous gradient
        Raises RuntimeError if another thread is in forward_backward of this head.
        """
        with self._training.alone(), self._buffers() as scratch:
            if not accumulate:
                zero(self.dweight)
            return kernels.dense_head_forward_backward(
                for_reading(h),
                self._weight,
                for_reading(targets),
                for_reading(weights),
                self.dweight,
                log_prior=self._log_prior,
                scratch=scratch,
                **self.settings,
            )

    def log_prob(self, h: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """log p(target), (N,) float32."""
        with self._buffers() as scratch:
            _, nll = kernels.dense_head_forward(
                for_reading(h),
                self._weight,
                for_reading(targets),
                log_prior=self._log_prior,
                soft_cap=self.settings["soft_cap"],
                scratch=scratch,
            )
        return -nll

    def use_int8(self) -> None:
        """From now on, sample with rows quantised to int8; the largest logits are computed again in float32.

        This speeds up generation, because a token reads a quarter of the bytes. Call it again after changing weights.
        Other threads may be sampling: their calls finish with the rows with which they began.
        """
        self._int8, self.joined = quantize_rows(self._weight), None

    def _finish(self, logits: np.ndarray, ids: np.ndarray | slice) -> np.ndarray:
        """Apply the cap and the prior of these tokens to logits (..., n)."""
        if (cap := self.settings["soft_cap"]) is not None:
            logits = cap * np.tanh(logits / np.float32(cap))
        return logits if self.log_prior is None else logits + self.log_prior[ids]

    def _logits(self, x: np.ndarray, int8: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
        """Logits (V,) float32 of one position x (1, C). With int8 rows only the RESCORED largest are exact."""
        logits = self._finish(self._products_at(x, int8), slice(None))
        if int8 is None:
            return logits
        ids, _ = draw.largest(logits, RESCORED)
        logits[ids] = self._logits_of(x, ids)
        return logits

    def _products_at(self, x: np.ndarray, int8: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
        """The logits (V,) float32 of one position x (1, C) before the cap and the prior, to be changed by the caller.

        They are computed with one thread, or with those of other texts.
        """

        def compute(h: np.ndarray) -> np.ndarray:
            return dense_inference.dense_logits_int8(h, *int8) if int8 else self._exact_products(h)

        joined = None if self.joined is None else self.joined.find(x, compute, "int8" if int8 else "float")
        return compute(x)[0] if joined is None else joined[0].copy()

    def _exact_products(self, h: np.ndarray) -> np.ndarray:
        """The logits (N, V) of h (N, C) before the cap and the prior; a position has the bits that it has alone."""
        return dense_inference.dense_logits(h, self._weight)

    def top(self, x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The k = min(count, V) largest logits for one x (C,). Returns token ids (k,) int32 and logits (k,) float64.

        The largest comes first. The result is exact with int8 rows too: every token that rounding could have excluded
        is computed in float32.
        """
        return self._top(for_reading(x)[None], count)[:2]

    def _top(self, x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The result of `top` for x (1, C), and the logits of all tokens (V,), which with int8 rows are rounded."""
        if (int8 := self._int8) is None:
            logits = self._logits(x, None)
            ids, values = draw.largest(logits, count)
            return ids.astype(np.int32), values, logits
        _, scales = int8
        logits = self._products_at(x, int8)
        reach = scales * np.float32(0.5001 * np.abs(x).sum(dtype=np.float64))  # bound of the rounding error
        # the cap and the prior are increasing functions of a logit, so bounds remain bounds
        if not np.isfinite(logits).all():
            raise ValueError("DenseHead: the logits must be finite to find the largest")
        lowest = draw.largest(self._finish(logits - reach, slice(None)), count)[1][-1]
        ids = np.flatnonzero(self._finish(logits + reach, slice(None)) >= lowest)
        order, values = draw.largest(self._logits_of(x, ids), count)
        return ids[order].astype(np.int32), values, self._finish(logits, slice(None))

    def _logits_of(self, x: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The logits of some tokens (K,) float32 for x (1, C), from the rows in float32."""
        return self._finish(dense_inference.dense_logits(x, self.weight[ids])[0], ids)

    def top_mixed(
        self, x: np.ndarray, count: int, tokens: np.ndarray, shares: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Head.top_mixed. With int8 rows, the sum over all tokens is that of rounded logits."""
        x = for_reading(x)[None]
        ids, values, logits = self._top(x, count)
        more = np.setdiff1d(tokens[tokens >= 0], ids)
        own = logits[more] if self._int8 is None else self._logits_of(x, more)
        ids, values = np.concatenate([ids, more]), np.concatenate([values, own])
        return likeliest_of_mixture(ids, np.exp(values - draw.log_sum_exp(logits)), tokens, shares, count)

    def log_prob_of(self, x: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """See Head.log_prob_of: from the logits of all tokens, in float32."""
        logits = self.logits(x[None])[0]
        return logits[tokens].astype(np.float64) - draw.log_sum_exp(logits)

    def decisions(self, x: np.ndarray, tokens: np.ndarray = NO_TOKENS, shares: np.ndarray | None = None) -> Decisions:
        """See Head.decisions: one. It is computed with one thread, since more could change the bits."""
        logits = self._logits(for_reading(x)[None], None).astype(np.float64)
        p = np.exp(logits - logits.max())
        return OneDecision(mixed_with(p / p.sum(), tokens, shares))

    def _products(self, h: np.ndarray) -> np.ndarray:
        """The logits of h (N, C) before the cap and the prior, (N, V) float32."""
        return self._products_at(h, None)[None] if len(h) == 1 else h @ self.weight.T

    def logits(self, h: np.ndarray) -> np.ndarray:
        """Logits (N, V) float32 after the cap, with the prior."""
        h = for_reading(h)
        _check.array(type(self).__name__, "h", h, (None, self.weight.shape[1]))
        return self._finish(self._products(h), slice(None))

    def distribution(self, h: np.ndarray) -> np.ndarray:
        """Probabilities (N, V) float32."""
        logits = self.logits(h)
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
        """Sample one token id per row, (N,) int32, with one thread; see `joins` for rows of several texts."""
        h, temperature, int8 = for_reading(h), float(temperature), self._int8
        _check.array("DenseHead", "h", h, (None, self.weight.shape[1]))
        top_k, top_p = check_settings(temperature, top_k, top_p, self.vocab_size)
        if temperature > 0 and top_k is None and top_p is not None:  # needs all probabilities in order
            return sample_rows(self.distribution(h), rng, temperature, top_k, top_p)
        out = np.empty(len(h), np.int32)
        for n, x in enumerate(h):
            if temperature > 0 and top_k is None:
                out[n] = draw.draw(self._logits(x[None], int8), rng.random(), temperature)
            elif temperature > 0:
                ids, logits = self.top(x, top_k or 1)
                out[n] = ids[draw.draw_sorted(logits, rng.random(), temperature, top_p)]
            else:
                out[n] = self.top(x, 1)[0][0]
        return out
