"""The dense head: softmax(h @ weight.T) fused with its cross-entropy and gradients; the (N, V) logits are never stored.

Rows go by chunks. A chunk's logits live in a scratch buffer of bounded size, by tiles of the vocabulary; every thread
owns a range of tiles. Forward: one GEMM a tile, and while the tile is in cache its row maxima m, the exponentials
e = exp(logit - m) in place of the logits, and their row sums. Merging the tiles' (m, sum) gives the log-sum-exp of a
row. Backward: a tile of probabilities is e * exp(m - lse), so exp is computed once; two more GEMMs give the tile's
rows of dweight, which one thread owns, and the thread's share of dh, reduced in thread order. Three GEMMs in all:
keeping a chunk's logits costs memory traffic of a few percent, recomputing them a fourth GEMM.

    logit = cap(h . weight_v) + log_prior_v,  cap(a) = c tanh(a / c)
    loss  = lse - (1 - s) logit_target - s mean(logit) + z lse**2         s label smoothing, z z-loss

Letters: N rows, V vocabulary, C channels, P threads; J rows of a chunk, L columns of a tile, Q tiles.
Source: the chunked fused loss of Liger-Kernel (arXiv:2410.10989, section 3.2) and the online log-sum-exp of Milakov
& Gimelshein 2018 (arXiv:1805.02867, section 3); the arrangement for CPU caches is our own.
"""

from __future__ import annotations

import itertools
import math

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._blas import gemm_nn, gemm_nt, gemm_tn, sgemm_address
from flashlm_numba.kernels._jit import helper, kernel
from flashlm_numba.kernels._math import exp32, row_max

TILE_COLUMNS = 512
SCRATCH_BYTES = 100 << 20  # of the logits of a chunk: 512 rows of GPT-2's vocabulary; 64 MB, 330 rows, were 5 % slower
MAX_CHUNK = 512  # rows

_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


@helper
def _finish_logits(tile, log_prior, soft_cap):
    """Apply the cap (0: none) to a tile (J, L) of products, in place; with a prior (L,) and no cap, add it too."""
    rows, columns = tile.shape
    if soft_cap > 0:
        for n in range(rows):
            for v in range(columns):
                # tanh(y) = 1 - 2 / (1 + exp(2 y))
                e = exp32(_TWO * tile[n, v] / soft_cap)
                tile[n, v] = soft_cap * (_ONE - _TWO / (_ONE + e))
    elif log_prior.shape[0] > 0:
        for n in range(rows):
            for v in range(columns):
                tile[n, v] += log_prior[v]


@helper
def _tile_statistics(tile, top, total, mean, log_prior, smoothing, soft_cap):
    """Row maxima and sums of exponentials (J,) of a tile (J, L); with smoothing, mean (J,) += row sums of the logits.

    Without a cap the exponentials replace the logits. With one the capped products stay, as the gradient needs them.
    """
    rows, columns = tile.shape
    has_prior = log_prior.shape[0] > 0 and soft_cap > 0  # otherwise it is in the tile already
    for n in range(rows):
        row = tile[n]
        m, s, linear = np.float32(-np.inf), _ZERO, _ZERO
        if has_prior:
            for v in range(columns):
                m = max(m, row[v] + log_prior[v])
            shift = m if m > -np.inf else _ZERO  # a tile of nothing but ruled out tokens sums to zero
            for v in range(columns):
                s += exp32(row[v] + log_prior[v] - shift)
            if smoothing > 0:
                for v in range(columns):
                    linear += row[v] + log_prior[v]
        else:
            m = row_max(row)
            shift = m if m > -np.inf else _ZERO
            if smoothing > 0:
                for v in range(columns):
                    linear += row[v]
            if soft_cap > 0:
                for v in range(columns):
                    s += exp32(row[v] - shift)
            else:
                for v in range(columns):
                    e = exp32(row[v] - shift)
                    row[v] = e
                    s += e
        top[n], total[n] = m, s
        mean[n] += linear


