"""Shares of the n-gram copies in a mixture with a head: the scores of every copy, and their gradients.

ngram_copy.py finds the tokens that followed earlier occurrences of the last n tokens. In the mixture

    p(v) = g_0 p_head(v) + sum over the copies o of g_o [v = copy_o]

the shares g are a softmax over 0, for the head, and a score for every copy that was found:

    s_o = bias_o + (hidden_o . h + match_o h . E[copy_o]) / sqrt(C)

Letters: N positions, O ways of copying, V vocabulary, C channels, P threads.
Source: See et al. 2017, arXiv:1704.04368 (pointer-generator networks), and Merity et al. 2016, arXiv:1609.07843 (one
softmax over the shares), with the n-gram copies in the place of attention.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel

FEW = 32  # positions up to which one thread computes the scores

_ZERO = np.float32(0)
_IN_ORDER = np.empty(0, np.int32)  # for row_of_token where row v belongs to token v


class CopyWeights(NamedTuple):
    """What the scores are computed with, or its gradients."""

    bias: np.ndarray  # (O,)
    hidden: np.ndarray  # (O, C)
    match: np.ndarray  # (O,)


@helper
def _dot(a, b):
    total = _ZERO
    for c in range(a.shape[0]):
        total += a[c] * b[c]
    return total


@helper
def _score_rows(scores, matches, h, embedding, copies, weights, scale):
    """scores and matches (M, O) for h (M, C) and copies (M, O)."""
    for n in range(h.shape[0]):
        for o in range(copies.shape[1]):
            row = copies[n, o]
            if row < 0:
                scores[n, o], matches[n, o] = np.float32(-np.inf), _ZERO
                continue
            match = _dot(h[n], embedding[row]) * scale
            matches[n, o] = match
            scores[n, o] = weights.bias[o] + _dot(h[n], weights.hidden[o]) * scale + weights.match[o] * match


@kernel
def _copy_scores(scores, matches, h, embedding, copies, weights, scale, threads):
    for index in prange(threads):
        thread = np.int64(index)
        low, high = thread * h.shape[0] // threads, (thread + 1) * h.shape[0] // threads
        _score_rows(scores[low:high], matches[low:high], h[low:high], embedding, copies[low:high], weights, scale)


@serial_kernel
def _few_copy_scores(scores, matches, h, embedding, copies, weights, scale):
    _score_rows(scores, matches, h, embedding, copies, weights, scale)


@helper
def _backward_columns(low, high, dh, dembedding, dhidden, dscores, h, embedding, copies, weights, scale):
    """Add to the columns low..high of all gradients."""
    for n in range(h.shape[0]):
        for o in range(copies.shape[1]):
            row, factor = copies[n, o], dscores[n, o] * scale
            if row < 0:
                continue
            # forward: s = bias + (hidden . h + match h . E[row]) * scale
            x, dx = h[n, low:high], dh[n, low:high]
            e, de = embedding[row, low:high], dembedding[row, low:high]
            hidden, dweight = weights.hidden[o, low:high], dhidden[o, low:high]
            matched = factor * weights.match[o]
            for c in range(high - low):
                dx[c] += factor * hidden[c] + matched * e[c]
                dweight[c] += factor * x[c]
                de[c] += matched * x[c]


@kernel
def _copy_scores_backward(dh, dembedding, dhidden, dscores, h, embedding, copies, weights, scale, threads):
    # a thread owns a range of columns, as in embedding.py
    for index in prange(threads):
        thread, dim = np.int64(index), h.shape[1]
        low, high = thread * dim // threads, (thread + 1) * dim // threads
        _backward_columns(low, high, dh, dembedding, dhidden, dscores, h, embedding, copies, weights, scale)


@helper
def shares_at(shares, scores, matches, x, embedding, rows, weights, scale):
    """shares (O + 1,) float64 after one position, for its x (1, C) and copied rows (1, O); False if they are no
    distribution. Scratch: scores, matches (1, O).
    """
    _score_rows(scores, matches, x, embedding, rows, weights, scale)
    top = 0.0  # the head's
    for o in range(rows.shape[1]):
        top = max(top, np.float64(scores[0, o]))
    shares[0] = math.exp(-top)
    total = shares[0]
    for o in range(rows.shape[1]):
        shares[o + 1] = math.exp(np.float64(scores[0, o]) - top)
        total += shares[o + 1]
    for o in range(shares.shape[0]):
        shares[o] /= total
    return total < np.inf  # not if it is NaN


@serial_kernel
def _copy_shares(shares, scores, matches, rows, x, embedding, copies, row_of_token, bias, hidden, match, scale):
    """See shares_at, for token ids copies (1, O). Scratch: scores, matches, rows (1, O).

    The weights come one by one, since a NamedTuple costs more at every call than this takes.
    """
    for o in range(copies.shape[1]):
        token = copies[0, o]
        if token >= embedding.shape[0]:
            return False
        rows[0, o] = token if token < 0 or row_of_token.shape[0] == 0 else row_of_token[token]
    return shares_at(shares, scores, matches, x, embedding, rows, CopyWeights(bias, hidden, match), scale)


def _check_inputs(
    where: str, h: np.ndarray, embedding: np.ndarray, copies: np.ndarray, weights: CopyWeights
) -> np.float32:
    """Raise ValueError unless the arrays fit together; returns the scale."""
    _check.array(where, "embedding", embedding, (None, None))
    _check.array(where, "h", h, (None, embedding.shape[1]))
    _check.array(where, "copies", copies, (len(h), None), np.int32)
    ways = copies.shape[1]
    for name, value, shape in zip(weights._fields, weights, ((ways,), (ways, h.shape[1]), (ways,)), strict=True):
        _check.array(where, name, value, shape)
    if copies.size and not -1 <= copies.min() <= copies.max() < len(embedding):
        raise ValueError(f"{where}: copies must be in [-1, {len(embedding)}), got {copies.min()} to {copies.max()}")
    return np.float32(1 / math.sqrt(h.shape[1]))


def copy_scores(
    h: np.ndarray, embedding: np.ndarray, copies: np.ndarray, weights: CopyWeights
) -> tuple[np.ndarray, np.ndarray]:
    """The scores of the copies (N, O), -inf where nothing is copied, and h . E[copy] / sqrt(C) for the backward pass.

    h (N, C), embedding (V, C) float32;  copies (N, O) int32: rows of the embedding, -1 for none
    A position's scores do not depend on the other positions. Cost 4*C flop per copy.
    Raises ValueError if a shape, a dtype or a row is wrong.

    >>> weights = CopyWeights(*(np.ones(shape, np.float32) for shape in ((2,), (2, 4), (2,))))
    >>> h, embedding = np.ones((1, 4), np.float32), np.eye(4, dtype=np.float32)
    >>> copy_scores(h, embedding, np.array([[3, -1]], np.int32), weights)[0].tolist()  # 1 + (4 + 1) / 2
    [[3.5, -inf]]
    """
    scale = _check_inputs("copy_scores", h, embedding, copies, weights)
    scores, matches = np.empty(copies.shape, np.float32), np.empty(copies.shape, np.float32)
    if len(h) <= FEW:  # a token that is decoded must not wait for threads to wake
        _few_copy_scores(scores, matches, h, embedding, copies, weights, scale)
    else:
        _copy_scores(scores, matches, h, embedding, copies, weights, scale, numba.get_num_threads())
    return scores, matches


def copy_shares(
    x: np.ndarray, embedding: np.ndarray, copies: np.ndarray, row_of_token: np.ndarray | None, weights: CopyWeights
) -> np.ndarray:
    """The shares g (O + 1,) float64 after one position, the head's first, with one thread; they sum to one.

    x (1, C) float32;  embedding, weights : as in copy_scores;  copies (1, O) int32: token ids, -1 for none
    row_of_token : (V,) int32, the embedding's row of each token; None if row v belongs to token v
    Raises ValueError if a shape, a dtype or a token is wrong, or if a score is not finite.

    >>> weights = CopyWeights(*(np.zeros(shape, np.float32) for shape in ((2,), (2, 4), (2,))))
    >>> x, embedding = np.ones((1, 4), np.float32), np.eye(4, dtype=np.float32)
    >>> copy_shares(x, embedding, np.array([[3, -1]], np.int32), None, weights).tolist()
    [0.5, 0.5, 0.0]
    """
    where, dim, ways = "copy_shares", embedding.shape[-1], len(weights.bias)
    _check.array(where, "embedding", embedding, (None, dim))
    _check.array(where, "x", x, (1, dim))
    _check.array(where, "copies", copies, (1, ways), np.int32)
    shares, scratch, rows = np.empty(ways + 1), np.empty((2, 1, ways), np.float32), np.empty((1, ways), np.int32)
    order = _IN_ORDER if row_of_token is None else row_of_token
    scale = np.float32(1 / math.sqrt(dim))
    if not _copy_shares(shares, scratch[0], scratch[1], rows, x, embedding, copies, order, *weights, scale):
        raise ValueError(f"copy_shares: copies must be below {len(embedding)} and the scores finite, got {copies}")
    return shares


def copy_scores_backward(
    dscores: np.ndarray,
    matches: np.ndarray,
    h: np.ndarray,
    embedding: np.ndarray,
    copies: np.ndarray,
    weights: CopyWeights,
    dh: np.ndarray,
    dembedding: np.ndarray,
    dweights: CopyWeights,
) -> None:
    """Add the gradients for dscores (N, O) float32 to dh (N, C), dembedding (V, C) and dweights.

    matches : from copy_scores. The bits do not depend on the number of threads.
    Raises ValueError if a shape, a dtype or a row is wrong.
    """
    where = "copy_scores_backward"
    scale = _check_inputs(where, h, embedding, copies, weights)
    for name, value, shape in (
        ("dscores", dscores, copies.shape),
        ("matches", matches, copies.shape),
        ("dh", dh, h.shape),
        ("dembedding", dembedding, embedding.shape),
        *(
            (f"d{name}", value, like.shape)
            for name, value, like in zip(weights._fields, dweights, weights, strict=True)
        ),
    ):
        _check.array(where, name, value, shape)
    found = np.where(copies >= 0, dscores, _ZERO)
    dweights.bias[...] += found.sum(0)
    dweights.match[...] += (found * matches).sum(0)
    threads = numba.get_num_threads()
    _copy_scores_backward(dh, dembedding, dweights.hidden, dscores, h, embedding, copies, weights, scale, threads)
