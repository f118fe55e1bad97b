"""The tree head: the product of one softmax per node of a token's path, with its loss and gradients.

tree_node.py computes one node. Positions are sorted by the leaf row of their target, so that the positions of a node
are one contiguous range, on which the node is one GEMM.

tree_plan.py divides the work with a `Plan`. In the first half of a round each thread processes some positions of the
split nodes and stores the gradient of their logits. In the second half it processes some rows of these nodes and its
tasks. Two parallel regions usually suffice for any depth. If the stored logits would exceed their bound, there are more
rounds.

Letters: N positions, V leaves, M nodes below the root, C channels, P threads; J positions of a chunk, K children.
Source: Grave et al. 2016, arXiv:1609.04309, section 4, for few large products; the arrangement is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._blas import gemm_tn, sgemm_address
from flashlm_numba.kernels._calls import address, call
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel
from flashlm_numba.kernels._rows import clear_rows, copy_rows, gather_rows
from flashlm_numba.kernels.tree_node import (
    TOKEN_END,
    TOKEN_START,
    Batch,
    Options,
    Scratch,
    Tree,
    add_scaled,
    child_rows,
    make_tree,
    node_positions,
    node_products_drows,
    node_widths,
    span_of,
)
from flashlm_numba.kernels.tree_plan import CHUNK, make_plan

__all__ = ["Tree", "TreeScratch", "make_tree", "tree_head_forward", "tree_head_forward_backward"]

JOINED = 1024  # rows of a root with tokens and nodes up to which each thread copies them together

_ZERO, _ONE = np.float32(0), np.float32(1)


class Outputs(NamedTuple):
    """What a call returns or adds to; positions are in the caller's order."""

    loss: np.ndarray  # (N,)
    nll: np.ndarray  # (N,)
    dh: np.ndarray  # (N, C); the gradients are left alone without backward
    dweight: np.ndarray  # (V, C)
    dnodes: np.ndarray  # (M, C)


@helper
def _clear_range(out, begin, end):
    for i in range(begin, end):
        out[i] = _ZERO


@helper
def _clear_idle(out, starts, ends, thread, threads):
    """A thread's share of the rows in the ranges [starts, ends) (G,) becomes zero."""
    total = np.int64(0)
    for i in range(starts.shape[0]):
        total += ends[i] - starts[i]
    share, share_end = thread * total // threads, (thread + 1) * total // threads
    before = np.int64(0)
    for i in range(starts.shape[0]):
        low, count = starts[i], ends[i] - starts[i]
        first, last = min(max(share - before, 0), count), min(max(share_end - before, 0), count)
        clear_rows(out[low + first : low + last])
        before += count


@helper
def _prepare(thread, threads, outputs, scratch, plan, batch, tree, options):
    """Before the first round: sort h, clear what is added to, and the gradients of rows that no position visits."""
    begin, end = plan.bounds[0, thread], plan.bounds[0, thread + 1]
    gather_rows(scratch.hs[begin:end], batch.h, batch.order[begin:end])
    _clear_range(scratch.loss, begin, end)
    _clear_range(scratch.nll, begin, end)
    if options.backward:
        if span_of(tree.spans, 0).width < 2:  # else the root's share is the first
            clear_rows(scratch.dhs[begin:end])
        if not options.accumulate:
            _clear_idle(outputs.dweight, plan.idle_token_start, plan.idle_token_end, thread, threads)
            _clear_idle(outputs.dnodes, plan.idle_node_start, plan.idle_node_end, thread, threads)


@helper
def _join_root(root, tree):
    """root (K, C) = the root's rows of tokens, then of child nodes; nothing where root is empty."""
    if root.shape[0] > 0:
        tokens, children = child_rows(span_of(tree.spans, 0), tree)
        copy_rows(root[: tokens.shape[0]], tokens)
        copy_rows(root[tokens.shape[0] :], children)


