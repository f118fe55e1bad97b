"""n-gram copy: the token that followed the last earlier occurrence of the last n tokens in the sequence.

If the n tokens up to a position have occurred earlier in the sequence, the token that followed them is likely to follow
again. Attention learns to copy it (Olsson et al. 2022, "In-context Learning and Induction Heads", arXiv:2209.11895).
Convolutions cannot, because the distance depends on the text. This layer implements the copy directly, like the "n-gram
heads" of Akyürek et al. 2024, arXiv:2401.12973. It adds the embedding row of the copied token, times a trained gain per
channel, to the trunk's input and to the hidden state:

    x[t] += gain_in * E[copy[t]],   h[t] += gain_out * E[copy[t]]

In place of the latter, the copies can have shares beside the head (copy_mixture.py).
If an order n is given a second time, it skips the last occurrence and uses the one before.
Letters: B batch, T time, N = B*T rows, M a number of rows, V vocabulary, C channels.
"""

from __future__ import annotations

import functools
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


@helper
def _copied_rows(out, left, rows, t, orders, skips, longest, reach):
    """out (O,): what copied_row finds at t for each order and skip, in one search. Scratch: left (O,)."""
    todo = orders.shape[0]
    for o in range(todo):
        out[o], left[o] = np.int32(-1), skips[o]
    j = t - 1
    while todo > 0 and j >= max(0, t - reach):
        if rows[j] == rows[t]:
            same = 1
            while same < longest and j >= same and rows[j - same] == rows[t - same]:
                same += 1
            for o in range(orders.shape[0]):
                if left[o] >= 0 and same >= orders[o]:
                    left[o] -= 1
                    if left[o] < 0:
                        out[o] = rows[j + 1]
                        todo -= 1
        j -= 1


@helper
def _all_copies_share(first, last, out, left, rows, orders, skips, longest, reach):
    """The positions first..last of all sequences."""
    time = rows.shape[1]
    for n in range(first, last):
        _copied_rows(out[n // time, n % time], left, rows[n // time], n % time, orders, skips, longest, reach)


@kernel
def _all_copies(out, left, rows, orders, skips, longest, reach, threads):
    for index in prange(threads):
        thread, count = np.int64(index), rows.shape[0] * rows.shape[1]
        first, last = thread * count // threads, (thread + 1) * count // threads
        _all_copies_share(first, last, out, left[thread], rows, orders, skips, longest, reach)


@serial_kernel
def _last_copies(out, left, rows, orders, skips, longest, reach):
    _copied_rows(out, left, rows, rows.shape[0] - 1, orders, skips, longest, reach)


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


def all_copies(rows: np.ndarray, orders: Sequence[int], reach: int) -> np.ndarray:
    """What ngram_copies finds for each of copy_kinds(orders), (B, T, O) int32, in one search, with all threads.

    Raises ValueError if a shape, a dtype or a number is wrong.

    >>> all_copies(np.array([[5, 6, 5, 7, 5, 6]], np.int32), (1, 2), 9)[0].tolist()
    [[-1, -1], [-1, -1], [6, -1], [-1, -1], [7, -1], [5, 5]]
    """
    _check.array("all_copies", "rows", rows, (None, None), np.int32)
    orders_of, skips, longest = _kinds("all_copies", orders, reach)
    threads = numba.get_num_threads()
    out, left = np.empty((*rows.shape, len(orders)), np.int32), np.empty((threads, len(orders)), np.int64)
    if out.size:
        _all_copies(out, left, rows, orders_of, skips, longest, reach, threads)
    return out


def last_copies(rows: np.ndarray, orders: Sequence[int], reach: int) -> np.ndarray:
    """all_copies at the last position of one text (T,), T >= 1, (O,) int32, with one thread.

    Raises ValueError if a shape, a dtype or a number is wrong.
    """
    _check.array("last_copies", "rows", rows, (None,), np.int32)
    orders_of, skips, longest = _kinds("last_copies", orders, reach)
    if not len(rows):
        raise ValueError("last_copies: rows must hold a token")
    out, left = np.empty(len(orders), np.int32), np.empty(len(orders), np.int64)
    _last_copies(out, left, rows, orders_of, skips, longest, reach)
    return out


def _kinds(where: str, orders: Sequence[int], reach: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The orders and skips of copy_kinds (O,) int64, and the longest order."""
    return _kinds_of(where, tuple(orders), reach)


@functools.lru_cache(maxsize=16)  # decoding asks for every token
def _kinds_of(where: str, orders: tuple[int, ...], reach: int) -> tuple[np.ndarray, np.ndarray, int]:
    if reach < 1 or min(orders, default=1) < 1:
        raise ValueError(f"{where}: orders and reach must be at least 1, got {list(orders)} and {reach}")
    kinds = copy_kinds(orders)
    orders_of, skips = (np.array([kind[i] for kind in kinds], np.int64) for i in (0, 1))
    return orders_of, skips, max(orders, default=0)


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
