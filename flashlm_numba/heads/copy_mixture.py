"""A head mixed with the n-gram copies: the tokens that followed earlier occurrences of the last n tokens.

    p(v) = g_0 p_head(v) + sum over the copies o of g_o [v = copy_o]

The shares g are a softmax over 0, for the head, and the scores of kernels/copy_mixture.py. Where nothing is copied the
head has all. Both parts sum to one, and so does the mixture, whatever the head.
Letters: N positions, O ways of copying, V vocabulary, C channels.
"""

from __future__ import annotations

import numpy as np

from flashlm_numba.heads.base import Head, Part, likeliest_of_logits
from flashlm_numba.heads.sampling import check_settings, sample_rows
from flashlm_numba.kernels import _check
from flashlm_numba.kernels.copy_mixture import CopyWeights, copy_scores, copy_scores_backward
from flashlm_numba.system.arrays import for_reading
from flashlm_numba.system.threads import adopt_threads


class CopyShares:
    """The trained part of the mixture.

    weights, gradients : what the scores are computed with, and its gradients
    embedding, dembedding : (V, C) float32, and its gradient
    row_of_token : (V,) int32: the embedding's row of each token; None if row v belongs to token v
    """

    def __init__(
        self,
        weights: CopyWeights,
        gradients: CopyWeights,
        embedding: np.ndarray,
        dembedding: np.ndarray,
        row_of_token: np.ndarray | None = None,
    ) -> None:
        self._weights, self._embedding = CopyWeights(*map(for_reading, weights)), for_reading(embedding)
        self._gradients, self._dembedding = gradients, dembedding
        self._row_of_token = row_of_token

    def _rows(self, copies: np.ndarray) -> np.ndarray:
        """The embedding's rows of the copies, -1 for none."""
        if self._row_of_token is None:
            return copies
        return np.where(copies >= 0, self._row_of_token[copies], np.int32(-1))

    def log_shares(self, h: np.ndarray, copies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln g (N, O + 1) float64, the head's share first, for h (N, C) and copies (N, O) int32, token ids or -1.

        Also what the backward pass needs.
        """
        adopt_threads()
        scores, matches = copy_scores(h, self._embedding, self._rows(copies), self._weights)
        logs = np.zeros((len(scores), scores.shape[1] + 1))
        logs[:, 1:] = scores
        top = logs.max(1, keepdims=True)  # at least the head's 0
        with _diverged():
            logs -= top + np.log(np.exp(logs - top).sum(1, keepdims=True))
        return logs, matches

    def backward(
        self,
        dscores: np.ndarray,
        matches: np.ndarray,
        h: np.ndarray,
        copies: np.ndarray,
        dh: np.ndarray,
        *,
        accumulate: bool = True,
    ) -> None:
        """Add the gradients for dscores (N, O) to dh (N, C), to the embedding's and to those of the weights.

        accumulate : False replaces those of the weights
        """
        if not accumulate:
            for gradient in self._gradients:
                gradient[...] = 0
        copy_scores_backward(
            dscores.astype(np.float32),
            matches,
            h,
            self._embedding,
            self._rows(copies),
            self._weights,
            dh,
            self._dembedding,
            self._gradients,
        )


class CopyMixture:
    """A head mixed with the copies of N positions. Its methods are those of the head, for h of these positions.

    copies : (N, O) int32: token ids, -1 for none
    """

    def __init__(self, head: Head, shares: CopyShares, copies: np.ndarray) -> None:
        self.head, self.shares, self.copies = head, shares, copies
        self.vocab_size = head.vocab_size
        self.has_search = head.has_search

    def _hits(self, targets: np.ndarray) -> np.ndarray:
        """Whether each copy is the target, (N, O) bool, for token ids (N,)."""
        targets = for_reading(targets)
        _check.array("CopyMixture", "targets", targets, (len(self.copies),), np.int32)
        _check.indices("CopyMixture", "targets", targets, self.vocab_size, "check the tokenizer's vocabulary size")
        return self.copies == targets[:, None]

    def _log_shares(self, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(h) != len(self.copies):
            raise ValueError(f"CopyMixture: h must have a row per position, {len(self.copies)}, got {len(h)}")
        return self.shares.log_shares(h, self.copies)

    def log_prob(self, h: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """ln p(target), (N,) float64."""
        h, hits = for_reading(h), self._hits(targets)
        logs, _ = self._log_shares(h)
        own = logs[:, 0] + self.head.log_prob(h, targets)
        return _log_add(own, _log_sum(logs[:, 1:], hits))

    def training_log_prob(self, h: np.ndarray, targets: np.ndarray, at: np.ndarray) -> np.ndarray:
        """See Head.training_log_prob."""
        part = CopyMixture(self.head, self.shares, self.copies[at])
        logs, _ = part._log_shares(np.ascontiguousarray(h[at]))
        own = logs[:, 0] + self.head.training_log_prob(h, targets, at)
        return _log_add(own, _log_sum(logs[:, 1:], part._hits(targets[at])))

    def forward_backward(
        self, h: np.ndarray, targets: np.ndarray, weights: np.ndarray, *, accumulate: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Head.forward_backward for the mixture: loss (N,), nll (N,), dh (N, C), and all gradients.

            d(-ln p) / d(ln p_head) = -r_0,   d(-ln p) / d(s_o) = g_o - r_o
            r_0 = g_0 p_head(w) / p(w),       r_o = g_o [w = copy_o] / p(w)

        The head's gradient is that of its own loss times r_0, its part of the target's probability. Where no copy is
        the target, r_0 = 1; elsewhere p_head(w) must be known before its backward pass. The head's other terms, such as
        label smoothing, count r_0 times too.
        """
        h, weights, hits = for_reading(h), for_reading(weights), self._hits(targets)
        logs, matches = self._log_shares(h)
        copied = _log_sum(logs[:, 1:], hits)
        hit = np.flatnonzero(hits.any(1))
        part = np.ones(len(h))
        if len(hit):
            own = logs[hit, 0] + self.head.training_log_prob(h, targets, hit)
            part[hit] = np.exp(own - _log_add(own, copied[hit]))
        loss, plain, dh = self.head.forward_backward(
            h, targets, (weights * part).astype(np.float32), accumulate=accumulate
        )
        nll = -_log_add(logs[:, 0] - plain, copied)
        found = np.exp(np.where(hits, logs[:, 1:] + nll[:, None], -np.inf))
        dscores = weights[:, None] * (np.exp(logs[:, 1:]) - found)
        self.shares.backward(dscores, matches, h, self.copies, dh, accumulate=accumulate)
        return (nll + part * (loss - plain)).astype(np.float32), nll.astype(np.float32), dh

    def distribution(self, h: np.ndarray) -> np.ndarray:
        """Probabilities of all tokens, (N, V) float32, columns by token id."""
        h = for_reading(h)
        shares = np.exp(self._log_shares(h)[0])
        p = self.head.distribution(h) * shares[:, :1].astype(np.float32)
        for o in range(self.copies.shape[1]):  # one at a time, since copies may be the same token
            found = np.flatnonzero(self.copies[:, o] >= 0)
            p[found, self.copies[found, o]] += shares[found, o + 1].astype(np.float32)
        return p

    def logits(self, h: np.ndarray) -> np.ndarray:
        """ln of the distribution (N, V) float32; a probability that underflowed counts as the smallest float32."""
        p = self.distribution(h)
        return np.log(np.maximum(p, np.float32(1e-45), out=p), out=p)

    def sample(
        self,
        h: np.ndarray,
        rng: np.random.Generator,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> np.ndarray:
        """Sample one token id per row, (N,) int32, applying temperature, then top-k, then top-p.

        Without them it draws the head or a copy first. With top-k, and at temperature 0, it looks at the head's
        likeliest tokens and the copies. All other settings use all V probabilities.
        """
        top_k, top_p = check_settings(temperature, top_k, top_p, self.vocab_size)
        h, temperature = for_reading(h), float(temperature)
        if temperature != 0 and top_k is None and (temperature != 1 or top_p is not None):
            return sample_rows(self.distribution(h), rng, temperature, top_k, top_p)
        out = np.empty(len(h), np.int32)
        for n in range(len(h)):
            here = CopyMixture(self.head, self.shares, self.copies[n : n + 1])
            if temperature == 0 or top_k is not None:
                ids, log_p = here.top(h[n], top_k or 1)
                out[n] = ids[sample_rows(np.exp(log_p)[None], rng, temperature, None, top_p)[0]]
            else:
                out[n] = here._draw(h[n : n + 1], rng)
        return out

    def _draw(self, h: np.ndarray, rng: np.random.Generator) -> int:
        """A token of the mixture after one position."""
        shares = np.exp(self._log_shares(h)[0][0])
        if not np.isfinite(shares).all():
            raise ValueError("CopyMixture: h must be finite to sample from it")
        chosen = int(np.searchsorted(np.cumsum(shares), rng.random() * shares.sum(), side="right"))
        if chosen == 0 or chosen > self.copies.shape[1] or self.copies[0, chosen - 1] < 0:
            return int(self.head.sample(h, rng)[0])
        return int(self.copies[0, chosen - 1])

    def log_prob_of(self, x: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """ln p of some tokens (K,) int32 after one position, (K,) float64, for x (C,)."""
        p = np.exp(self.head.log_prob_of(x, tokens))
        with np.errstate(divide="ignore"):
            return np.log(self._mixed(for_reading(x)[None], tokens, p))

    def parts(self, h: np.ndarray, token: int) -> list[Part]:
        """See Head.parts: the head's parts, and the copies."""
        shares = np.exp(self._log_shares(for_reading(h))[0][0])
        hits, copied = self._hits(np.array([token], np.int32))[0], float(shares[1:].sum())
        probability = float(shares[1:][hits].sum()) / copied if copied > 0 else 0.0
        own = [part._replace(share=part.share * float(shares[0])) for part in self.head.parts(h, token)]
        return [*own, Part("copies", copied, probability)]

    def _mixed(self, h: np.ndarray, ids: np.ndarray, p: np.ndarray) -> np.ndarray:
        """p of some different tokens after one position, from the head's p of them (K,) float64, which is changed."""
        shares = np.exp(self._log_shares(h)[0][0])
        p *= shares[0]
        for token, share in zip(self.copies[0], shares[1:], strict=True):
            p[ids == token] += share  # of no token if nothing is copied
        return p

    def top(self, x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The k = min(count, V) likeliest tokens after one position, for x (C,). Returns ids (k,) int32 and ln p (k,)
        float64.

        The likeliest comes first, of equal ones the smaller id. The result is exact.
        """
        h, count = for_reading(x)[None], min(count, self.vocab_size)
        # a mixture's likeliest tokens are among the head's and the copies
        if self.has_search:
            ids, log_p = self.head.top(x, count)
        else:
            logits = self.head.logits(h)
            (ids,), (log_p,) = likeliest_of_logits(logits, count)
        found = set(ids.tolist())
        more = np.array([token for token in {*self.copies[0].tolist()} if token >= 0 and token not in found], np.int32)
        if len(more):
            if self.has_search:
                own = self.head.log_prob_of(x, more)
            else:
                own = logits[0, more] - (logits[0, ids[0]] - log_p[0])
            ids, log_p = np.concatenate([ids, more]), np.concatenate([log_p, own])
        p = self._mixed(h, ids, np.exp(log_p))
        if not np.isfinite(p).all():
            raise ValueError("CopyMixture: the probabilities must be finite to find the largest")
        order = np.lexsort((ids, -p))[:count]
        with np.errstate(divide="ignore"):
            return ids[order], np.log(p[order])

    def likeliest(self, h: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See Head.likeliest."""
        k = min(count, self.vocab_size)
        ids, log_p = np.empty((len(h), k), np.int32), np.empty((len(h), k))
        for n in range(len(h)):
            here = CopyMixture(self.head, self.shares, self.copies[n : n + 1])
            ids[n], log_p[n] = here.top(h[n], count)
        return ids, log_p


def _diverged() -> np.errstate:
    """Where training has diverged, infinite numbers become NaN without a warning; the training loop reports them."""
    return np.errstate(invalid="ignore")


def _log_add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """ln(exp(a) + exp(b))."""
    with _diverged():
        return np.logaddexp(a, b)


def _log_sum(logs: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """ln of the sum of exp(logs) (N, O) over what is chosen (N, O) bool; -inf for nothing."""
    with np.errstate(divide="ignore"):
        return np.log(np.where(chosen, np.exp(logs), 0).sum(1))
