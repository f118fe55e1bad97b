"""The dense head: softmax(h @ weight.T) fused with its cross-entropy and gradients; the (N, V) logits are never stored.

Rows are processed in chunks. A chunk's logits are stored in scratch of bounded size, in tiles of the vocabulary, and
each thread has a range of tiles. The forward pass runs one GEMM per tile. While the tile is in cache, it computes the
row maxima m, replaces the logits by the exponentials e = exp(logit - m), and sums them per row. Merging the (m, sum) of
all tiles gives the log-sum-exp of a row. In the backward pass a tile of probabilities is e * exp(m - lse), so exp is
computed only once. Two more GEMMs give the tile's rows of dweight, written by one thread, and the thread's share of dh,
reduced in thread order. This takes three GEMMs. Storing a chunk's logits costs a few percent in memory traffic, while
recomputing them would cost a fourth GEMM.

    logit = cap(h . weight_v) + log_prior_v,  cap(a) = c tanh(a / c)
    loss  = lse - (1 - s) logit_target - s mean(logit) + z lse**2         s label smoothing, z z-loss

Letters: N rows, V vocabulary, C channels, P threads; J rows of a chunk, L columns of a tile, Q tiles.
Source: the chunked fused loss of Liger-Kernel (arXiv:2410.10989, section 3.2) and the online log-sum-exp of Milakov
& Gimelshein 2018 (arXiv:1805.02867, section 3); the arrangement for CPU caches is this project's.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._blas import gemm_nn, gemm_nt, gemm_tn, sgemm_address
from flashlm_numba.kernels._jit import helper, kernel, view
from flashlm_numba.kernels._math import exp32, row_max
from flashlm_numba.kernels._rows import clear_rows

TILE_COLUMNS = 512
SCRATCH_BYTES = 100 << 20  # of the logits of a chunk: 512 rows of GPT-2's vocabulary; 64 MB, 330 rows, were 5 % slower
MAX_CHUNK = 512  # rows

_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


class Projection(NamedTuple):
    """The parameters that turn h into logits."""

    weight: np.ndarray  # (V, C)
    log_prior: np.ndarray  # (V,), added to the logits after the cap, or (0,) for none
    soft_cap: np.float32  # of a logit; 0 for none


class Batch(NamedTuple):
    """The rows of a chunk."""

    h: np.ndarray  # (J, C)
    targets: np.ndarray  # (J,) int32
    loss_weights: np.ndarray  # (J,); unused by the forward pass


class Scratch(NamedTuple):
    """Buffers of a chunk, and the values that its forward pass saves for the backward pass."""

    tiles: np.ndarray  # (Q, J, L): exponentials, or capped products; (P, J, L) where they are not kept
    tile_max: np.ndarray  # (Q, J): largest logit of a row in a tile
    tile_sum: np.ndarray  # (Q, J): sum of a row's exponentials in a tile
    logit_sums: np.ndarray  # (P, J): sums of a row's logits in a thread's tiles, with smoothing
    target_logits: np.ndarray  # (J,)
    lse: np.ndarray  # (J,): log-sum-exp of a row
    dh_shares: np.ndarray  # (P, J, C): what a thread's tiles add to dh


class LossOptions(NamedTuple):
    """Options of the loss."""

    label_smoothing: np.float32
    z_loss: np.float32


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
def _tile_statistics(tile, tile_max, tile_sum, logit_sums, log_prior, smoothing, soft_cap):
    """Row maxima and sums of exponentials (J,) of a tile (J, L); with smoothing, logit_sums (J,) += row sums of the
    logits.

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
        tile_max[n], tile_sum[n] = m, s
        logit_sums[n] += linear


@helper
def _pick_targets(target_logits, tile, targets, first, log_prior, soft_cap):
    """Save the logit of every row whose target lies in the tile, before the exponentials replace it."""
    rows, columns = tile.shape
    for n in range(rows):
        v = targets[n] - first
        if 0 <= v < columns:
            target_logits[n] = tile[n, v]
            if soft_cap > 0 and log_prior.shape[0] > 0:
                target_logits[n] += log_prior[v]


