"""The tree head when a text is written: the distribution over all tokens, drawing by descent, the likeliest tokens.

Training's arithmetic, from tree_head.py: the same products and the same logits at every node.
Letters: N positions, V leaves, M nodes below the root, C channels, P threads; J positions of a chunk, K children. spans
(M + 1, 5): see tree_head.py.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._blas import sgemm_address
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel
from flashlm_numba.kernels._math import exp32, row_max
from flashlm_numba.kernels._tile import dot_products
from flashlm_numba.kernels.tree_head import (
    check_tree,
    dot,
    finish_logits,
    node_products,
    node_width,
    tree_depth,
    widest_node,
)

_ZERO = np.float32(0)


@helper
def _log_distribution(
    out,
    above,
    logits,
    spare,
    x,
    weight,
    nodes,
    spans,
    token_of_row,
    log_prior,
    node_log_prior,
    soft_cap,
    blas,
):
    """out (J, V) = log p for x (J, C); above (J, M + 1), logits (any,), spare (widest,): scratch."""
    for j in range(x.shape[0]):
        above[j, 0] = _ZERO
    for m in range(spans.shape[0]):
        token_start, token_end = np.int64(spans[m, 0]), np.int64(spans[m, 1])
        kid, kid_end = np.int64(spans[m, 2]), np.int64(spans[m, 3])
        n_tokens, width = token_end - token_start, node_width(spans[m])
        token_prior = log_prior[token_start:token_end] if log_prior.shape[0] > 0 else log_prior
        kid_prior = node_log_prior[kid - 1 : kid_end - 1] if log_prior.shape[0] > 0 else node_log_prior
        here = logits[: x.shape[0] * width].reshape(x.shape[0], width)
        node_products(here, x, weight[token_start:token_end], nodes[kid - 1 : kid_end - 1], blas)
        for j in range(x.shape[0]):
            row = here[j]
            finish_logits(row, spare, token_prior, kid_prior, soft_cap)
            top = row_max(row)
            total = _ZERO
            for k in range(width):
                total += exp32(row[k] - top)
            shift = above[j, m] - top - np.float32(math.log(total))
            for k in range(n_tokens):
                out[j, token_of_row[token_start + k]] = row[k] + shift
            for k in range(width - n_tokens):
                above[j, kid + k] = row[n_tokens + k] + shift


@kernel
def _tree_head_log_distribution(
    out, above, logits, spares, h, weight, nodes, spans, token_of_row, log_prior, node_log_prior, soft_cap,
    blas, threads,
):  # fmt: skip
    """out (N, V) = log p, column v for token v. Scratch: above (P, J, M + 1), logits (P, any), spares."""
    count = h.shape[0]
    for index in prange(threads):
        thread = np.int64(index)
        at, end = thread * count // threads, (thread + 1) * count // threads
        while at < end:
            last = min(at + above.shape[1], end)
            _log_distribution(
                out[at:last], above[thread], logits[thread], spares[thread], h[at:last], weight, nodes, spans,
                token_of_row, log_prior, node_log_prior, soft_cap, blas,
            )  # fmt: skip
            at = last


@serial_kernel
def _tree_head_sample(out, logits, slope, h, uniforms, weight, nodes, spans, log_prior, node_log_prior, soft_cap):
    """out (N,) int32: a leaf row for each h, by descent; uniforms (N, depth) float64. Scratch: logits, slope
    (widest,).

    Serial: drawing one token must not wait for threads to wake.
    """
    for n in range(h.shape[0]):
        m, depth, leaf = np.int64(0), 0, np.int64(-1)
        while leaf < 0:
            token_start, token_end = np.int64(spans[m, 0]), np.int64(spans[m, 1])
            kid, kid_end = np.int64(spans[m, 2]), np.int64(spans[m, 3])
            n_tokens, width = token_end - token_start, node_width(spans[m])
            row = logits[:width]
            for k in range(n_tokens):
                row[k] = dot(h[n], weight[token_start + k])
            for k in range(width - n_tokens):
                row[n_tokens + k] = dot(h[n], nodes[kid - 1 + k])
            token_prior = log_prior[token_start:token_end] if log_prior.shape[0] > 0 else log_prior
            kid_prior = node_log_prior[kid - 1 : kid_end - 1] if log_prior.shape[0] > 0 else node_log_prior
            finish_logits(row, slope, token_prior, kid_prior, soft_cap)
            top = row_max(row)
            total = 0.0  # float64: the rest of a long sum must not be lost
            for k in range(width):
                row[k] = exp32(row[k] - top)
                total += row[k]
            bar = uniforms[n, depth] * total
            choice, seen = 0, np.float64(row[0])
            while seen <= bar and choice < width - 1:
                choice += 1
                seen += row[choice]
            if choice < n_tokens:
                leaf = token_start + choice
            else:
                m = kid + choice - n_tokens
            depth += 1
        out[n] = leaf


@helper
def _sift_down(keys, codes, count):
    """Restore the heap (largest key first) of which only the first entry may be out of place."""
    i, key, code = 0, keys[0], codes[0]
    while True:
        child = 2 * i + 1
        if child >= count:
            break
        if child + 1 < count and keys[child + 1] > keys[child]:
            child += 1
        if keys[child] <= key:
            break
        keys[i], codes[i] = keys[child], codes[child]
        i = child
    keys[i], codes[i] = key, code


@helper
def _sift_up(keys, codes, i, key, code):
    """Put a new entry into the heap, whose end is i."""
    while i > 0 and keys[(i - 1) // 2] < key:
        keys[i], codes[i] = keys[(i - 1) // 2], codes[(i - 1) // 2]
        i = (i - 1) // 2
    keys[i], codes[i] = key, code


@serial_kernel
def _tree_head_top(
    out, log_p, keys, codes, logits, slope, x, weight, nodes, spans, log_prior, node_log_prior, soft_cap,
):  # fmt: skip
    """out (k,) int32: the likeliest leaf rows for x (1, C), most likely first, and log_p (k,) float64; k <= V.

    Best-first search: a node's own log p bounds that of every leaf below it. Scratch: keys (V + M,) float64 and codes
    (V + M,) int64, a heap of leaves (code row) and nodes (code -node); logits (1, widest), slope (widest,).
    """
    found, size, m, above = 0, 0, np.int64(0), 0.0
    while True:
        token_start, token_end = np.int64(spans[m, 0]), np.int64(spans[m, 1])
        kid, kid_end = np.int64(spans[m, 2]), np.int64(spans[m, 3])
        n_tokens, width = token_end - token_start, node_width(spans[m])
        dot_products(logits[:, :n_tokens], x, weight[token_start:token_end])
        dot_products(logits[:, n_tokens:width], x, nodes[kid - 1 : kid_end - 1])
        row = logits[0, :width]
        token_prior = log_prior[token_start:token_end] if log_prior.shape[0] > 0 else log_prior
        kid_prior = node_log_prior[kid - 1 : kid_end - 1] if log_prior.shape[0] > 0 else node_log_prior
        finish_logits(row, slope, token_prior, kid_prior, soft_cap)
        top = row_max(row)
        total = _ZERO
        for k in range(width):
            total += exp32(row[k] - top)
        shift = above - np.float64(top) - math.log(np.float64(total))
        for k in range(width):
            code = token_start + k if k < n_tokens else -(kid + k - n_tokens)
            _sift_up(keys, codes, size, np.float64(row[k]) + shift, code)
            size += 1
        while size > 0:
            above, code = keys[0], codes[0]
            size -= 1
            keys[0], codes[0] = keys[size], codes[size]
            _sift_down(keys, codes, size)
            if code < 0:
                m = -code
                break
            out[found], log_p[found] = code, above
            found += 1
            if found == out.shape[0]:
                return


# --- public functions ---


def tree_head_log_distribution(
    h: np.ndarray,
    weight: np.ndarray,
    nodes: np.ndarray,
    spans: np.ndarray,
    token_of_row: np.ndarray,
    *,
    log_prior: np.ndarray | None = None,
    node_log_prior: np.ndarray | None = None,
    soft_cap: float | None = None,
) -> np.ndarray:
    """log p of every token, (N, V) float32, column v for token v; visits every node of the tree.

    Arguments as for tree_head_forward; token_of_row (V,) int32, the token of each leaf row.
    Raises ValueError if a shape or dtype is wrong.
    """
    where = "tree_head_log_distribution"
    log_prior, node_log_prior = check_tree(where, h, weight, nodes, spans, log_prior, node_log_prior)
    _check.array(where, "token_of_row", token_of_row, (len(weight),), np.int32)
    threads, widest = numba.get_num_threads(), widest_node(spans)
    chunk = 16  # positions at a time; enough that the rows are not read for each
    out = np.empty((len(h), len(weight)), np.float32)
    above = np.empty((threads, chunk, len(spans)), np.float32)
    logits, spares = (np.empty((threads, size), np.float32) for size in (chunk * widest, widest))
    _tree_head_log_distribution(
        out, above, logits, spares, h, weight, nodes, spans, token_of_row, log_prior, node_log_prior,
        np.float32(soft_cap or 0), sgemm_address(), threads,
    )  # fmt: skip
    return out


def tree_head_sample(
    h: np.ndarray,
    weight: np.ndarray,
    nodes: np.ndarray,
    spans: np.ndarray,
    uniforms: np.ndarray,
    *,
    log_prior: np.ndarray | None = None,
    node_log_prior: np.ndarray | None = None,
    soft_cap: float | None = None,
) -> np.ndarray:
    """A leaf row for each h, (N,) int32, drawn by descent: a softmax a level, no other branch is visited.

    Arguments as for tree_head_forward; uniforms (N, depth) float64 in [0, 1), one per level.
    Raises ValueError if a shape or dtype is wrong.
    """
    where = "tree_head_sample"
    log_prior, node_log_prior = check_tree(where, h, weight, nodes, spans, log_prior, node_log_prior)
    _check.array(where, "uniforms", uniforms, (len(h), tree_depth(spans)), np.float64)
    out, widest = np.empty(len(h), np.int32), widest_node(spans)
    logits, slope = np.empty(widest, np.float32), np.empty(widest, np.float32)
    _tree_head_sample(
        out,
        logits,
        slope,
        h,
        uniforms,
        weight,
        nodes,
        spans,
        log_prior,
        node_log_prior,
        np.float32(soft_cap or 0),
    )
    return out


def tree_head_top(
    x: np.ndarray,
    weight: np.ndarray,
    nodes: np.ndarray,
    spans: np.ndarray,
    count: int,
    *,
    log_prior: np.ndarray | None = None,
    node_log_prior: np.ndarray | None = None,
    soft_cap: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The count likeliest leaf rows for x (1, C), (k,) int32, most likely first, and their log p (k,) float64; exact.

    Arguments as for tree_head_forward; k is count, at most V. Only the nodes that can matter are visited: what a node
    has itself bounds every leaf below it. One thread. Raises ValueError if a shape, a dtype or count is wrong.
    """
    where = "tree_head_top"
    log_prior, node_log_prior = check_tree(where, x, weight, nodes, spans, log_prior, node_log_prior)
    if len(x) != 1 or count < 1:
        raise ValueError(f"{where}: expected one row and a count of at least 1, got {len(x)} rows and {count}")
    count, widest, most = min(count, len(weight)), widest_node(spans), len(weight) + len(nodes)
    out, log_p = np.empty(count, np.int32), np.empty(count)
    _tree_head_top(
        out, log_p, np.empty(most), np.empty(most, np.int64), np.empty((1, widest), np.float32),
        np.empty(widest, np.float32), x, weight, nodes, spans, log_prior, node_log_prior, np.float32(soft_cap or 0),
    )  # fmt: skip
    return out, log_p