@helper
def _split_positions(this_round, thread, scratch, plan, batch, tree, options, blas):
    """A thread's positions of the split nodes of a round, CHUNK at a time: losses, dhs, and in split_logits the
    gradients of the products, for `_split_drows`.
    """
    begin, end = plan.bounds[this_round, thread], plan.bounds[this_round, thread + 1]
    for p in range(plan.round_first[this_round], plan.round_first[this_round + 1]):
        node, piece_begin = plan.piece_node[p], plan.piece_begin[p]
        width = span_of(tree.spans, node).width
        at, until = max(begin, piece_begin), min(end, plan.piece_end[p])
        while at < until:
            last = min(at + CHUNK, until)
            offset = plan.piece_offset[p] + (at - piece_begin) * width
            logits = scratch.split_logits[offset : offset + (last - at) * width].reshape(last - at, width)
            node_positions(logits, node, at, last, thread, scratch, batch, tree, options, blas)
            at = last


@helper
def _root_drows(first, last, dlogits, hs, root, outputs, tree, beta, blas):
    """Rows first..last of the root's gradients, which are one product as its rows lie together in root (scratch)."""
    span = span_of(tree.spans, 0)
    found = root[: last - first]
    gemm_tn(blas, found, dlogits[:, first:last], hs, _ZERO)
    for k in range(first, last):
        if k < span.n_tokens:
            row = outputs.dweight[span.token_start + k]
        else:
            row = outputs.dnodes[span.row_start + k - span.n_tokens]
        if beta == 0:
            for c in range(row.shape[0]):
                row[c] = found[k - first, c]
        else:
            add_scaled(row, _ONE, found[k - first])


