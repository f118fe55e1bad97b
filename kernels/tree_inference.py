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
from flashlm_numba.kernels._microkernels import row_products
from flashlm_numba.kernels.draw import check_drawing, draw_index, keep_largest, put_in_order, sift_down, sift_up
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
def _search(
    best, rows, keys, codes, logits, slope, x, weight, nodes, spans, log_prior, node_log_prior, soft_cap,
):  # fmt: skip
    """rows (k,) int64: the likeliest leaf rows for x (1, C), most likely first, and best (k,) float64, their log p.

    Best-first search, k <= V: a node's own log p bounds that of every leaf below it, so it ends when no node promises
    more than the k leaves at hand. Scratch: keys, codes (M,), the heap of nodes; logits (1, widest), slope (widest,).
    """
    found, size, m, above = 0, 0, np.int64(0), 0.0
    while True:
        token_start, token_end = np.int64(spans[m, 0]), np.int64(spans[m, 1])
        kid, kid_end = np.int64(spans[m, 2]), np.int64(spans[m, 3])
        n_tokens, width = token_end - token_start, node_width(spans[m])
        row_products(logits[:, :n_tokens], x, weight[token_start:token_end])
        row_products(logits[:, n_tokens:width], x, nodes[kid - 1 : kid_end - 1])
        row = logits[0, :width]
        token_prior = log_prior[token_start:token_end] if log_prior.shape[0] > 0 else log_prior
        kid_prior = node_log_prior[kid - 1 : kid_end - 1] if log_prior.shape[0] > 0 else node_log_prior
        finish_logits(row, slope, token_prior, kid_prior, soft_cap)
        top = row_max(row)
        total = _ZERO
        for k in range(width):
            total += exp32(row[k] - top)
        shift = above - np.float64(top) - math.log(np.float64(total))
        for k in range(n_tokens):
            found = keep_largest(best, rows, found, np.float64(row[k]) + shift, token_start + k)
        for k in range(n_tokens, width):
            key = np.float64(row[k]) + shift
            if found < best.shape[0] or key > -best[0]:
                sift_up(keys, codes, size, key, kid + k - n_tokens)
                size += 1
        if size == 0 or (found == best.shape[0] and keys[0] <= -best[0]):
            put_in_order(best, rows, found)
            return
        above, m = keys[0], codes[0]
        size -= 1
        keys[0], codes[0] = keys[size], codes[size]
        sift_down(keys, codes, size)


@serial_kernel
def _tree_head_top(
    best, rows, keys, codes, logits, slope, x, weight, nodes, spans, log_prior, node_log_prior, soft_cap,
):  # fmt: skip
    _search(best, rows, keys, codes, logits, slope, x, weight, nodes, spans, log_prior, node_log_prior, soft_cap)


@serial_kernel
def _tree_head_draw_top(
    best, rows, keys, codes, logits, slope, x, weight, nodes, spans, log_prior, node_log_prior, soft_cap,
    uniform, temperature, top_p,
):  # fmt: skip
    """One of the rows that the search finds, or -1 where they have no distribution."""
    _search(best, rows, keys, codes, logits, slope, x, weight, nodes, spans, log_prior, node_log_prior, soft_cap)
    index = draw_index(best, uniform, temperature, top_p)
    return rows[index] if index >= 0 else -1


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


class TreeSampler:
    """The arrays of a tree head, checked once: what draws tokens one at a time.

    Calls are serial and keep nothing, so several threads may write texts with one sampler.

    Arguments as for tree_head_forward; weight and nodes may change their values afterwards. Raises ValueError if a
    shape or dtype is wrong.
    """

    def __init__(
        self,
        weight: np.ndarray,
        nodes: np.ndarray,
        spans: np.ndarray,
        *,
        log_prior: np.ndarray | None = None,
        node_log_prior: np.ndarray | None = None,
        soft_cap: float | None = None,
    ) -> None:
        nothing = np.empty((0, weight.shape[-1]), np.float32)
        log_prior, node_log_prior = check_tree("TreeSampler", nothing, weight, nodes, spans, log_prior, node_log_prior)
        self.dim, self.vocab_size, self.depth = weight.shape[1], len(weight), tree_depth(spans)
        self._widest, self._nodes = widest_node(spans), len(nodes)
        self._tree = weight, nodes, spans, log_prior, node_log_prior, np.float32(soft_cap or 0)

    def _check_row(self, x: np.ndarray, count: int) -> int:
        _check.array("TreeSampler", "x", x, (1, self.dim))
        if count < 1:
            raise ValueError(f"TreeSampler: count must be at least 1, got {count}")
        return min(count, self.vocab_size)

    def _scratch(self) -> tuple[np.ndarray, ...]:
        """The heap of nodes, logits and slopes of one."""
        n, widest = self._nodes, self._widest
        return np.empty(n), np.empty(n, np.int64), np.empty((1, widest), np.float32), np.empty(widest, np.float32)

    def sample(self, h: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """A leaf row for each h (N, C), (N,) int32, drawn by descent: a softmax a level, no other branch is visited.

        uniforms (N, depth) float64 in [0, 1), one per level. Raises ValueError if a shape or dtype is wrong.
        """
        _check.array("TreeSampler.sample", "h", h, (None, self.dim))
        _check.array("TreeSampler.sample", "uniforms", uniforms, (len(h), self.depth), np.float64)
        out = np.empty(len(h), np.int32)
        _, _, logits, slope = self._scratch()
        _tree_head_sample(out, logits[0], slope, h, uniforms, *self._tree)
        return out

    def top(self, x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The count likeliest leaf rows for x (1, C), (k,) int64, likeliest first, and their log p (k,) float64; exact.

        k is count, at most V. Only the nodes that can matter are visited: what a node has itself bounds every leaf
        below it. Raises ValueError if a shape, a dtype or count is wrong.
        """
        count = self._check_row(x, count)
        log_p, rows = np.empty(count), np.empty(count, np.int64)
        _tree_head_top(log_p, rows, *self._scratch(), x, *self._tree)
        return rows, log_p

    def draw_top(
        self, x: np.ndarray, count: int, uniform: float, temperature: float = 1.0, top_p: float | None = None
    ) -> int:
        """A leaf row for x (1, C), drawn among its count likeliest: draw.draw_sorted of top, in one call.

        Raises ValueError if an argument is wrong or nothing can be drawn.
        """
        count = self._check_row(x, count)
        check_drawing(temperature, top_p)
        log_p, rows = np.empty(count), np.empty(count, np.int64)
        row = _tree_head_draw_top(log_p, rows, *self._scratch(), x, *self._tree, uniform, temperature, top_p or 1.0)
        if row < 0:
            raise ValueError("TreeSampler: the probabilities must be finite and not all zero")
        return row
