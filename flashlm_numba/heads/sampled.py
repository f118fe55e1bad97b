"""The sampled head: in training, a softmax over the targets and a few thousand sampled tokens.

    log Z  is replaced by  log sum over the candidates v of  exp(l_v) / pi_v

pi_v is the probability that v is a candidate. It is 1 for the batch's targets. The other candidates are sampled without
replacement, frequent tokens more often, and are the same for all positions. The sum is then unbiased (Horvitz &
Thompson 1952, JASA 47, eq. 6). Its logarithm, the loss, reads low (Jensen), and the gradient has a bias that shrinks
with the number of candidates. The final steps of training and every evaluation therefore use the full softmax.
One candidate set per batch is also used by modded-nanogpt's pull request 360, which has no correction. The sampling
method is systematic sampling (Madow 1949, Annals of Mathematical Statistics 20).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flashlm_numba.heads.base import check_targets, loss_options
from flashlm_numba.heads.config import HeadConfig
from flashlm_numba.heads.dense import DenseHead
from flashlm_numba.kernels import dense_head as kernels
from flashlm_numba.kernels.embedding import embedding_backward, embedding_forward, zero
from flashlm_numba.system.arrays import for_reading
from flashlm_numba.system.threads import adopt_threads

__all__ = ["SampledHead", "draw", "inclusion_probabilities"]


def inclusion_probabilities(sizes: np.ndarray, count: int) -> np.ndarray:
    """Probabilities (n,) float64 that sum to count, proportional to sizes but at most 1.

    sizes : (n,), positive. Raises ValueError unless 0 <= count <= n.

    >>> inclusion_probabilities(np.array([8.0, 1, 1, 2]), 2).tolist()
    [1.0, 0.25, 0.25, 0.5]
    """
    if not 0 <= count <= len(sizes):
        raise ValueError(f"inclusion_probabilities: count must be between 0 and {len(sizes)}, got {count}")
    p = np.zeros(len(sizes))
    sure = np.zeros(len(sizes), bool)
    while (left := count - int(sure.sum())) > 0:
        p = np.where(sure, 1.0, sizes * (left / sizes[~sure].sum()))
        above = (p >= 1) & ~sure
        if not above.any():
            return p
        sure |= above
    return np.where(sure, 1.0, 0.0)


def draw(probabilities: np.ndarray, uniform: float) -> np.ndarray:
    """Distinct indices, ascending, by systematic sampling; index i is included with exactly probabilities[i].

    probabilities : (n,) float64 in [0, 1]; their sum must be an integer, which is the number of indices
    uniform : random number in [0, 1) that determines the sample
    Neighbouring items are seldom sampled together, so an order by frequency stratifies the sample.

    >>> draw(np.array([0.5, 0.5, 0.25, 0.75]), 0.6).tolist()
    [1, 3]
    """
    until = np.cumsum(probabilities)
    count = round(until[-1]) if len(until) else 0
    number = np.arange(count)
    points = number + np.floor(uniform * 2**30) / 2**30  # exact sums, so that no point rounds up to the next
    found = np.searchsorted(until, points, side="right")
    # the cumulative sum is rounded too; if two points fall into one item, the second takes the next item
    return np.minimum(np.maximum.accumulate(found - number) + number, len(until) - count + number)


class SampledHead(DenseHead):
    """The dense head with a training loss over sampled candidates. Everything else is as in DenseHead.

    counts : (V,) token counts; tokens other than the targets are sampled in proportion to counts + 1
    candidates : tokens in a batch's softmax, targets included; at least half of them, or all remaining, are sampled
    The other arguments are those of DenseHead. Call `begin` before every forward_backward. Label smoothing is uniform
    over the candidates, and z-loss uses the estimated log Z.
    Raises ValueError if a shape, a dtype or a number is wrong.
    """

    name = "sampled"
    own_settings = ("num_sampled", "full_softmax_ratio")

    def __init__(
        self,
        weight: np.ndarray,
        dweight: np.ndarray | None = None,
        *,
        counts: np.ndarray,
        candidates: int,
        **options: Any,
    ) -> None:
        super().__init__(weight, dweight, **options)
        counts = np.asarray(counts)
        if counts.shape != (self.vocab_size,) or not np.isfinite(counts).all() or (counts < 0).any():
            raise ValueError(f"SampledHead: counts must be {self.vocab_size} non-negative numbers, got {counts.shape}")
        if candidates != int(candidates) or candidates < 1:
            raise ValueError(f"SampledHead: candidates must be a whole number of at least 1, got {candidates}")
        self.candidates = candidates
        self._by_frequency = np.argsort(-counts, kind="stable")
        self._sizes = counts[self._by_frequency].astype(np.float64) + 1
        self._uniform: float | None = 0.5
        self._few: kernels.DenseScratch | None = None  # scratch of forward_backward

    @classmethod
    def full_ratio(cls, settings: HeadConfig) -> float:
        """The final share of the steps, which uses the softmax over all tokens."""
        return settings.full_softmax_ratio

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
        """See Head.from_settings. Without counts, which only training needs, this returns a dense head."""
        options = loss_options(settings, constants)
        if counts is None:
            return DenseHead(weight, dweight, **options)
        return SampledHead(weight, dweight, counts=counts, candidates=settings.num_sampled, **options)

    def begin(self, rng: np.random.Generator, *, full: bool) -> None:
        """Choose the sample of the next forward_backward. full : use the softmax over all tokens instead

        Raises RuntimeError while another thread is in forward_backward.
        """
        with self._training.alone():
            self._uniform = None if full else float(rng.random())

    def _others(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distinct targets, ascending; the other tokens, most frequent first; and their inclusion probabilities."""
        is_target = np.zeros(self.vocab_size, bool)
        is_target[targets] = True
        other = ~is_target[self._by_frequency]
        distinct = np.flatnonzero(is_target)
        count = min(int(other.sum()), max(self.candidates - len(distinct), self.candidates // 2))
        return distinct, self._by_frequency[other], inclusion_probabilities(self._sizes[other], count)

    def choose(self, targets: np.ndarray, uniform: float) -> tuple[np.ndarray, np.ndarray]:
        """Candidate ids (P,) int32, ascending, including all targets (N,); and their probabilities (P,) float64."""
        distinct, others, p = self._others(targets)
        drawn = draw(p, uniform)
        ids = np.concatenate([distinct, others[drawn]])
        order = np.argsort(ids)
        return ids[order].astype(np.int32), np.concatenate([np.ones(len(distinct)), p[drawn]])[order]

    def forward_backward(
        self, h: np.ndarray, targets: np.ndarray, weights: np.ndarray, *, accumulate: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns loss (N,), nll (N,), dh (N, C) of the softmax over candidates, and adds its gradient to dweight.

        h (N, C), weights (N,) float32; targets (N,) int32
        accumulate : False replaces the previous gradient
        loss and nll read low, because the sum over all tokens is larger.
        Raises RuntimeError if another thread is in forward_backward of this head.
        """
        if self._uniform is None:
            return super().forward_backward(h, targets, weights, accumulate=accumulate)
        h, targets, weights = for_reading(h), for_reading(targets), for_reading(weights)
        check_targets("SampledHead", targets, self.vocab_size)
        adopt_threads()
        with self._training.alone():
            return self._sampled(h, targets, weights, accumulate, self._uniform)

    def training_log_prob(self, h: np.ndarray, targets: np.ndarray, at: np.ndarray) -> np.ndarray:
        """See Head.training_log_prob: by the candidates, except where forward_backward uses all tokens."""
        if self._uniform is None:
            return super().training_log_prob(h, targets, at)
        targets = for_reading(targets)
        check_targets("SampledHead", targets, self.vocab_size)
        adopt_threads()
        ids, rows, correction = self._candidate_rows(targets, self._uniform)
        _, nll = kernels.dense_head_forward(
            np.ascontiguousarray(h[at]),
            rows,
            np.searchsorted(ids, targets[at]).astype(np.int32),
            log_prior=correction,
            soft_cap=self.settings["soft_cap"],
        )
        return -nll

    def _candidate_rows(self, targets: np.ndarray, uniform: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, rows and the addition to the logits of the candidates that `uniform` determines."""
        ids, p = self.choose(targets, uniform)
        correction = -np.log(p).astype(np.float32)
        if self.log_prior is not None:
            correction += self.log_prior[ids]
        return ids, embedding_forward(self._weight, ids), correction

    def _sampled(
        self, h: np.ndarray, targets: np.ndarray, weights: np.ndarray, accumulate: bool, uniform: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """forward_backward over the candidates that `uniform` determines."""
        if not accumulate:
            zero(self.dweight)
        ids, rows, correction = self._candidate_rows(targets, uniform)
        drows = np.zeros_like(rows)
        most = max(self.candidates, min(len(h), self.vocab_size) + self.candidates // 2)
        self._few = kernels.scratch_for(self._few, max(most, len(ids)), rows.shape[1])
        loss, nll, dh = kernels.dense_head_forward_backward(
            h,
            rows,
            np.searchsorted(ids, targets).astype(np.int32),
            weights,
            drows,
            log_prior=correction,
            scratch=self._few,
            **self.settings,
        )
        embedding_backward(self.dweight, drows, ids)
        return loss, nll, dh
