"""The tree head when a text is written: the distribution over all tokens, drawing by descent, the likeliest tokens.

Training's arithmetic, from tree_node.py: the same products and the same logits at every node.
Letters: N positions, V leaves, M nodes below the root, C channels, P threads; J positions of a chunk, K children.
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
from flashlm_numba.kernels.draw import keep_largest, put_in_order, sift_down, sift_up
from flashlm_numba.kernels.tree_node import Tree, child_priors, child_rows, dot, finish_logits, node_products, span_of

_ZERO = np.float32(0)

CHUNK = 16  # positions at a time; enough that the rows are not read for each


@helper
def _log_distribution(out, above, logits, slopes, x, token_of_row, tree, blas):
    """out (J, V) = log p for x (J, C); above (J, M + 1), logits (any,), slopes (widest,): scratch."""
    for j in range(x.shape[0]):
        above[j, 0] = _ZERO
    for m in range(tree.spans.shape[0]):
        span = span_of(tree.spans, m)
        n_tokens, width = span.n_tokens, span.width
        tokens, children = child_rows(span, tree)
        token_prior, child_prior = child_priors(span, tree)
        here = logits[: x.shape[0] * width].reshape(x.shape[0], width)
        node_products(here, x, tokens, children, blas)
        for j in range(x.shape[0]):
            row = here[j]
            finish_logits(row, slopes, token_prior, child_prior, tree.soft_cap)
            top = row_max(row)
            total = _ZERO
            for k in range(width):
                total += exp32(row[k] - top)
            shift = above[j, m] - top - np.float32(math.log(total))
            for k in range(n_tokens):
                out[j, token_of_row[span.token_start + k]] = row[k] + shift
            for k in range(width - n_tokens):
                above[j, span.child_start + k] = row[n_tokens + k] + shift


@helper
def _log_distribution_share(thread, threads, out, above, logits, slopes, h, token_of_row, tree, blas):
    """A thread's rows of out (N, V), CHUNK at a time; scratch of all threads."""
    count = h.shape[0]
    at, end = thread * count // threads, (thread + 1) * count // threads
    while at < end:
        last = min(at + above.shape[1], end)
        _log_distribution(
            out[at:last], above[thread], logits[thread], slopes[thread], h[at:last], token_of_row, tree, blas
        )
        at = last


@kernel
def _tree_head_log_distribution(out, above, logits, slopes, h, token_of_row, tree, blas, threads):
    """out (N, V) = log p, column v for token v. Scratch: above (P, J, M + 1), logits (P, any), slopes (P, widest)."""
    for index in prange(threads):
        _log_distribution_share(np.int64(index), threads, out, above, logits, slopes, h, token_of_row, tree, blas)


@helper
def descend(logits, slopes, x, uniforms, tree):
    """A leaf row drawn for x (C,), one softmax per level; -1 if one of them is no distribution.

    uniforms (depth,) float64. Scratch: logits, slopes (widest,).
    """
    m, depth = np.int64(0), 0
    while True:
        span = span_of(tree.spans, m)
        n_tokens, width = span.n_tokens, span.width
        tokens, children = child_rows(span, tree)
        row = logits[:width]
        for k in range(n_tokens):
            row[k] = dot(x, tokens[k])
        for k in range(width - n_tokens):
            row[n_tokens + k] = dot(x, children[k])
        token_prior, child_prior = child_priors(span, tree)
        finish_logits(row, slopes, token_prior, child_prior, tree.soft_cap)
        top = row_max(row)
        total = 0.0  # float64: the rest of a long sum must not be lost
        for k in range(width):
            row[k] = exp32(row[k] - top)
            total += row[k]
        if not 0 < total < np.inf:
            return np.int64(-1)
        bar = uniforms[depth] * total
        choice, seen = 0, np.float64(row[0])
        while seen <= bar and choice < width - 1:
            choice += 1
            seen += row[choice]
        if choice < n_tokens:
            return span.token_start + choice
        m = span.child_start + choice - n_tokens
        depth += 1


@helper
def _finished_logits(logits, slopes, x, span, tree):
    """The logits of a node for x (1, C), in the first row of logits, and what makes them log p below the node."""
    n_tokens, width = span.n_tokens, span.width
    tokens, children = child_rows(span, tree)
    row_products(logits[:, :n_tokens], x, tokens)
    row_products(logits[:, n_tokens:width], x, children)
    row = logits[0, :width]
    token_prior, child_prior = child_priors(span, tree)
    finish_logits(row, slopes, token_prior, child_prior, tree.soft_cap)
    top = row_max(row)
    total = _ZERO
    for k in range(width):
        total += exp32(row[k] - top)
    return -np.float64(top) - math.log(np.float64(total))


