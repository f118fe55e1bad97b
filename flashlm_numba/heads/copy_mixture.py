"""A head mixed with the n-gram copies: the tokens that followed earlier occurrences of the last n tokens.

    p(v) = g_0 p_head(v) + sum over the copies o of g_o [v = copy_o]

The shares g are a softmax over 0, for the head, and the scores of kernels/copy_mixture.py. Where nothing is copied the
head has all. Both parts sum to one, and so does the mixture, whatever the head.
Letters: N positions, O ways of copying, V vocabulary, C channels.
"""

from __future__ import annotations

import numpy as np

from flashlm_numba.heads.base import Head, Part
from flashlm_numba.heads.decisions import Decisions
from flashlm_numba.heads.sampling import check_settings, sample_rows
from flashlm_numba.kernels import _check
from flashlm_numba.kernels.copy_mixture import CopyWeights, copy_scores, copy_scores_backward, copy_shares
from flashlm_numba.kernels.draw import draw_sorted
from flashlm_numba.kernels.tree_draw import CopyModel, draw_row
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
        self._row_of_token = for_reading(row_of_token)

    @property
    def model(self) -> CopyModel:
        """What compiled code computes the shares with."""
        return CopyModel(self._embedding, self._weights)

    def rows(self, copies: np.ndarray) -> np.ndarray:
        """The embedding's rows of the copies, -1 for none."""
        if self._row_of_token is None:
            return copies
        return np.where(copies >= 0, self._row_of_token[copies], np.int32(-1))

    def log_shares(self, h: np.ndarray, copies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ln g (N, O + 1) float64, the head's share first, for h (N, C) and copies (N, O) int32, token ids or -1.

        Also what the backward pass needs.
        """
        adopt_threads()
        scores, matches = copy_scores(h, self._embedding, self.rows(copies), self._weights)
        logs = np.zeros((len(scores), scores.shape[1] + 1))
        logs[:, 1:] = scores
        top = logs.max(1, keepdims=True)  # at least the head's 0
        with _diverged():
            logs -= top + np.log(np.exp(logs - top).sum(1, keepdims=True))
        return logs, matches

    def at(self, x: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """g (O + 1,) float64 of one position, the head's share first, for x (1, C) and copies (1, O) as in log_shares.

        Raises ValueError if they are not finite.
        """
        return copy_shares(x, self._embedding, copies, self._row_of_token, self._weights)

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
            self.rows(copies),
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
        drawing = self.head.drawing(temperature, top_k, top_p, self.shares.model)
        if drawing is not None:
            rows, count = self.shares.rows(self.copies), drawing.uniforms
            drawn = [draw_row(drawing, h[n : n + 1], rows[n], rng.random(count)) for n in range(len(h))]
            return self.head.tokens_of_rows(np.array(drawn, int))
        if temperature != 0 and top_k is None and (temperature != 1 or top_p is not None):
            return sample_rows(self.distribution(h), rng, temperature, top_k, top_p)
        out = np.empty(len(h), np.int32)
        for n in range(len(h)):
            if temperature == 0 or top_k is not None:
                ids, log_p = self._top(h[n : n + 1], n, top_k or 1)
                out[n] = ids[0 if temperature == 0 else draw_sorted(log_p, rng.random(), temperature, top_p)]
            else:
                out[n] = self._draw(h[n : n + 1], n, rng)
        return out

    def _shares_at(self, x: np.ndarray, n: int) -> np.ndarray:
        """The shares (O + 1,) float64 at position n, for its x (1, C)."""
        return self.shares.at(x, self.copies[n : n + 1])

    def _draw(self, x: np.ndarray, n: int, rng: np.random.Generator) -> int:
        """A token of the mixture at position n, for its x (1, C)."""
        bar, chosen = rng.random(), 0
        for share in self._shares_at(x, n).tolist():
            bar -= share
            if bar < 0:
                break
            chosen += 1
        if chosen == 0 or chosen > self.copies.shape[1] or self.copies[n, chosen - 1] < 0:
            return int(self.head.sample(x, rng)[0])
        return int(self.copies[n, chosen - 1])

    def log_prob_of(self, x: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """ln p of some tokens (K,) int32 after one position, (K,) float64, for x (C,)."""
        x = for_reading(x)
        shares = self._shares_at(x[None], 0)
        p = shares[0] * np.exp(self.head.log_prob_of(x, tokens))
        for token, share in zip(self.copies[0], shares[1:], strict=True):
            p[tokens == token] += share  # of no token if nothing is copied
        with np.errstate(divide="ignore"):
            return np.log(p)

    def parts(self, h: np.ndarray, token: int) -> list[Part]:
        """See Head.parts: the head's parts, and the copies."""
        shares, hits = self._shares_at(for_reading(h), 0), self._hits(np.array([token], np.int32))[0]
        copied = float(shares[1:].sum())
        probability = float(shares[1:][hits].sum()) / copied if copied > 0 else 0.0
        own = [part._replace(share=part.share * float(shares[0])) for part in self.head.parts(h, token)]
        return [*own, Part("copies", copied, probability)]

    def top(self, x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The k = min(count, V) likeliest tokens after one position, for x (C,). Returns ids (k,) int32 and ln p (k,)
        float64.

        The likeliest comes first. The result is exact.
        """
        return self._top(for_reading(x)[None], 0, count)

    def decisions(self, x: np.ndarray) -> Decisions:
        """The choice of the token after one position as a sequence of decisions, for x (C,); see Head.decisions."""
        x = for_reading(x)
        return self.head.decisions(x, self.copies[0], self._shares_at(x[None], 0))

    def _top(self, x: np.ndarray, n: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The result of `top` at position n, for its x (1, C)."""
        return self.head.top_mixed(x[0], count, self.copies[n], self._shares_at(x, n))

    def likeliest(self, h: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See Head.likeliest."""
        k = min(count, self.vocab_size)
        ids, log_p = np.empty((len(h), k), np.int32), np.empty((len(h), k))
        for n in range(len(h)):
            ids[n], log_p[n] = self._top(for_reading(h[n : n + 1]), n, count)
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
