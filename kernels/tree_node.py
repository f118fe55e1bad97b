"""One node of the tree head: its products, softmax, loss and gradients.

    log p(token) = sum over the nodes of its path of  logit_child - log sum exp(logits of the node)
    loss = sum over the path of  lse - (1 - s) logit_child - s mean(logits) + z lse**2

with label smoothing s and z-loss z. A node's logits are cap(h . row) + prior of its tokens' rows (a slice of weight)
and its child nodes' rows (a slice of nodes).

Letters: N positions, V leaves, M nodes below the root, C channels, P threads; J positions of a chunk, K children.
Source: Goodman 2001, arXiv:cs/0108006, and Morin & Bengio 2005.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._blas import gemm_nn, gemm_nt, gemm_tn
from flashlm_numba.kernels._jit import helper, view
from flashlm_numba.kernels._math import exp32, row_max
from flashlm_numba.kernels._microkernels import dot_products, short_product
from flashlm_numba.kernels._rows import clear_rows

TOKEN_START, TOKEN_END, CHILD_START, CHILD_END, LEAF_END = range(5)  # columns of spans

SMALL = 48  # products of a node below which a call of BLAS costs more than the loops
NARROW = 4  # children up to which loops beat BLAS at any number of positions
# Positions of a node up to which register tiles beat BLAS, which packs the rows for each node: nine of ten that a batch
# of 4,096 visits.
THIN = 32

_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


class Tree(NamedTuple):
    """The rows and the structure of a tree head, checked by `make_tree`. The values of the rows may change later."""

    weight: np.ndarray  # (V, C): rows of the tokens, in leaf order
    nodes: np.ndarray  # (M, C): rows of the nodes below the root; node m >= 1 has row m - 1
    spans: np.ndarray  # (M + 1, 5) int32: token_start, token_end, child_start, child_end, leaf_end of every node
    leaf_ends: np.ndarray  # (M + 1,) int32: the last column of spans, to search in
    log_prior: np.ndarray  # (V,), added to the logits after the cap, or (0,) for none
    node_log_prior: np.ndarray  # (M,), or (0,) for none
    soft_cap: np.float32  # of a logit; 0 for none
    depth: int  # nodes on the longest path, the root included
    widest: int  # children of the node that has the most


class Span(NamedTuple):
    """The ranges of a node's children, from `span_of`."""

    token_start: np.int64  # its tokens are the leaf rows token_start..token_end
    token_end: np.int64
    child_start: np.int64  # its child nodes are the nodes child_start..child_end,
    child_end: np.int64
    row_start: np.int64  # whose rows of nodes are row_start..row_end
    row_end: np.int64
    n_tokens: np.int64
    width: np.int64  # children, tokens and nodes


class Batch(NamedTuple):
    """Positions in the order of their targets' leaf rows, so that the positions below a node are one range."""

    h: np.ndarray  # (N, C), in the caller's order
    order: np.ndarray  # (N,) int64: the caller's index of each sorted position
    rows: np.ndarray  # (N,) int32: leaf rows of the targets, ascending
    loss_weights: np.ndarray  # (N,), sorted; unused without backward


class Scratch(NamedTuple):
    """Buffers of a call; positions are sorted."""

    hs: np.ndarray  # (N, C): h, sorted
    dhs: np.ndarray  # (N, C): its gradient; unused without backward
    loss: np.ndarray  # (N,)
    nll: np.ndarray  # (N,)
    split_logits: np.ndarray  # (any,): logits of the split nodes of a round, then the gradients of their products
    task_logits: np.ndarray  # (P, any): logits of a chunk of a task
    softcap_slopes: np.ndarray  # (P, widest): derivative of the cap at each logit
    roots: np.ndarray  # (P, K, C): rows of the root, one after another; (P, 0, C) where they lie so as they are


class Options(NamedTuple):
    """What is computed."""

    label_smoothing: np.float32
    z_loss: np.float32
    backward: bool
    accumulate: bool  # add to the gradients of the rows; else take the place of what was there


def tree_depth(spans: np.ndarray) -> int:
    """Number of nodes on the longest path of a tree, with the root, for spans (M + 1, 5) int32."""
    # breadth first: each level's child nodes are the next level
    depth, begin, end = 0, 0, 1
    while begin < end:
        depth += 1
        begin, end = end, int(spans[end - 1, CHILD_END])
    return depth


def node_widths(spans: np.ndarray) -> np.ndarray:
    """Number of children of every node, (M + 1,) int32, for spans (M + 1, 5) int32."""
    return spans[:, TOKEN_END] - spans[:, TOKEN_START] + spans[:, CHILD_END] - spans[:, CHILD_START]