@helper
def _search(best, rows, keys, codes, logits, slopes, x, tree):
    """rows (k,) int64: the likeliest leaf rows for x (1, C), most likely first, and best (k,) float64, their log p.

    Best-first search with k <= V. A node's log p bounds that of every leaf below it, so the search ends when no node
    exceeds the k leaves found. Scratch: keys, codes (M,), the heap of nodes; logits (1, widest), slopes (widest,).
    """
    found, size, m, above = 0, 0, np.int64(0), 0.0
    while True:
        span = span_of(tree.spans, m)
        n_tokens, width = span.n_tokens, span.width
        shift = above + _finished_logits(logits, slopes, x, span, tree)
        row = logits[0, :width]
        for k in range(n_tokens):
            found = keep_largest(best, rows, found, np.float64(row[k]) + shift, span.token_start + k)
        for k in range(n_tokens, width):
            key = np.float64(row[k]) + shift
            if found < best.shape[0] or key > -best[0]:
                sift_up(keys, codes, size, key, span.child_start + k - n_tokens)
                size += 1
        if size == 0 or (found == best.shape[0] and keys[0] <= -best[0]):
            put_in_order(best, rows, found)
            return
        above, m = keys[0], codes[0]
        size -= 1
        keys[0], codes[0] = keys[size], codes[size]
        sift_down(keys, codes, size)


@serial_kernel
def _tree_head_top(best, rows, keys, codes, logits, slopes, x, tree):
    _search(best, rows, keys, codes, logits, slopes, x, tree)


@helper
def _leaf_log_prob(leaf, nodes, shifts, logits, slopes, x, tree):
    """log p of a leaf row for x (1, C). Per level, nodes (D,) int64, shifts (D,) float64 and logits (D, widest) hold
    the node that was computed last; scratch: slopes (widest,).
    """
    m, level, total = np.int64(0), 0, 0.0
    while m >= 0:
        span = span_of(tree.spans, m)
        if nodes[level] != m:
            shifts[level] = _finished_logits(logits[level : level + 1], slopes, x, span, tree)
            nodes[level] = m
        total += shifts[level]
        if leaf < span.token_end:
            total += np.float64(logits[level, leaf - span.token_start])
            m = np.int64(-1)
        else:
            child = span.child_start
            while leaf >= tree.leaf_ends[child]:
                child += 1
            total += np.float64(logits[level, span.n_tokens + child - span.child_start])
            m = child
        level += 1
    return total


@serial_kernel
def _tree_head_log_prob(log_p, rows, nodes, shifts, logits, slopes, x, tree):
    """log_p (K,) float64 of ascending leaf rows (K,) int32 for x (1, C); neighbours share their nodes.

    Scratch: see _leaf_log_prob.
    """
    for level in range(nodes.shape[0]):
        nodes[level] = -1
    for i in range(rows.shape[0]):
        log_p[i] = _leaf_log_prob(np.int64(rows[i]), nodes, shifts, logits, slopes, x, tree)


@helper
def search_mixed(best, rows, keys, codes, nodes, shifts, logits, slopes, x, tree, copies, shares):
    """The first k entries of rows (k + O,) int64 become the likeliest leaf rows of the mixture shares[0] * p +
    sum over o of shares[o + 1] [row = copies[o]], and those of best (k + O,) float64 their log p.

    copies (O,) int32: leaf rows, -1 for none;  shares (O + 1,) float64
    Scratch: keys and codes as for _search, the rest as for _leaf_log_prob, but logits (D + 1, widest).
    """
    count, depth = best.shape[0] - copies.shape[0], nodes.shape[0]
    # the mixture's likeliest rows are among the tree's and the copies
    _search(best[:count], rows[:count], keys, codes, logits[depth:], slopes, x, tree)
    for level in range(depth):
        nodes[level] = -1
    size = count
    for o in range(copies.shape[0]):
        row, known = np.int64(copies[o]), copies[o] < 0
        for i in range(size):
            known |= rows[i] == row
        if not known:
            rows[size] = row
            best[size] = _leaf_log_prob(row, nodes, shifts, logits, slopes, x, tree)
            size += 1
    for i in range(size):
        p = shares[0] * math.exp(best[i])
        for o in range(copies.shape[0]):
            if copies[o] == rows[i]:
                p += shares[o + 1]
        row, at = rows[i], i
        while at > 0 and best[at - 1] < p:  # nearly in order already
            best[at], rows[at] = best[at - 1], rows[at - 1]
            at -= 1
        best[at], rows[at] = p, row
    for i in range(count):
        best[i] = math.log(best[i]) if best[i] > 0 else -np.inf


@serial_kernel
def _tree_head_top_mixed(best, rows, keys, codes, nodes, shifts, logits, slopes, x, tree, copies, shares):
    search_mixed(best, rows, keys, codes, nodes, shifts, logits, slopes, x, tree, copies, shares)


@serial_kernel
def _tree_node(log_p, logits, slopes, x, m, tree):
    """log_p (K,) float64 of the K children of node m for x (1, C). Scratch: logits (1, widest), slopes (widest,)."""
    shift = _finished_logits(logits, slopes, x, span_of(tree.spans, m), tree)
    for k in range(log_p.shape[0]):
        log_p[k] = np.float64(logits[0, k]) + shift


# --- public functions ---