@helper
def _tile_gradient(tile, tile_max, lse, first, batch, projection, options):
    """Turn a tile (J, L) from _tile_statistics into the gradient of its logits' products, times the loss weights.

    first: its first token; tile_max, lse (J,).
    """
    rows, columns = tile.shape
    vocab, soft_cap = projection.weight.shape[0], projection.soft_cap
    smoothing, z_loss = options.label_smoothing, options.z_loss
    targets, loss_weights = batch.targets, batch.loss_weights
    log_prior = _tile_prior(projection, first, first + columns)
    for n in range(rows):
        row, w = tile[n], loss_weights[n]
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
            scale = slope * exp32(tile_max[n] - lse[n])
            for v in range(columns):
                row[v] = row[v] * scale - spread
            if 0 <= at < columns:
                row[at] -= w * (_ONE - smoothing)


@view
def _tile_prior(projection, first, last):
    """The prior (L,) of the tokens first..last, or (0,) for none."""
    return projection.log_prior[first:last] if projection.log_prior.shape[0] > 0 else projection.log_prior


@view
def _tile_of(tiles, slot, rows, columns):
    """Tile (J, L) of the buffer in this slot of tiles."""
    return tiles[slot].reshape(-1)[: rows * columns].reshape(rows, columns)


@helper
def _tiles_forward(thread, threads, scratch, batch, projection, options, keep, blas):
    """A thread's tiles of the vocabulary: logits, their maxima and sums, and the targets' logits."""
    rows, vocab = batch.h.shape[0], projection.weight.shape[0]
    count, tile_columns = scratch.tile_max.shape[0], scratch.tiles.shape[2]
    soft_cap, logit_sums = projection.soft_cap, scratch.logit_sums[thread]
    for n in range(rows):
        logit_sums[n] = _ZERO
    for q in range(thread * count // threads, (thread + 1) * count // threads):
        first, last = q * tile_columns, min((q + 1) * tile_columns, vocab)
        tile = _tile_of(scratch.tiles, q if keep else thread, rows, last - first)
        prior = _tile_prior(projection, first, last)
        gemm_nt(blas, tile, batch.h, projection.weight[first:last], _ZERO)
        _finish_logits(tile, prior, soft_cap)
        _pick_targets(scratch.target_logits, tile, batch.targets, first, prior, soft_cap)
        _tile_statistics(
            tile, scratch.tile_max[q], scratch.tile_sum[q], logit_sums, prior, options.label_smoothing, soft_cap
        )


@kernel
def _chunk_tiles(scratch, batch, projection, options, keep, blas, threads):
    """The statistics of every tile of a chunk, and with keep the tiles. Parallel over tiles of the vocabulary."""
    for index in prange(threads):
        # a prange index is unsigned; mixed with signed, a float
        _tiles_forward(np.int64(index), threads, scratch, batch, projection, options, keep, blas)


@helper
def _merge_tiles(thread, threads, loss, nll, scratch, options, vocab):
    """A thread's rows of loss and nll (J,), and of lse."""
    rows, count = loss.shape[0], scratch.tile_max.shape[0]
    tile_max, tile_sum, logit_sums = scratch.tile_max, scratch.tile_sum, scratch.logit_sums
    target_logits, lse = scratch.target_logits, scratch.lse
    smoothing, z_loss = options.label_smoothing, options.z_loss
    for n in range(thread * rows // threads, (thread + 1) * rows // threads):
        m = np.float32(-np.inf)
        for q in range(count):
            m = max(m, tile_max[q, n])
        s, linear = 0.0, 0.0  # float64: few terms, and the loss is read to many digits
        for q in range(count):
            s += tile_sum[q, n] * math.exp(np.float64(tile_max[q, n] - m))
        for other in range(threads):
            linear += logit_sums[other, n]
        value = m + math.log(s)
        lse[n] = value
        nll[n] = value - target_logits[n]
        loss[n] = value - target_logits[n] + z_loss * value * value
        if smoothing > 0:  # otherwise a token that the prior rules out (-inf) would make it NaN
            loss[n] += smoothing * (target_logits[n] - linear / vocab)


@kernel
def _chunk_losses(loss, nll, scratch, options, vocab, threads):
    """loss, nll (J,) of a chunk from the statistics of its tiles. Parallel over rows.

    Not in one kernel with _chunk_tiles: Numba joins two loops that only call helpers into one, without a barrier.
    """
    for index in prange(threads):
        _merge_tiles(np.int64(index), threads, loss, nll, scratch, options, vocab)


@helper
def _tiles_backward(thread, threads, dweight, scratch, batch, projection, options, blas):
    """A thread's rows of dweight (V, C) +=, and its share of dh, from the tiles of _chunk_tiles (overwritten)."""
    rows, vocab = batch.h.shape[0], projection.weight.shape[0]
    count, tile_columns = scratch.tile_max.shape[0], scratch.tiles.shape[2]
    share = scratch.dh_shares[thread, :rows]
    clear_rows(share)
    for q in range(thread * count // threads, (thread + 1) * count // threads):
        first, last = q * tile_columns, min((q + 1) * tile_columns, vocab)
        tile = _tile_of(scratch.tiles, q, rows, last - first)
        _tile_gradient(tile, scratch.tile_max[q], scratch.lse, first, batch, projection, options)
        gemm_tn(blas, dweight[first:last], tile, batch.h, _ONE)
        gemm_nn(blas, share, tile, projection.weight[first:last], _ONE)


@helper
def _add_shares(dh, shares):
    """dh (J, C) = sum of the threads' shares (P, J, C), in their order."""
    for n in range(dh.shape[0]):
        for c in range(dh.shape[1]):
            value = shares[0, n, c]
            for thread in range(1, shares.shape[0]):
                value += shares[thread, n, c]
            dh[n, c] = value


@kernel
def _chunk_backward(dh, dweight, scratch, batch, projection, options, blas, threads):
    """dh (J, C) = and dweight (V, C) +=, from what the forward pass left in scratch (the tiles are overwritten)."""
    for index in prange(threads):
        _tiles_backward(np.int64(index), threads, dweight, scratch, batch, projection, options, blas)
    _add_shares(dh, scratch.dh_shares)


class DenseScratch:
    """Scratch for a vocabulary of at most V tokens and rows of C channels; about SCRATCH_BYTES for any batch."""

    def __init__(self, vocab: int, dim: int) -> None:
        self.vocab, self.dim = vocab, dim
        self.threads = numba.get_num_threads()
        tiles = -(-vocab // TILE_COLUMNS)
        buffers = max(tiles, self.threads)
        self.chunk = max(1, min(MAX_CHUNK, SCRATCH_BYTES // (4 * buffers * TILE_COLUMNS)))
        self.arrays = Scratch(
            tiles=np.empty((buffers, self.chunk, TILE_COLUMNS), np.float32),
            tile_max=np.empty((tiles, self.chunk), np.float32),
            tile_sum=np.empty((tiles, self.chunk), np.float32),
            logit_sums=np.empty((self.threads, self.chunk), np.float32),
            target_logits=np.empty(self.chunk, np.float32),
            lse=np.empty(self.chunk, np.float32),
            dh_shares=np.empty((self.threads, self.chunk, dim), np.float32),
        )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self.arrays)

    def fits(self, vocab: int, dim: int) -> bool:
        """Whether it serves a weight (vocab, dim) at the number of threads in use."""
        return vocab <= self.vocab and dim == self.dim and self.threads == numba.get_num_threads()

    def chunks(self, rows: int) -> list[slice]:
        """Rows in as few chunks as fit, all of about the same size: products of a few left-over rows are slow."""
        count = -(-rows // self.chunk)
        edges = [i * rows // max(count, 1) for i in range(count + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def of(self, vocab: int) -> Scratch:
        """The arrays, with the statistics of as many tiles as a vocabulary has."""
        tiles = -(-vocab // TILE_COLUMNS)
        return self.arrays._replace(tile_max=self.arrays.tile_max[:tiles], tile_sum=self.arrays.tile_sum[:tiles])


def scratch_for(scratch: DenseScratch | None, vocab: int, dim: int) -> DenseScratch:
    """Return scratch if it was made for exactly this shape and number of threads, else new scratch.

    A larger one is not reused, because the chunks, and with them the last bits, must not depend on earlier calls.
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


def _checked_projection(
    where: str,
    h: np.ndarray,
    weight: np.ndarray,
    targets: np.ndarray,
    log_prior: np.ndarray | None,
    soft_cap: float | None,
) -> Projection:
    _check.array(where, "weight", weight, (None, None))
    _check.array(where, "h", h, (None, weight.shape[1]))
    _check.array(where, "targets", targets, (h.shape[0],), np.int32)
    _check.indices(where, "targets", targets, weight.shape[0], "check the tokenizer's vocabulary size")
    if log_prior is None:
        log_prior = np.empty(0, np.float32)
    else:
        _check.array(where, "log_prior", log_prior, (weight.shape[0],))
    return Projection(weight, log_prior, np.float32(soft_cap or 0))


def _chunk_forward(
    loss: np.ndarray,
    nll: np.ndarray,
    scratch: DenseScratch,
    batch: Batch,
    projection: Projection,
    options: LossOptions,
    *,
    keep: bool,
) -> Scratch:
    """Write loss and nll (J,) of a chunk; returns what the backward pass needs of it, with keep."""
    vocab, threads = len(projection.weight), scratch.threads
    arrays = scratch.of(vocab)
    _chunk_tiles(arrays, batch, projection, options, keep, sgemm_address(), threads)
    _chunk_losses(loss, nll, arrays, options, vocab, threads)
    return arrays


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

    h (N, C), weight (V, C) float32; targets (N,) int32 in [0, V); log_prior (V,) float32, added to the logits
    Returns loss (N,) with smoothing and z-loss, and nll (N,), the plain -log p; both float32, nats per row.
    Cost 2*N*V*C flop. Raises ValueError if a shape, a dtype or a target is wrong.

    >>> h, weight = np.zeros((1, 2), np.float32), np.ones((4, 2), np.float32)
    >>> loss, nll = dense_head_forward(h, weight, np.array([3], np.int32))
    >>> round(float(nll[0]), 4)  # ln 4
    1.3863
    """
    where = "dense_head_forward"
    projection = _checked_projection(where, h, weight, targets, log_prior, soft_cap)
    s = _checked_scratch(where, weight, scratch)
    options = LossOptions(np.float32(label_smoothing), np.float32(z_loss))
    loss, nll = np.empty(h.shape[0], np.float32), np.empty(h.shape[0], np.float32)
    for rows in s.chunks(h.shape[0]):
        batch = Batch(h[rows], targets[rows], loss[rows])
        _chunk_forward(loss[rows], nll[rows], s, batch, projection, options, keep=False)
    return loss, nll


def dense_head_forward_backward(
    h: np.ndarray,
    weight: np.ndarray,
    targets: np.ndarray,
    loss_weights: np.ndarray,
    dweight: np.ndarray,
    *,
    log_prior: np.ndarray | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    scratch: DenseScratch | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Forward and backward pass in one: loss, plain NLL and the gradients of sum(loss_weights * loss).

    h (N, C), weight, dweight (V, C), loss_weights (N,) float32; targets (N,) int32
    Returns loss (N,), nll (N,), dh (N, C), and adds the gradient of weight to dweight. The loss weights are applied
    before the sum, so the gradients are only those of the weighted loss. Cost 6*N*V*C flop, exact in float32.
    Raises ValueError if a shape, a dtype or a target is wrong. Source: see the module's docstring.
    """
    where = "dense_head_forward_backward"
    projection = _checked_projection(where, h, weight, targets, log_prior, soft_cap)
    _check.array(where, "loss_weights", loss_weights, (h.shape[0],))
    _check.array(where, "dweight", dweight, weight.shape)
    s = _checked_scratch(where, weight, scratch)
    options = LossOptions(np.float32(label_smoothing), np.float32(z_loss))
    loss, nll, dh = np.empty(h.shape[0], np.float32), np.empty(h.shape[0], np.float32), np.empty_like(h)
    for rows in s.chunks(h.shape[0]):
        batch = Batch(h[rows], targets[rows], loss_weights[rows])
        arrays = _chunk_forward(loss[rows], nll[rows], s, batch, projection, options, keep=True)
        _chunk_backward(dh[rows], dweight, arrays, batch, projection, options, sgemm_address(), s.threads)
    return loss, nll, dh