@helper
def _pick_targets(target_logit, tile, targets, first, log_prior, soft_cap):
    """Save the logit of every row whose target lies in the tile, before the exponentials replace it."""
    rows, columns = tile.shape
    for n in range(rows):
        v = targets[n] - first
        if 0 <= v < columns:
            target_logit[n] = tile[n, v]
            if soft_cap > 0 and log_prior.shape[0] > 0:
                target_logit[n] += log_prior[v]


@helper
def _tile_gradient(tile, top, lse, weights, targets, first, vocab, log_prior, smoothing, z_loss, soft_cap):
    """Turn a tile (J, L) from _tile_statistics into the gradient of its logits' products, times the row weights."""
    rows, columns = tile.shape
    for n in range(rows):
        row, w = tile[n], weights[n]
        # forward: loss = lse - (1 - s) logit_target - s mean(logit) + z lse**2
        slope = w * (_ONE + _TWO * z_loss * lse[n])
        spread = w * smoothing / np.float32(vocab)
        at = targets[n] - first
        if soft_cap > 0:
            hit = w * (_ONE - smoothing)
            inverse = _ONE / soft_cap
            target_share = _ZERO
            if 0 <= at < columns:
                target_share = hit * (_ONE - row[at] * inverse * row[at] * inverse)
            for v in range(columns):
                prior = log_prior[v] if log_prior.shape[0] > 0 else _ZERO
                ratio = row[v] * inverse
                row[v] = (slope * exp32(row[v] + prior - lse[n]) - spread) * (_ONE - ratio * ratio)
            if 0 <= at < columns:
                row[at] -= target_share
        else:
            scale = slope * exp32(top[n] - lse[n])
            for v in range(columns):
                row[v] = row[v] * scale - spread
            if 0 <= at < columns:
                row[at] -= w * (_ONE - smoothing)


