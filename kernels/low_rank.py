"""Rows stored as a product of two smaller matrices: rows (M, C) = coords (M, R) @ basis (R, C).

A tree's inner nodes may have many rows. As a product they take M*R + R*C numbers instead of M*C. The product is
computed once per step, so the kernels that read rows are the same as for full rows.
Letters: M rows, R rank, C channels, P threads.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._blas import gemm_nn, gemm_nt, gemm_tn, sgemm_address
from flashlm_numba.kernels._jit import helper, kernel

# rows, and columns, of a task: fixed, so that every number of threads gives the same bits
TASK_ROWS, TASK_COLUMNS = 256, 64


@helper
def _expand_share(thread, threads, out, coords, basis, blas):
    """A thread's blocks of rows of out (M, C) = coords (M, R) @ basis (R, C)."""
    blocks = (out.shape[0] + TASK_ROWS - 1) // TASK_ROWS
    for block in range(thread, blocks, threads):
        low, high = block * TASK_ROWS, min((block + 1) * TASK_ROWS, out.shape[0])
        gemm_nn(blas, out[low:high], coords[low:high], basis, np.float32(0))


@kernel
def _expand(out, coords, basis, blas, threads):
    """out (M, C) = coords (M, R) @ basis (R, C). Parallel over blocks of rows."""
    for index in prange(threads):
        _expand_share(np.int64(index), threads, out, coords, basis, blas)


@helper
def _backward_share(thread, threads, dcoords, dbasis, drows, coords, basis, beta, blas):
    """A thread's blocks of rows of dcoords, then its blocks of columns of dbasis."""
    row_blocks = (drows.shape[0] + TASK_ROWS - 1) // TASK_ROWS
    column_blocks = (drows.shape[1] + TASK_COLUMNS - 1) // TASK_COLUMNS
    for block in range(thread, row_blocks, threads):
        low, high = block * TASK_ROWS, min((block + 1) * TASK_ROWS, drows.shape[0])
        gemm_nt(blas, dcoords[low:high], drows[low:high], basis, beta)
    for block in range(thread, column_blocks, threads):
        low, high = block * TASK_COLUMNS, min((block + 1) * TASK_COLUMNS, drows.shape[1])
        gemm_tn(blas, dbasis[:, low:high], coords, drows[:, low:high], beta)


@kernel
def _expand_backward(dcoords, dbasis, drows, coords, basis, beta, blas, threads):
    """dcoords (M, R) = drows (M, C) @ basis.T, dbasis (R, C) = coords.T @ drows, plus beta times what was there.

    Parallel over blocks of rows, then over blocks of columns.
    """
    for index in prange(threads):
        _backward_share(np.int64(index), threads, dcoords, dbasis, drows, coords, basis, beta, blas)


def low_rank_rows(coords: np.ndarray, basis: np.ndarray, out: np.ndarray) -> np.ndarray:
    """out (M, C) = coords (M, R) @ basis (R, C), all float32; returns out. 2*M*R*C flop.

    Raises ValueError if a shape or dtype is wrong. The same bits for any number of threads.

    >>> coords, basis = np.ones((2, 1), np.float32), np.array([[3, 4]], np.float32)
    >>> low_rank_rows(coords, basis, np.empty((2, 2), np.float32)).tolist()
    [[3.0, 4.0], [3.0, 4.0]]
    """
    _check.array("low_rank_rows", "coords", coords, (None, None))
    _check.array("low_rank_rows", "basis", basis, (coords.shape[1], None))
    _check.array("low_rank_rows", "out", out, (coords.shape[0], basis.shape[1]))
    _expand(out, coords, basis, sgemm_address(), numba.get_num_threads())
    return out


def low_rank_backward(
    dcoords: np.ndarray,
    dbasis: np.ndarray,
    drows: np.ndarray,
    coords: np.ndarray,
    basis: np.ndarray,
    *,
    accumulate: bool = True,
) -> None:
    """Add the gradients of coords (M, R) and basis (R, C), given drows (M, C), to dcoords and dbasis.

    accumulate : False replaces the previous gradients
    All arrays are float32; the cost is 4*M*R*C flop. A zero row of drows gives a zero row of dcoords. The result does
    not depend on the number of threads. Raises ValueError if a shape or dtype is wrong.
    """
    where = "low_rank_backward"
    _check.array(where, "coords", coords, (None, None))
    _check.array(where, "basis", basis, (coords.shape[1], None))
    _check.array(where, "drows", drows, (coords.shape[0], basis.shape[1]))
    _check.array(where, "dcoords", dcoords, coords.shape)
    _check.array(where, "dbasis", dbasis, basis.shape)
    beta = np.float32(1 if accumulate else 0)
    _expand_backward(dcoords, dbasis, drows, coords, basis, beta, sgemm_address(), numba.get_num_threads())