def make_tree(
    weight: np.ndarray,
    nodes: np.ndarray,
    spans: np.ndarray,
    *,
    log_prior: np.ndarray | None = None,
    node_log_prior: np.ndarray | None = None,
    soft_cap: float | None = None,
) -> Tree:
    """Make the tree that the kernels of the tree head read, and check it once.

    weight : (V, C) float32, rows in leaf order;  nodes : (M, C) float32, row m - 1 for node m >= 1
    spans : (M + 1, 5) int32, token_start, token_end, child_start, child_end and leaf_end of every node
    log_prior, node_log_prior : (V,), (M,) float32, added to the logits after the cap
    Raises ValueError if a shape or dtype is wrong.
    """
    _check.array("make_tree", "weight", weight, (None, None))
    vocab, dim = weight.shape
    _check.array("make_tree", "spans", spans, (None, 5), np.int32)
    _check.array("make_tree", "nodes", nodes, (len(spans) - 1, dim))
    if spans[0, LEAF_END] != vocab:
        raise ValueError(f"make_tree: the tree has {spans[0, LEAF_END]} leaves, but weight has {vocab} rows")
    if (log_prior is None) != (node_log_prior is None):
        raise ValueError("make_tree: log_prior and node_log_prior must be given together")
    if log_prior is None or node_log_prior is None:
        log_prior = node_log_prior = np.empty(0, np.float32)
    else:
        _check.array("make_tree", "log_prior", log_prior, (vocab,))
        _check.array("make_tree", "node_log_prior", node_log_prior, (len(spans) - 1,))
    return Tree(
        weight=weight,
        nodes=nodes,
        spans=spans,
        leaf_ends=np.ascontiguousarray(spans[:, LEAF_END]),
        log_prior=log_prior,
        node_log_prior=node_log_prior,
        soft_cap=np.float32(soft_cap or 0),
        depth=tree_depth(spans),
        widest=int(node_widths(spans).max()),
    )


@helper
def span_of(spans, node):
    """The Span of a node."""
    token_start, token_end = np.int64(spans[node, TOKEN_START]), np.int64(spans[node, TOKEN_END])
    child_start, child_end = np.int64(spans[node, CHILD_START]), np.int64(spans[node, CHILD_END])
    n_tokens = token_end - token_start
    width = n_tokens + child_end - child_start
    return Span(token_start, token_end, child_start, child_end, child_start - 1, child_end - 1, n_tokens, width)


@view
def child_rows(span, tree):
    """The rows of a node's tokens (T, C) and of its child nodes (K - T, C)."""
    return tree.weight[span.token_start : span.token_end], tree.nodes[span.row_start : span.row_end]


@view
def child_priors(span, tree):
    """The priors of a node's tokens (T,) and of its child nodes (K - T,); two empty arrays for none."""
    if tree.log_prior.shape[0] == 0:
        return tree.log_prior, tree.node_log_prior
    return tree.log_prior[span.token_start : span.token_end], tree.node_log_prior[span.row_start : span.row_end]


@helper
def _tanh32(x):
    """tanh of float32 x; the polynomial near 0 keeps the relative error small. Source: Cephes, tanhf.c."""
    y = x * x
    p = np.float32(-5.70498872745e-3)
    p = p * y + np.float32(2.06390887954e-2)
    p = p * y + np.float32(-5.37397155531e-2)
    p = p * y + np.float32(1.33314422036e-1)
    p = p * y + np.float32(-3.33332819422e-1)
    near = p * y * x + x
    e = exp32(-_TWO * abs(x))
    far = (_ONE - e) / (_ONE + e)
    far = far if x > 0 else -far
    return near if y < np.float32(0.390625) else far


# --- products ---


@helper
def _is_small(positions, width):
    return width <= NARROW or positions * width <= SMALL


@helper
def dot(a, b):
    """Sum of a * b, both (C,) float32."""
    total = _ZERO
    for c in range(a.shape[0]):
        total += a[c] * b[c]
    return total


@helper
def add_scaled(out, factor, x):
    """out (C,) += factor * x (C,)."""
    for c in range(out.shape[0]):
        out[c] += factor * x[c]


@helper
def node_products(out, x, tokens, children, blas):
    """out (J, K) = x (J, C) times the rows of tokens, then of child nodes (together K)."""
    positions, width = out.shape
    n_tokens = tokens.shape[0]
    if _is_small(positions, width):
        for j in range(positions):
            for k in range(n_tokens):
                out[j, k] = dot(x[j], tokens[k])
            for k in range(width - n_tokens):
                out[j, n_tokens + k] = dot(x[j], children[k])
    elif positions <= THIN:
        dot_products(out[:, :n_tokens], x, tokens)
        dot_products(out[:, n_tokens:], x, children)
    else:
        gemm_nt(blas, out[:, :n_tokens], x, tokens, _ZERO)
        gemm_nt(blas, out[:, n_tokens:], x, children, _ZERO)


@helper
def node_products_dx(dx, dlogits, tokens, children, beta, blas):
    """dx (J, C) = dlogits (J, K) @ rows + beta * dx, beta 0 or 1.   forward: logits = x @ rows.T"""
    positions, width = dlogits.shape
    n_tokens = tokens.shape[0]
    if _is_small(positions, width):
        if beta == 0:
            clear_rows(dx)
        for j in range(positions):
            for k in range(n_tokens):
                add_scaled(dx[j], dlogits[j, k], tokens[k])
            for k in range(width - n_tokens):
                add_scaled(dx[j], dlogits[j, n_tokens + k], children[k])
        return
    if n_tokens > 0:
        if positions <= THIN:
            short_product(dx, dlogits[:, :n_tokens], tokens, beta)
        else:
            gemm_nn(blas, dx, dlogits[:, :n_tokens], tokens, beta)
        beta = _ONE
    if n_tokens < width:
        if positions <= THIN:
            short_product(dx, dlogits[:, n_tokens:], children, beta)
        else:
            gemm_nn(blas, dx, dlogits[:, n_tokens:], children, beta)