@kernel
def _chunk_forward(
    loss, nll, lse, tiles, top, total, mean, target_logit,
    h, weight, targets, log_prior, smoothing, z_loss, soft_cap, keep, blas, tile_columns, threads,
):  # fmt: skip
    """loss, nll, lse (J,) of a chunk h (J, C). tiles (Q, J, L) if keep, else (P, J, L): one reused a thread.

    top, total (Q, J), mean (P, J), target_logit (J,): scratch. Parallel over tiles of the vocabulary.
    """
    rows, vocab = h.shape[0], weight.shape[0]
    count = top.shape[0]
    for thread in prange(threads):
        for n in range(rows):
            mean[thread, n] = _ZERO
        for q in range(thread * count // threads, (thread + 1) * count // threads):
            first, last = q * tile_columns, min((q + 1) * tile_columns, vocab)
            slot = q if keep else np.int64(thread)  # a prange index is unsigned; mixed with signed, a float
            flat = tiles[slot].reshape(-1)
            tile = flat[: rows * (last - first)].reshape(rows, last - first)
            prior = log_prior[first:last] if log_prior.shape[0] > 0 else log_prior
            gemm_nt(blas, tile, h, weight[first:last], _ZERO)
            _finish_logits(tile, prior, soft_cap)
            _pick_targets(target_logit, tile, targets, first, prior, soft_cap)
            _tile_statistics(tile, top[q], total[q], mean[thread], prior, smoothing, soft_cap)
    for thread in prange(threads):
        for n in range(thread * rows // threads, (thread + 1) * rows // threads):
            m = np.float32(-np.inf)
            for q in range(count):
                m = max(m, top[q, n])
            s, linear = 0.0, 0.0  # float64: few terms, and the loss is read to many digits
            for q in range(count):
                s += total[q, n] * math.exp(np.float64(top[q, n] - m))
            for other in range(threads):
                linear += mean[other, n]
            value = m + math.log(s)
            lse[n] = value
            nll[n] = value - target_logit[n]
            loss[n] = value - target_logit[n] + z_loss * value * value
            if smoothing > 0:  # otherwise a token that the prior rules out (-inf) would make it NaN
                loss[n] += smoothing * (target_logit[n] - linear / vocab)


@kernel
def _chunk_backward(
    dh, dweight, tiles, partial, top, lse,
    h, weight, targets, weights, log_prior, smoothing, z_loss, soft_cap, blas, tile_columns, threads,
):  # fmt: skip
    """dh (J, C) = and dweight (V, C) +=, from the tiles of _chunk_forward (overwritten); partial (P, J, C): scratch."""
    rows, dim = h.shape
    vocab, count = weight.shape[0], top.shape[0]
    for thread in prange(threads):
        share = partial[thread, :rows]
        for n in range(rows):
            for c in range(dim):
                share[n, c] = _ZERO
        for q in range(thread * count // threads, (thread + 1) * count // threads):
            first, last = q * tile_columns, min((q + 1) * tile_columns, vocab)
            tile = tiles[q].reshape(-1)[: rows * (last - first)].reshape(rows, last - first)
            prior = log_prior[first:last] if log_prior.shape[0] > 0 else log_prior
            _tile_gradient(tile, top[q], lse, weights, targets, first, vocab, prior, smoothing, z_loss, soft_cap)
            gemm_tn(blas, dweight[first:last], tile, h, _ONE)
            gemm_nn(blas, share, tile, weight[first:last], _ONE)
    for n in range(rows):
        for c in range(dim):
            value = partial[0, n, c]
            for thread in range(1, threads):
                value += partial[thread, n, c]
            dh[n, c] = value


class DenseScratch:
    """Bounded scratch for a vocabulary of at most V and rows of C channels; about SCRATCH_BYTES whatever the batch."""

    def __init__(self, vocab: int, dim: int) -> None:
        self.vocab, self.dim = vocab, dim
        self.threads = numba.get_num_threads()
        tiles = -(-vocab // TILE_COLUMNS)
        buffers = max(tiles, self.threads)
        self.chunk = max(1, min(MAX_CHUNK, SCRATCH_BYTES // (4 * buffers * TILE_COLUMNS)))
        self.tiles = np.empty((buffers, self.chunk, TILE_COLUMNS), np.float32)
        self.top = np.empty((tiles, self.chunk), np.float32)
        self.total = np.empty_like(self.top)
        self.mean = np.empty((self.threads, self.chunk), np.float32)
        self.target_logit = np.empty(self.chunk, np.float32)
        self.lse = np.empty(self.chunk, np.float32)
        self.partial = np.empty((self.threads, self.chunk, dim), np.float32)

    def fits(self, vocab: int, dim: int) -> bool:
        """Whether it serves a weight (vocab, dim) at the number of threads in use."""
        return vocab <= self.vocab and dim == self.dim and self.threads == numba.get_num_threads()

    def chunks(self, rows: int) -> list[slice]:
        """Rows in as few chunks as fit, all of about the same size: products of a few left-over rows are slow."""
        count = -(-rows // self.chunk)
        edges = [i * rows // max(count, 1) for i in range(count + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def statistics(self, vocab: int) -> tuple[np.ndarray, np.ndarray]:
        """top, total (Q, J) for the Q tiles of a vocabulary."""
        tiles = -(-vocab // TILE_COLUMNS)
        return self.top[:tiles], self.total[:tiles]


def scratch_for(scratch: DenseScratch | None, vocab: int, dim: int) -> DenseScratch:
    """scratch if it was made for just this at the number of threads in use, else a new one.

    Not a larger one: chunks, and with them the last bits, must not depend on what was computed before.
    """
    if scratch is not None and scratch.vocab == vocab and scratch.fits(vocab, dim):
        return scratch
    return DenseScratch(vocab, dim)


def _checked_scratch(where: str, weight: np.ndarray, scratch: DenseScratch | None) -> DenseScratch:
    if scratch is None:
        return DenseScratch(*weight.shape)
    if not scratch.fits(*weight.shape):
        raise ValueError(
            f"{where}: scratch was made for another vocabulary, width or number of threads, {scratch.vocab} x "
            f"{scratch.dim} on {scratch.threads}, but weight is {weight.shape} on {numba.get_num_threads()}"
        )
    return scratch


def _check_head(
    where: str, h: np.ndarray, weight: np.ndarray, targets: np.ndarray, log_prior: np.ndarray | None
) -> np.ndarray:
    _check.array(where, "weight", weight, (None, None))
    _check.array(where, "h", h, (None, weight.shape[1]))
    _check.array(where, "targets", targets, (h.shape[0],), np.int32)
    _check.indices(where, "targets", targets, weight.shape[0], "check the tokenizer's vocabulary size")
    if log_prior is None:
        return np.empty(0, np.float32)
    _check.array(where, "log_prior", log_prior, (weight.shape[0],))
    return log_prior


def dense_head_forward(
    h: np.ndarray,
    weight: np.ndarray,
    targets: np.ndarray,
    *,
    log_prior: np.ndarray | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    scratch: DenseScratch | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy of softmax(h @ weight.T) against targets, without storing the logits.

    h (N, C), weight (V, C) float32; targets (N,) int32 in [0, V); log_prior (V,) float32 added to the logits.
    Returns loss (N,), with smoothing and z-loss, and nll (N,), plain -log p: float32, nats per row.
    Cost 2*N*V*C flop. Raises ValueError if a shape, a dtype or a target is wrong.

    >>> h, weight = np.zeros((1, 2), np.float32), np.ones((4, 2), np.float32)
    >>> loss, nll = dense_head_forward(h, weight, np.array([3], np.int32))
    >>> round(float(nll[0]), 4)  # ln 4
    1.3863
    """
    prior = _check_head("dense_head_forward", h, weight, targets, log_prior)
    s = _checked_scratch("dense_head_forward", weight, scratch)
    top, total = s.statistics(weight.shape[0])
    loss, nll = np.empty(h.shape[0], np.float32), np.empty(h.shape[0], np.float32)
    for rows in s.chunks(h.shape[0]):
        _chunk_forward(
            loss[rows], nll[rows], s.lse, s.tiles, top, total, s.mean, s.target_logit,
            h[rows], weight, targets[rows], prior, np.float32(label_smoothing), np.float32(z_loss),
            np.float32(soft_cap or 0), False, sgemm_address(), TILE_COLUMNS, s.threads,
        )  # fmt: skip
    return loss, nll


def dense_head_forward_backward(
    h: np.ndarray,
    weight: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    dweight: np.ndarray,
    *,
    log_prior: np.ndarray | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    scratch: DenseScratch | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, plain NLL and the gradients of sum(weights * loss): the forward and backward pass in one.

    h (N, C), weight, dweight (V, C), weights (N,) float32; targets (N,) int32; dweight is added to.
    Per-row weights enter before the sum, so the gradients are those of the weighted loss and of no other function of
    it. Returns loss (N,), nll (N,), dh (N, C). Cost 6*N*V*C flop, exact in float32.
    Raises ValueError if a shape, a dtype or a target is wrong. Source: see the module's docstring.
    """
    where = "dense_head_forward_backward"
    prior = _check_head(where, h, weight, targets, log_prior)
    _check.array(where, "weights", weights, (h.shape[0],))
    _check.array(where, "dweight", dweight, weight.shape)
    s = _checked_scratch(where, weight, scratch)
    smoothing, z, cap = np.float32(label_smoothing), np.float32(z_loss), np.float32(soft_cap or 0)
    top, total = s.statistics(weight.shape[0])
    loss, nll, dh = np.empty(h.shape[0], np.float32), np.empty(h.shape[0], np.float32), np.empty_like(h)
    for rows in s.chunks(h.shape[0]):
        _chunk_forward(
            loss[rows], nll[rows], s.lse, s.tiles, top, total, s.mean, s.target_logit,
            h[rows], weight, targets[rows], prior, smoothing, z, cap, True, sgemm_address(), TILE_COLUMNS, s.threads,
        )  # fmt: skip
        _chunk_backward(
            dh[rows], dweight, s.tiles, s.partial, top, s.lse,
            h[rows], weight, targets[rows], weights[rows], prior, smoothing, z, cap, sgemm_address(), TILE_COLUMNS,
            s.threads,
        )  # fmt: skip
    return loss, nll, dh
