"""A head mixed with what a memory expects after one text: what generation samples from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flashlm_numba.heads.base import Part
from flashlm_numba.heads.decisions import Decisions, OneDecision
from flashlm_numba.heads.sampling import check_settings, sample_rows
from flashlm_numba.memory.gate import Gate

if TYPE_CHECKING:
    from flashlm_numba.heads.base import Head
    from flashlm_numba.heads.copy_mixture import CopyMixture
    from flashlm_numba.kernels.ngrams import NgramModel


class MixedHead:
    """The mixture after a text: the methods of a head that generation calls, for its hidden state h (1, C).

    ids : the text
    """

    def __init__(self, head: Head | CopyMixture, gate: Gate, ngrams: NgramModel, ids: np.ndarray) -> None:
        self.head, self.gate, self.ngrams, self.ids = head, gate, ngrams, ids
        self.vocab_size = head.vocab_size
        self._class = np.array([ngrams.context_class(ids)])

    def share(self, h: np.ndarray) -> float:
        """The memory's share of the mixture."""
        return float(1 / (1 + np.exp(-self.gate.logit(h, self._class)[0])))

    def distribution(self, h: np.ndarray) -> np.ndarray:
        """Probabilities of all tokens, (1, V) float32."""
        share = np.float32(self.share(h))
        return share * self.ngrams.distribution(self.ids)[None] + (1 - share) * self.head.distribution(h)

    def decisions(self, x: np.ndarray) -> Decisions:
        """The choice of the token for one x (C,) as a sequence of decisions: one, among all tokens."""
        return OneDecision(self.distribution(x[None])[0])

    def log_prob(self, h: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Natural logarithm of a target's probability, (1,) float64, for targets (1,) int32."""
        share = self.share(h)
        known = self.ngrams.distribution(self.ids)[targets].astype(np.float64)
        with np.errstate(divide="ignore"):
            return np.log(share * known + (1 - share) * np.exp(self.head.log_prob(h, targets).astype(np.float64)))

    def log_prob_of(self, x: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """ln p of some tokens (K,) int32 for one x (C,), (K,) float64."""
        share = self.share(x[None])
        known = self.ngrams.distribution(self.ids)[tokens].astype(np.float64)
        with np.errstate(divide="ignore"):
            return np.log(share * known + (1 - share) * np.exp(self.head.log_prob_of(x, tokens)))

    def likeliest(self, h: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See Head.likeliest."""
        ids, p = self.top(h[0], count)
        with np.errstate(divide="ignore"):
            return ids[None], np.log(p)[None]

    def parts(self, h: np.ndarray, token: int) -> list[Part]:
        """See Head.parts: the parts of what the memory is mixed with, and the memory."""
        share = self.share(h)
        own = [part._replace(share=part.share * (1 - share)) for part in self.head.parts(h, token)]
        return [*own, Part("memory", share, float(self.ngrams.distribution(self.ids)[token]))]

    def sample(
        self,
        h: np.ndarray,
        rng: np.random.Generator,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> np.ndarray:
        """Sample a token id, (1,) int32, applying temperature, then top-k, then top-p.

        Without them it draws the memory or the head first, and then from that. With top-k, and at temperature 0, it
        looks at the likeliest tokens of both. All other settings use all V probabilities.
        """
        top_k, top_p = check_settings(temperature, top_k, top_p, self.vocab_size)
        if temperature == 1 and top_k is None and top_p is None:
            if rng.random() < self.share(h):
                return np.array([self.ngrams.draw(self.ids, rng.random())], np.int32)
            return self.head.sample(h, rng)
        if temperature != 0 and top_k is None:
            return sample_rows(self.distribution(h), rng, temperature, top_k, top_p)
        ids, p = self.top(h[0], top_k or 1)
        return ids[sample_rows(p[None], rng, temperature, None, top_p)]

    def top(self, x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The k = min(count, V) likeliest tokens for one x (C,). Returns ids (k,) int32 and p (k,) float64.

        The likeliest comes first, of equal ones the smaller id. The result is exact.
        """
        count = min(count, self.vocab_size)
        if self.head.has_search:
            ids, p = self._candidates(x[None], count)
        else:  # a softmax needs the logits of all tokens in any case
            ids, p = np.arange(self.vocab_size), self.distribution(x[None])[0].astype(np.float64)
        order = np.lexsort((ids, -p))[:count]
        return ids[order].astype(np.int32), p[order]

    def _candidates(self, h: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, among them the `count` likeliest, and their probabilities.

        The head's m likeliest tokens bound its probability of all others. Of these only those are computed that the
        memory could lift among the likeliest; if they are many, with a larger m.
        """
        share, m = self.share(h), max(2 * count, 32)
        known = share * self.ngrams.distribution(self.ids).astype(np.float64)
        while True:
            ids, log_p = self.head.top(h[0], m)
            p = (1 - share) * np.exp(log_p) + known[ids]
            if len(ids) == self.vocab_size:
                return ids, p
            reach = known + (1 - share) * np.exp(log_p[-1])
            reach[ids] = -1
            more = np.flatnonzero(reach >= np.partition(p, -count)[-count]).astype(np.int32)
            if len(more) <= 2 * m:
                own = np.exp(self.head.log_prob_of(h[0], more))
                return np.concatenate([ids, more]), np.concatenate([p, (1 - share) * own + known[more]])
            m *= 8
