"""n-gram copy: the token that followed the last earlier occurrence of the last n tokens in the sequence.

If the n tokens up to a position have occurred earlier in the sequence, the token that followed them is likely to follow
again. Attention learns to copy it (Olsson et al. 2022, "In-context Learning and Induction Heads", arXiv:2209.11895).
Convolutions cannot, because the distance depends on the text. This layer implements the copy directly, like the "n-gram
heads" of Akyürek et al. 2024, arXiv:2401.12973. It adds the embedding row of the copied token, times a trained gain per
channel, to the trunk's input and to the hidden state:

    x[t] += gain_in * E[copy[t]],   h[t] += gain_out * E[copy[t]]

If an order n is given a second time, it skips the last occurrence and uses the one before.
Letters: B batch, T time, N = B*T rows, M a number of rows, V vocabulary, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel


@helper
def copied_row(rows, t, order, skip, reach):
    """rows[j + 1] for the last j in [t - reach, t) but skip where the `order` rows up to j equal those up to t; or -1.

    rows (T,): of one sequence.
    """
    for j in range(t - 1, max(order - 1, t - reach) - 1, -1):
        if rows[j] == rows[t]:
            same = 1
            while same < order and rows[j - same] == rows[t - same]:
                same += 1
            if same == order:
                if skip == 0:
                    return rows[j + 1]
                skip -= 1
    return np.int32(-1)


@helper
def find_copies(out, rows, first, order, skip, reach):
    """out (T,) = the row to copy at each of rows (T,), the start of a sequence; only from position `first` on."""
    for t in range(first, rows.shape[0]):
        out[t] = copied_row(rows, t, order, skip, reach)


@helper
def add_copies(x, embedding, rows, gain):
    """x (M, C) += gain (C,) * embedding[rows], where rows (M,) is not -1."""
    for m in range(rows.shape[0]):
        row = rows[m]
        if row >= 0:
            for c in range(x.shape[1]):
                x[m, c] += gain[c] * embedding[row, c]


@helper
def add_copies_backward(dgain, dx, embedding, rows):
    """dgain (C,) += the sum of dx (M, C) * embedding[rows], where rows (M,) is not -1."""
    for m in range(rows.shape[0]):
        row = rows[m]
        if row >= 0:
            for c in range(dx.shape[1]):
                dgain[c] += dx[m, c] * embedding[row, c]


@kernel
def _scatter_copies(dweight, dx, dh, rows, gain_in, gain_out, threads):
    # a thread owns a range of columns, as in embedding.py
    dim = dweight.shape[1]
    for thread in prange(threads):
        low, high = thread * dim // threads, (thread + 1) * dim // threads
        for n in range(rows.shape[0]):
            if rows[n] >= 0:
                target, source, source_out = dweight[rows[n], low:high], dx[n, low:high], dh[n, low:high]
                for c in range(high - low):
                    target[c] += gain_in[low + c] * source[c] + gain_out[low + c] * source_out[c]


@serial_kernel
def _ngram_copies(out, rows, order, skip, reach):
    for b in range(rows.shape[0]):
        find_copies(out[b], rows[b], 0, order, skip, reach)


def copy_kinds(orders: Sequence[int]) -> list[tuple[int, int]]:
    """Order and skip of each way of copying. An order that is given a second time skips the last occurrence.

    >>> copy_kinds((1, 2, 1))
    [(1, 0), (2, 0), (1, 1)]
    """
    return [(order, list(orders[:i]).count(order)) for i, order in enumerate(orders)]


def ngram_copies(rows: np.ndarray, order: int, reach: int, skip: int = 0) -> np.ndarray:
    """The token after the last earlier occurrence of the last `order` tokens, (B, T) int32; -1 if there is none.

    rows : (B, T) int32, token ids, or other numbers that correspond to them one to one
    order : number of tokens that must match, at least 1;  reach : maximum distance back in tokens, at least 1
    skip : number of later occurrences to skip
    Position t reads only tokens t - reach - order + 1 to t. It takes at most B * T * reach * order comparisons.
    Raises ValueError if a shape, a dtype or a number is wrong.

    >>> ngram_copies(np.array([[5, 6, 5, 7, 5, 6]], np.int32), order=1, reach=9).tolist()
    [[-1, -1, 6, -1, 7, 5]]
    >>> ngram_copies(np.array([[5, 6, 5, 7, 5, 6]], np.int32), order=2, reach=9).tolist()
    [[-1, -1, -1, -1, -1, 5]]
    """
    _check.array("ngram_copies", "rows", rows, (None, None), np.int32)
    for name, value, least in (("order", order, 1), ("reach", reach, 1), ("skip", skip, 0)):
        if value < least:
            raise ValueError(f"ngram_copies: {name} must be at least {least}, got {value}")
    out = np.empty_like(rows)
    _ngram_copies(out, rows, order, skip, reach)
    return out


def scatter_copies(
    dweight: np.ndarray, dx: np.ndarray, dh: np.ndarray, rows: np.ndarray, gain_in: np.ndarray, gain_out: np.ndarray
) -> None:
    """Add the gradient of the copied rows (N,) int32 to dweight (V, C): gain_in * dx + gain_out * dh, skipping rows -1.

    dx, dh : (N, C), gradients of the trunk's input and of the hidden states;  gain_in, gain_out : (C,)
    All arrays except rows are float32. The result does not depend on the number of threads.
    Raises ValueError if a shape, a dtype or a row is wrong.
    """
    where = "scatter_copies"
    _check.array(where, "dweight", dweight, (None, None))
    _check.array(where, "rows", rows, (None,), np.int32)
    for name, value in (("dx", dx), ("dh", dh)):
        _check.array(where, name, value, (len(rows), dweight.shape[1]))
    for name, value in (("gain_in", gain_in), ("gain_out", gain_out)):
        _check.array(where, name, value, dweight.shape[1:])
    if rows.size and not -1 <= rows.min() <= rows.max() < len(dweight):
        raise ValueError(f"{where}: rows must be in [-1, {len(dweight)}), got {rows.min()} to {rows.max()}")
    _scatter_copies(dweight, dx, dh, rows, gain_in, gain_out, numba.get_num_threads())