def tree_head_log_distribution(h: np.ndarray, tree: Tree, token_of_row: np.ndarray) -> np.ndarray:
    """log p of all tokens, (N, V) float32, column v for token v. Visits every node of the tree.

    h : (N, C) float32;  tree : from make_tree;  token_of_row : (V,) int32, token of each leaf row
    Raises ValueError if a shape or dtype is wrong.
    """
    where = "tree_head_log_distribution"
    vocab, dim = tree.weight.shape
    _check.array(where, "h", h, (None, dim))
    _check.array(where, "token_of_row", token_of_row, (vocab,), np.int32)
    threads = numba.get_num_threads()
    out = np.empty((len(h), vocab), np.float32)
    above = np.empty((threads, CHUNK, len(tree.spans)), np.float32)
    logits, slopes = (np.empty((threads, size), np.float32) for size in (CHUNK * tree.widest, tree.widest))
    _tree_head_log_distribution(out, above, logits, slopes, h, token_of_row, tree, sgemm_address(), threads)
    return out


class TreeSampler:
    """Samples one token at a time from a tree of make_tree.

    Calls are serial and store no state, so several threads may use one sampler.
    """

    def __init__(self, tree: Tree) -> None:
        self.vocab_size, self.dim = tree.weight.shape
        self.depth = tree.depth
        self._tree = tree

    def _check_row(self, x: np.ndarray, count: int) -> int:
        _check.array("TreeSampler", "x", x, (1, self.dim))
        if count < 1:
            raise ValueError(f"TreeSampler: count must be at least 1, got {count}")
        return min(count, self.vocab_size)

    def _scratch(self) -> tuple[np.ndarray, ...]:
        """The heap of nodes, logits and slopes of one."""
        n, widest = len(self._tree.nodes), self._tree.widest
        return np.empty(n), np.empty(n, np.int64), np.empty((1, widest), np.float32), np.empty(widest, np.float32)

    def _levels(self, more: int = 0) -> tuple[np.ndarray, ...]:
        """Nodes, shifts and logits of the levels, with `more` rows of logits."""
        shape = self.depth + more, self._tree.widest
        return np.empty(self.depth, np.int64), np.empty(self.depth), np.empty(shape, np.float32)

    def top(self, x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The k = min(count, V) likeliest leaf rows for x (1, C), (k,) int64, and their log p (k,) float64; exact.

        The likeliest comes first. A node's log p bounds that of every leaf below it, so only nodes that can matter are
        visited. Raises ValueError if a shape, a dtype or count is wrong.
        """
        count = self._check_row(x, count)
        log_p, rows = np.empty(count), np.empty(count, np.int64)
        _tree_head_top(log_p, rows, *self._scratch(), x, self._tree)
        return rows, log_p

    def top_mixed(
        self, x: np.ndarray, count: int, copies: np.ndarray, shares: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `top` finds for the mixture shares[0] * p(row) + sum over o of shares[o + 1] [row = copies[o]].

        copies : (O,) int32, leaf rows, -1 for none;  shares : (O + 1,) float64
        Raises ValueError if a shape, a dtype, a row or count is wrong.
        """
        count, ways = self._check_row(x, count), len(copies)
        _check.array("TreeSampler.top_mixed", "copies", copies, (None,), np.int32)
        _check.array("TreeSampler.top_mixed", "shares", shares, (ways + 1,), np.float64)
        if ways and not -1 <= copies.min() <= copies.max() < self.vocab_size:
            raise ValueError(f"TreeSampler.top_mixed: copies must be in [-1, {self.vocab_size}), got {copies}")
        log_p, rows = np.empty(count + ways), np.empty(count + ways, np.int64)
        keys, codes, _, slopes = self._scratch()
        nodes, shifts, logits = self._levels(1)
        _tree_head_top_mixed(log_p, rows, keys, codes, nodes, shifts, logits, slopes, x, self._tree, copies, shares)
        return rows[:count], log_p[:count]

    def node(self, x: np.ndarray, m: int) -> np.ndarray:
        """log p of the children of node m, given that node, for x (1, C): its tokens, then its inner nodes.

        Returns (K,) float64. Raises ValueError if a shape or dtype is wrong or there is no such node.
        """
        self._check_row(x, 1)
        if not 0 <= m < len(self._tree.spans):
            raise ValueError(f"TreeSampler.node: m must be in [0, {len(self._tree.spans)}), got {m}")
        tokens, token_end, child, child_end = self._tree.spans[m][:4]
        log_p = np.empty(token_end - tokens + child_end - child)
        _, _, logits, slopes = self._scratch()
        _tree_node(log_p, logits, slopes, x, m, self._tree)
        return log_p

    def log_prob(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """log p of some leaf rows (K,) int32 for x (1, C), (K,) float64, by the arithmetic of `top`.

        Raises ValueError if a shape, a dtype or a row is wrong.
        """
        _check.array("TreeSampler", "x", x, (1, self.dim))
        _check.array("TreeSampler", "rows", rows, (None,), np.int32)
        _check.indices("TreeSampler", "rows", rows, self.vocab_size)
        order, log_p, found = np.argsort(rows), np.empty(len(rows)), np.empty(len(rows))
        _tree_head_log_prob(found, rows[order], *self._levels(), self._scratch()[3], x, self._tree)
        log_p[order] = found
        return log_p