@helper
def _split_drows(this_round, thread, threads, outputs, scratch, plan, tree, options, blas):
    """A thread's part of the gradients of the split nodes' rows: whole rows, an equal share of the work."""
    first_piece, last_piece = plan.round_first[this_round], plan.round_first[this_round + 1]
    root = scratch.roots[thread]
    total = np.int64(0)
    for p in range(first_piece, last_piece):
        total += (plan.piece_end[p] - plan.piece_begin[p]) * span_of(tree.spans, plan.piece_node[p]).width
    share, share_end = thread * total // threads, (thread + 1) * total // threads
    before = np.int64(0)
    for p in range(first_piece, last_piece):
        begin, end, offset = plan.piece_begin[p], plan.piece_end[p], plan.piece_offset[p]
        span = span_of(tree.spans, plan.piece_node[p])
        width, positions = span.width, end - begin
        # row k is the work [before + k * positions, ...): it belongs to the thread in whose share that begins
        first = min(max((share - before + positions - 1) // positions, 0), width)
        last = min(max((share_end - before + positions - 1) // positions, 0), width)
        before += positions * width
        if first >= last:
            continue
        dlogits = scratch.split_logits[offset : offset + positions * width].reshape(positions, width)
        hs = scratch.hs[begin:end]
        beta = _ONE if options.accumulate or plan.piece_is_first[p] == 0 else _ZERO
        if plan.piece_node[p] == 0 and root.shape[0] > 0:
            _root_drows(first, last, dlogits, hs, root, outputs, tree, beta, blas)
            continue
        if first < span.n_tokens:
            until = min(last, span.n_tokens)
            drows = outputs.dweight[span.token_start + first : span.token_start + until]
            gemm_tn(blas, drows, dlogits[:, first:until], hs, beta)
        if last > span.n_tokens:
            since = max(first, span.n_tokens)
            first_row = span.row_start - span.n_tokens  # where row 0 of the node would be
            drows = outputs.dnodes[first_row + since : first_row + last]
            gemm_tn(blas, drows, dlogits[:, since:last], hs, beta)


@helper
def _do_task(task, thread, outputs, scratch, plan, batch, tree, options, blas):
    """The nodes of a task, parents first: losses, dhs and the gradients of the nodes' rows; then what is returned."""
    buffer = scratch.task_logits[thread]
    for v in range(plan.task_first[task], plan.task_first[task + 1]):
        node, begin, end = plan.visit_node[v], plan.visit_begin[v], plan.visit_end[v]
        span = span_of(tree.spans, node)
        if span.width < 2:  # a single child has probability one
            continue
        step = min(CHUNK, buffer.shape[0] // span.width)
        at = begin
        while at < end:
            last = min(at + step, end)
            logits = buffer[: (last - at) * span.width].reshape(last - at, span.width)
            node_positions(logits, node, at, last, thread, scratch, batch, tree, options, blas)
            if options.backward:
                dtokens = outputs.dweight[span.token_start : span.token_end]
                dchildren = outputs.dnodes[span.row_start : span.row_end]
                beta = _ONE if options.accumulate or at > begin else _ZERO
                node_products_drows(dtokens, dchildren, logits, scratch.hs[at:last], beta, blas)
            at = last
    _scatter(plan.task_begin[task], plan.task_end[task], outputs, scratch, batch, options)


@helper
def _scatter(begin, end, outputs, scratch, batch, options):
    """Losses and gradients of h of the sorted positions begin..end, to the caller's order."""
    for i in range(begin, end):
        to = batch.order[i]
        outputs.loss[to] = scratch.loss[i]
        outputs.nll[to] = scratch.nll[i]
        if options.backward:
            for c in range(outputs.dh.shape[1]):
                outputs.dh[to, c] = scratch.dhs[i, c]


@serial_kernel
def _do_half(half, thread, threads, outputs, scratch, plan, batch, tree, options, blas):
    """A thread's part of half a round. half counts on: 0 and 1 are the halves of round 0, 2 and 3 those of round 1."""
    this_round, last_round = half // 2, plan.round_first.shape[0] - 2
    if half == 0:
        _prepare(thread, threads, outputs, scratch, plan, batch, tree, options)
    if half % 2 == 0:
        _join_root(scratch.roots[thread], tree)
        _split_positions(this_round, thread, scratch, plan, batch, tree, options, blas)
        return
    if options.backward:
        _split_drows(this_round, thread, threads, outputs, scratch, plan, tree, options, blas)
    if this_round == last_round:
        for i in range(plan.thread_first[thread], plan.thread_first[thread + 1]):
            _do_task(plan.tasks[i], thread, outputs, scratch, plan, batch, tree, options, blas)


@kernel
def _tree_head(do_half, outputs, scratch, plan, batch, tree, options, blas, threads):
    """Every output of a call. Each round is two regions, of one body so that it is compiled once."""
    halves = 2 * (plan.round_first.shape[0] - 1)
    for half in range(halves):
        for index in prange(threads):
            # a prange index is unsigned; mixed with signed, a float
            call(do_half, half, np.int64(index), threads, outputs, scratch, plan, batch, tree, options, blas)


# --- public functions ---


@dataclass
class TreeScratch:
    """Buffers that are reused between calls and grow as needed, to at most 128 MB for N = 8,192 and C = 256."""

    buffers: dict[str, np.ndarray] = field(default_factory=dict)

    def take(self, name: str, *shape: int) -> np.ndarray:
        """A float32 buffer with this name and shape, and arbitrary contents."""
        size = int(np.prod(shape))
        if name not in self.buffers or self.buffers[name].size < size:
            self.buffers[name] = np.empty(size, np.float32)
        return self.buffers[name][:size].reshape(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self.buffers.values())


def _joined_rows(tree: Tree) -> int:
    """Rows of the root, which every position visits, if they are copied together: one product instead of two."""
    width, n_tokens = int(node_widths(tree.spans[:1])[0]), int(tree.spans[0, TOKEN_END] - tree.spans[0, TOKEN_START])
    return width if 0 < n_tokens < width <= JOINED else 0


def _run(
    where: str,
    outputs: Outputs,
    h: np.ndarray,
    tree: Tree,
    targets: np.ndarray,
    loss_weights: np.ndarray,
    options: Options,
    scratch: TreeScratch,
) -> None:
    n, dim = h.shape
    _check.array(where, "targets", targets, (n,), np.int32)
    _check.indices(where, "targets", targets, len(tree.weight), "check the tokenizer's vocabulary size")
    if n == 0:
        if options.backward and not options.accumulate:
            outputs.dweight[...], outputs.dnodes[...] = 0, 0
        return
    threads = numba.get_num_threads()
    # a stable sort of 16-bit numbers is a radix sort, several times faster
    keys = targets.astype(np.uint16) if len(tree.weight) <= 1 << 16 else targets
    order = np.argsort(keys, kind="stable")
    batch = Batch(h=h, order=order, rows=targets[order], loss_weights=loss_weights[order])
    plan = make_plan(batch.rows, tree, threads)
    buffers = Scratch(
        hs=scratch.take("hs", n, dim),
        dhs=scratch.take("dhs", n, dim) if options.backward else outputs.dh,
        loss=scratch.take("loss", n),
        nll=scratch.take("nll", n),
        split_logits=scratch.take("split_logits", plan.split_floats),
        task_logits=scratch.take("task_logits", threads, plan.task_floats),
        softcap_slopes=scratch.take("softcap_slopes", threads, tree.widest),
        roots=scratch.take("roots", threads, _joined_rows(tree), dim),
    )
    arguments = outputs, buffers, plan, batch, tree, options, sgemm_address()
    _tree_head(address(_do_half, 0, 0, 0, *arguments), *arguments, threads)


def tree_head_forward(
    h: np.ndarray,
    tree: Tree,
    targets: np.ndarray,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scratch: TreeScratch | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and plain -log p of the targets. Visits only the nodes of their paths.

    h : (N, C) float32;  tree : from make_tree;  targets : (N,) int32, leaf rows
    Returns loss (N,) with smoothing and z-loss, and nll (N,); both float32, nats.
    Raises ValueError if a shape, a dtype or a target is wrong.

    >>> spans = np.array([[0, 1, 1, 2, 3], [1, 3, 2, 2, 3]], np.int32)  # 0, and a node of 1, 2
    >>> tree = make_tree(np.zeros((3, 4), np.float32), np.zeros((1, 4), np.float32), spans)
    >>> nll = tree_head_forward(np.ones((1, 4), np.float32), tree, np.array([2], np.int32))[1]
    >>> round(float(nll[0]), 4)  # ln 4
    1.3863
    """
    _check.array("tree_head_forward", "h", h, (None, tree.weight.shape[1]))
    n, dim = h.shape
    nothing = np.empty((0, dim), np.float32)
    outputs = Outputs(np.empty(n, np.float32), np.empty(n, np.float32), nothing, nothing, nothing)
    options = Options(np.float32(label_smoothing), np.float32(z_loss), backward=False, accumulate=True)
    _run("tree_head_forward", outputs, h, tree, targets, outputs.loss, options, scratch or TreeScratch())
    return outputs.loss, outputs.nll


def tree_head_forward_backward(
    h: np.ndarray,
    tree: Tree,
    targets: np.ndarray,
    loss_weights: np.ndarray,
    dweight: np.ndarray,
    dnodes: np.ndarray,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    accumulate: bool = True,
    scratch: TreeScratch | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Forward and backward pass in one: loss, plain NLL and the gradients of sum(loss_weights * loss).

    loss_weights (N,), dweight (V, C), dnodes (M, C) float32; the other arguments are those of tree_head_forward
    accumulate : add gradients to dweight and dnodes; False replaces them, which is faster than clearing and adding
    Label smoothing is uniform over a node's children, z-loss is z * log(Z)**2 at every node of the path, and the cap
    acts on each logit. A node with a single child costs nothing.
    Returns loss (N,), nll (N,), dh (N, C). Cost 6*C flop per position and child of a node on its path. The bits are the
    same for the same number of threads.
    """
    where = "tree_head_forward_backward"
    _check.array(where, "h", h, (None, tree.weight.shape[1]))
    _check.array(where, "loss_weights", loss_weights, (len(h),))
    _check.array(where, "dweight", dweight, tree.weight.shape)
    _check.array(where, "dnodes", dnodes, tree.nodes.shape)
    n = len(h)
    outputs = Outputs(np.empty(n, np.float32), np.empty(n, np.float32), np.empty(h.shape, np.float32), dweight, dnodes)
    options = Options(np.float32(label_smoothing), np.float32(z_loss), backward=True, accumulate=accumulate)
    _run(where, outputs, h, tree, targets, loss_weights, options, scratch or TreeScratch())
    return outputs.loss, outputs.nll, outputs.dh