@helper
def node_products_drows(dtokens, dchildren, dlogits, x, beta, blas):
    """dtokens, dchildren = dlogits (J, K).T @ x (J, C) + beta times themselves.   forward: logits = x @ rows.T"""
    positions, width = dlogits.shape
    n_tokens = dtokens.shape[0]
    if _is_small(positions, width):
        if beta == 0:
            clear_rows(dtokens)
            clear_rows(dchildren)
        for k in range(n_tokens):
            for j in range(positions):
                add_scaled(dtokens[k], dlogits[j, k], x[j])
        for k in range(width - n_tokens):
            for j in range(positions):
                add_scaled(dchildren[k], dlogits[j, n_tokens + k], x[j])
    elif positions <= THIN:
        short_product(dtokens, dlogits[:, :n_tokens].T, x, beta)
        short_product(dchildren, dlogits[:, n_tokens:].T, x, beta)
    else:
        gemm_tn(blas, dtokens, dlogits[:, :n_tokens], x, beta)
        gemm_tn(blas, dchildren, dlogits[:, n_tokens:], x, beta)


# --- softmax and loss ---


@helper
def finish_logits(row, slopes, token_prior, child_prior, soft_cap):
    """Apply the cap (0: none) and add the priors (empty: none) in place; slopes (K,): the cap's derivative."""
    if soft_cap > 0:
        for k in range(row.shape[0]):
            ratio = _tanh32(row[k] / soft_cap)
            slopes[k] = _ONE - ratio * ratio
            row[k] = soft_cap * ratio
    n_tokens = token_prior.shape[0]
    for k in range(n_tokens):
        row[k] += token_prior[k]
    for k in range(child_prior.shape[0]):
        row[n_tokens + k] += child_prior[k]


@helper
def _softmax_loss(logits, slopes, begin, span, scratch, batch, tree, options):
    """loss and nll of scratch += this node's share for the sorted positions from begin; the products in logits (J, K)
    become the gradient of sum(loss_weights * loss) by them.
    """
    positions, width = logits.shape
    loss, nll, rows, loss_weights = scratch.loss, scratch.nll, batch.rows, batch.loss_weights
    leaf_ends, soft_cap = tree.leaf_ends, tree.soft_cap
    smoothing, z_loss = options.label_smoothing, options.z_loss
    token_prior, child_prior = child_priors(span, tree)
    child = span.child_start  # targets are ascending: the child with the last one's, or a later one, has the next
    for j in range(positions):
        row, at = logits[j], begin + j
        if rows[at] < span.token_end:
            choice = np.int64(rows[at]) - span.token_start
        else:
            while rows[at] >= leaf_ends[child]:
                child += 1
            choice = span.n_tokens + child - span.child_start
        finish_logits(row, slopes, token_prior, child_prior, soft_cap)
        chosen = row[choice]
        linear = _ZERO
        if smoothing > 0:
            for k in range(width):
                linear += row[k]
        top = row_max(row)
        total = _ZERO
        for k in range(width):
            e = exp32(row[k] - top)
            row[k] = e
            total += e
        log_total = np.float32(math.log(total))
        lse = top + log_total
        node_nll = (top - chosen) + log_total
        nll[at] += node_nll
        loss[at] += node_nll + smoothing * (chosen - linear / np.float32(width)) + z_loss * lse * lse
        if options.backward:
            w = loss_weights[at]
            scale = w * (_ONE + _TWO * z_loss * lse) / total
            spread = w * smoothing / np.float32(width)
            for k in range(width):
                row[k] = row[k] * scale - spread
            row[choice] -= w * (_ONE - smoothing)
            if soft_cap > 0:
                for k in range(width):
                    row[k] *= slopes[k]


@helper
def node_positions(logits, node, begin, end, thread, scratch, batch, tree, options, blas):
    """Sorted positions begin..end at one node: loss, the gradient of the products (left in logits) and of h.

    Every position comes by the root first: there its gradient of h takes the place of what was there.
    """
    span = span_of(tree.spans, node)
    tokens, children = child_rows(span, tree)
    root = scratch.roots[thread]
    if node == 0 and root.shape[0] > 0:
        tokens, children = root, tree.nodes[:0]
    node_products(logits, scratch.hs[begin:end], tokens, children, blas)
    _softmax_loss(logits, scratch.softcap_slopes[thread], begin, span, scratch, batch, tree, options)
    if options.backward:
        beta = _ZERO if node == 0 else _ONE
        node_products_dx(scratch.dhs[begin:end], logits, tokens, children, beta, blas)
