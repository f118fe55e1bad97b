"""The tree head: the product of a softmax at every node on the way to a token, with its loss and gradients.

    log p(token) = sum over the nodes of its path of  logit_child - log sum exp(logits of the node)
    loss = sum over the path of  lse - (1 - s) logit_child - s mean(logits) + z lse**2

with label smoothing s and z-loss z.

A node's logits are cap(h . row) + prior of its tokens' rows (a slice of weight) and its child nodes' rows (a
slice of nodes). Positions are sorted by the leaf row of their target, so that those of every node are one
contiguous range and the node is one GEMM on it.

How the work is shared. `_walk` goes down the visited nodes. Where the work below a node is a large part of
all, the node is split: each thread takes some of its positions (first region), keeps the gradient of the
logits, and each thread then takes some of its rows (second region). Every subtree below the split nodes is a
task: one thread, its own positions and rows, so nothing is written by two; tasks go longest first to the
thread with the least. The normal case is two parallel regions whatever the depth; when the kept logits would
exceed their bound, more rounds are made.

Letters: N positions, V leaves, M nodes below the root, C channels, P threads; J positions of a chunk, K
children. spans (M + 1, 5) int32: token_start, token_end, child_start, child_end, leaf_end of every node; node
m >= 1 has row m - 1 of nodes. Source: Goodman 2001, arXiv:cs/0108006, and Morin & Bengio 2005 for the model;
Grave et al. 2016, arXiv:1609.04309, section 4, for few large products; the arrangement is our own.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._blas import gemm_nn, gemm_nt, gemm_tn, sgemm_address
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel
from flashlm_numba.kernels._math import exp32, row_max
from flashlm_numba.kernels._microkernels import dot_products, short_product
from flashlm_numba.kernels._rows import clear_rows, copy_rows, gather_rows

TOKEN_START, TOKEN_END, CHILD_START, CHILD_END, LEAF_END = range(5)  # columns of spans

SPLIT_FLOATS = 1 << 23  # logits kept of split nodes in a round: 32 MB
OWN_FLOATS = 1 << 22  # logits of a chunk, all threads together: 16 MB
CHUNK = 512  # positions of a node at a time: their logits stay in the second cache
SMALL = 48  # products of a node below which a call of BLAS costs more than the loops
NARROW = 4  # children up to which loops beat BLAS at any number of positions
# Positions of a node up to which register tiles beat BLAS, which packs the rows for each node: nine of ten that a batch
# of 4,096 visits.
THIN = 32
JOINED = 1024  # rows of a root with tokens and nodes up to which each thread copies them together
SHARES = 8  # a subtree of more than 1/(SHARES * P) of the work is split

_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


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


# --- one node ---


@helper
def _is_small(positions, width):
    return width <= NARROW or positions * width <= SMALL


@helper
def dot(a, b):
    total = _ZERO
    for c in range(a.shape[0]):
        total += a[c] * b[c]
    return total


@helper
def _add_scaled(out, factor, x):
    for c in range(out.shape[0]):
        out[c] += factor * x[c]


@helper
def node_products(out, x, tokens, kids, blas):
    """out (J, K) = x (J, C) times the rows of tokens, then of kids (together K)."""
    positions, width = out.shape
    n_tokens = tokens.shape[0]
    if _is_small(positions, width):
        for j in range(positions):
            for k in range(n_tokens):
                out[j, k] = dot(x[j], tokens[k])
            for k in range(width - n_tokens):
                out[j, n_tokens + k] = dot(x[j], kids[k])
    elif positions <= THIN:
        dot_products(out[:, :n_tokens], x, tokens)
        dot_products(out[:, n_tokens:], x, kids)
    else:
        gemm_nt(blas, out[:, :n_tokens], x, tokens, _ZERO)
        gemm_nt(blas, out[:, n_tokens:], x, kids, _ZERO)


@helper
def _find_dx(dx, dlogits, tokens, kids, beta, blas):
    """dx (J, C) = dlogits (J, K) @ rows + beta * dx, beta 0 or 1.   forward: logits = x @ rows.T"""
    positions, width = dlogits.shape
    n_tokens = tokens.shape[0]
    if _is_small(positions, width):
        if beta == 0:
            clear_rows(dx)
        for j in range(positions):
            for k in range(n_tokens):
                _add_scaled(dx[j], dlogits[j, k], tokens[k])
            for k in range(width - n_tokens):
                _add_scaled(dx[j], dlogits[j, n_tokens + k], kids[k])
        return
    if n_tokens > 0:
        if positions <= THIN:
            short_product(dx, dlogits[:, :n_tokens], tokens, beta)
        else:
            gemm_nn(blas, dx, dlogits[:, :n_tokens], tokens, beta)
        beta = _ONE
    if n_tokens < width:
        if positions <= THIN:
            short_product(dx, dlogits[:, n_tokens:], kids, beta)
        else:
            gemm_nn(blas, dx, dlogits[:, n_tokens:], kids, beta)


@helper
def _find_drows(dtokens, dkids, dlogits, x, beta, blas):
    """dtokens, dkids = dlogits (J, K).T @ x (J, C) + beta times themselves.   forward: logits = x @ rows.T"""
    positions, width = dlogits.shape
    n_tokens = dtokens.shape[0]
    if _is_small(positions, width):
        if beta == 0:
            clear_rows(dtokens)
            clear_rows(dkids)
        for k in range(n_tokens):
            for j in range(positions):
                _add_scaled(dtokens[k], dlogits[j, k], x[j])
        for k in range(width - n_tokens):
            for j in range(positions):
                _add_scaled(dkids[k], dlogits[j, n_tokens + k], x[j])
    elif positions <= THIN:
        short_product(dtokens, dlogits[:, :n_tokens].T, x, beta)
        short_product(dkids, dlogits[:, n_tokens:].T, x, beta)
    else:
        gemm_tn(blas, dtokens, dlogits[:, :n_tokens], x, beta)
        gemm_tn(blas, dkids, dlogits[:, n_tokens:], x, beta)


@helper
def finish_logits(row, slope, token_prior, kid_prior, soft_cap):
    """Apply the cap (0: none) and add the priors (empty: none) in place; slope (K,): the cap's derivative."""
    if soft_cap > 0:
        for k in range(row.shape[0]):
            ratio = _tanh32(row[k] / soft_cap)
            slope[k] = _ONE - ratio * ratio
            row[k] = soft_cap * ratio
    n_tokens = token_prior.shape[0]
    for k in range(n_tokens):
        row[k] += token_prior[k]
    for k in range(kid_prior.shape[0]):
        row[n_tokens + k] += kid_prior[k]


@helper
def _softmax_loss(
    logits, slope, loss, nll, rows, weights, token_start, token_end, kid_ends, token_prior, kid_prior,
    smoothing, z_loss, soft_cap, backward,
):  # fmt: skip
    """loss, nll (J,) += this node's share; products (J, K) become the gradient of sum(weights * loss) by
    them.

    rows (J,): leaf rows of the targets, ascending. kid_ends (K,): leaf_end of every child node.
    """
    positions, width = logits.shape
    n_tokens = token_end - token_start
    kid = 0
    for j in range(positions):
        row = logits[j]
        if rows[j] < token_end:
            choice = np.int64(rows[j] - token_start)
        else:
            while rows[j] >= kid_ends[kid]:
                kid += 1
            choice = np.int64(n_tokens + kid)
        finish_logits(row, slope, token_prior, kid_prior, soft_cap)
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
        nll[j] += node_nll
        loss[j] += node_nll + smoothing * (chosen - linear / np.float32(width)) + z_loss * lse * lse
        if backward:
            w = weights[j]
            scale = w * (_ONE + _TWO * z_loss * lse) / total
            spread = w * smoothing / np.float32(width)
            for k in range(width):
                row[k] = row[k] * scale - spread
            row[choice] -= w * (_ONE - smoothing)
            if soft_cap > 0:
                for k in range(width):
                    row[k] *= slope[k]


@helper
def _node_positions(
    logits, spare, joined, loss, nll, dhs, lo, hi, span, hs, rows, weights, weight, nodes, leaf_ends, log_prior,
    node_log_prior, smoothing, z_loss, soft_cap, backward, beta, blas,
):  # fmt: skip
    """Sorted positions lo..hi at one node: loss, the gradient of the products (left in logits) and of h.

    beta: 0 where dhs holds nothing yet, 1 where the node's share is added to it.
    """
    token_start, token_end, kid_start, kid_end = span[0], span[1], span[2] - 1, span[3] - 1
    tokens, kids = weight[token_start:token_end], nodes[kid_start:kid_end]
    token_prior = log_prior[token_start:token_end] if log_prior.shape[0] > 0 else log_prior
    kid_prior = node_log_prior[kid_start:kid_end] if node_log_prior.shape[0] > 0 else node_log_prior
    if joined.shape[0] > 0:
        tokens, kids = joined, nodes[kid_start:kid_start]
    node_products(logits, hs[lo:hi], tokens, kids, blas)
    _softmax_loss(
        logits, spare, loss[lo:hi], nll[lo:hi], rows[lo:hi], weights[lo:hi], token_start, token_end,
        leaf_ends[kid_start + 1 : kid_end + 1], token_prior, kid_prior, smoothing, z_loss, soft_cap, backward,
    )  # fmt: skip
    if backward:
        _find_dx(dhs[lo:hi], logits, tokens, kids, beta, blas)


@helper
def node_width(span):
    return np.int64(span[1] - span[0]) + np.int64(span[3] - span[2])


# --- sharing the work ---


@helper
def _lower_bound(values, lo, hi, value):
    """First index in [lo, hi) of the ascending values that is not below value."""
    while lo < hi:
        middle = (lo + hi) // 2
        if values[middle] < value:
            lo = middle + 1
        else:
            hi = middle
    return lo


@serial_kernel
def _walk(node, begin, end, above, cost, split, task, task_begin, task_end, task_cost, task_first, order,
          rows, spans, leaf_ends, share, own_floats):  # fmt: skip
    """Visited nodes and tasks of the ascending leaf rows (N,); returns their numbers.

    Per visit: node, its positions [begin, end), the visit above, cost of its subtree, whether it is split,
    its task (-1 if split). Per task: positions, cost, and visits order[task_first[t] : task_first[t + 1]],
    parents first. Subtrees of more than share of the cost, or with a node wider than own_floats, are split at
    the top.
    """
    node[0], begin[0], end[0], above[0] = 0, 0, rows.shape[0], -1
    visits, v = 1, 0
    while v < visits:
        span = spans[node[v]]
        at = _lower_bound(rows, begin[v], end[v], span[1])
        kid = np.int64(span[2])
        while at < end[v]:
            kid = _lower_bound(leaf_ends, kid, np.int64(span[3]), rows[at] + 1)
            last = _lower_bound(rows, at, end[v], leaf_ends[kid])
            node[visits], begin[visits], end[visits], above[visits] = kid, at, last, v
            visits += 1
            at = last
        v += 1
    for v in range(visits):
        width = node_width(spans[node[v]])
        # in products; reading the rows costs as much as ten positions, and a call something
        cost[v] = width * (end[v] - begin[v] + 10.0) + (10.0 if width <= NARROW else 100.0)
        split[v] = width > own_floats
    for i in range(visits - 1):
        v = visits - 1 - i
        cost[above[v]] += cost[v]
        split[above[v]] |= split[v]
    tasks = 0
    limit = cost[0] * share
    for v in range(visits):
        open_above = v == 0 or split[above[v]]
        split[v] |= open_above and cost[v] > limit
        if split[v]:
            # positions whose target is a token of this node are finished with it: a task without visits
            task[v] = -1
            last = _lower_bound(rows, begin[v], end[v], spans[node[v], 1])
            if last > begin[v]:
                task_begin[tasks], task_end[tasks], task_cost[tasks] = begin[v], last, 0
                tasks += 1
        elif open_above:
            task_begin[tasks], task_end[tasks], task_cost[tasks] = begin[v], end[v], cost[v]
            task[v] = tasks
            tasks += 1
        else:
            task[v] = task[above[v]]
    for t in range(tasks + 1):
        task_first[t] = 0
    for v in range(visits):
        if task[v] >= 0:
            task_first[task[v] + 1] += 1
    for t in range(tasks):
        task_first[t + 1] += task_first[t]
    for v in range(visits):
        if task[v] >= 0:
            order[task_first[task[v]]] = v
            task_first[task[v]] += 1
    for i in range(tasks):
        task_first[tasks - i] = task_first[tasks - i - 1]
    task_first[0] = 0
    return visits, tasks


@serial_kernel
def _deal(owner, load, by_cost, task_cost):
    """owner (T,): tasks in the order by_cost (longest first) go to the thread with the least load (P,)."""
    for i in range(by_cost.shape[0]):
        t = by_cost[i]
        least = 0
        for thread in range(load.shape[0]):
            if load[thread] < load[least]:
                least = thread
        owner[t] = least
        load[least] += task_cost[t] + 1


@dataclass
class _Plan:
    """What `_walk` found, arranged for the kernel; all arrays int64."""

    pieces: np.ndarray  # (S, 5): node, positions begin and end, offset in the kept logits, 1 for a node's first piece
    piece_first: np.ndarray  # (R + 1,): pieces of each round
    bounds: np.ndarray  # (R, P + 1): positions of each thread in each round
    kept: int  # floats of kept logits
    visits: np.ndarray  # (I, 4): node, positions begin and end, 0; grouped by task
    task_positions: np.ndarray  # (T, 2)
    task_first: np.ndarray  # (T + 1,): visits of each task
    tasks: np.ndarray  # (T,): tasks by thread, longest first
    thread_first: np.ndarray  # (P + 1,): tasks of each thread
    idle_tokens: np.ndarray  # (any, 2): first and last + 1 of the leaf rows without a gradient
    idle_nodes: np.ndarray  # (any, 2): the same of the nodes' rows


def _gaps(start: np.ndarray, end: np.ndarray, size: int) -> np.ndarray:
    """What of [0, size) lies outside the disjoint ranges [start, end), some of them empty: (G, 2) int64."""
    order = np.argsort(start + end)  # an empty range at the start of another comes before it
    low, high = np.concatenate([[0], end[order]]), np.concatenate([start[order], [size]])
    return np.stack([low, high], axis=1)[low < high].astype(np.int64)


def _bounds(pieces: list[tuple[int, int, int, int, bool]], width: np.ndarray, n: int, threads: int) -> np.ndarray:
    """Positions (P + 1,) that give the threads equal shares of the pieces; every position costs a little."""
    edges = sorted({0, n, *(piece[1] for piece in pieces), *(piece[2] for piece in pieces)})
    total = [0.0]  # cost of all positions before an edge
    for low, high in itertools.pairwise(edges):
        cost = 20 + sum(int(width[node]) for node, begin, end, *_ in pieces if begin <= low < end)
        total.append(total[-1] + cost * (high - low))
    return np.rint(np.interp(total[-1] * np.arange(threads + 1) / threads, total, edges)).astype(np.int64)


def _make_plan(rows: np.ndarray, spans: np.ndarray, leaf_ends: np.ndarray, depth: int, threads: int) -> _Plan:
    n = len(rows)
    most = min(len(spans), n * depth)
    node, begin, end, above, task, order, split = (np.empty(most, np.int64) for _ in range(7))
    cost = np.empty(most)
    task_begin, task_end, task_first = (np.empty(2 * most + 1, np.int64) for _ in range(3))
    task_cost = np.empty(2 * most)
    share = 1 / (SHARES * threads) if threads > 1 else 1.0
    visits, tasks = _walk(
        node, begin, end, above, cost, split, task, task_begin, task_end, task_cost, task_first, order,
        rows, spans, leaf_ends, share, OWN_FLOATS // threads,
    )  # fmt: skip
    width = spans[:, TOKEN_END] - spans[:, TOKEN_START] + spans[:, CHILD_END] - spans[:, CHILD_START]
    pieces: list[tuple[int, int, int, int, bool]] = []
    piece_first, bounds, used, kept = [0], [], 0, 0
    for v in np.flatnonzero(split[:visits]):
        m, at = int(node[v]), int(begin[v])
        if width[m] < 2:
            continue
        while at < end[v]:
            room = (SPLIT_FLOATS - used) // int(width[m])
            if used and room < min(64 * threads, end[v] - at):
                bounds.append(_bounds(pieces[piece_first[-1] :], width, n, threads))
                piece_first.append(len(pieces))
                used = 0
                continue
            last = min(int(end[v]), at + max(1, room))
            pieces.append((m, at, last, used, at == begin[v]))
            used += (last - at) * int(width[m])
            kept, at = max(kept, used), last
    bounds.append(_bounds(pieces[piece_first[-1] :], width, n, threads))
    piece_first.append(len(pieces))

    owner, by_cost = np.empty(tasks, np.int64), np.argsort(-task_cost[:tasks], kind="stable")
    _deal(owner, np.zeros(threads), by_cost, task_cost)
    dealt = owner[by_cost]
    chosen = order[: task_first[tasks]]
    busy = spans[node[:visits][width[node[:visits]] > 1]]
    return _Plan(
        pieces=np.array(pieces, np.int64).reshape(-1, 5),
        piece_first=np.array(piece_first, np.int64),
        bounds=np.stack(bounds).astype(np.int64),
        kept=kept,
        visits=np.stack([node[chosen], begin[chosen], end[chosen], np.zeros_like(chosen)], axis=1),
        task_positions=np.stack([task_begin[:tasks], task_end[:tasks]], axis=1),
        task_first=task_first[: tasks + 1],
        tasks=by_cost[np.argsort(dealt, kind="stable")],
        thread_first=np.concatenate([[0], np.cumsum(np.bincount(dealt, minlength=threads))]).astype(np.int64),
        idle_tokens=_gaps(busy[:, TOKEN_START], busy[:, TOKEN_END], int(spans[0, LEAF_END])),
        idle_nodes=_gaps(busy[:, CHILD_START] - 1, busy[:, CHILD_END] - 1, len(spans) - 1),
    )


# --- the kernel ---


@helper
def _clear_ranges(out, ranges, thread, threads):
    """A thread's share of the rows in the ranges (G, 2) becomes zero."""
    total = np.int64(0)
    for i in range(ranges.shape[0]):
        total += ranges[i, 1] - ranges[i, 0]
    mine, ends = thread * total // threads, (thread + 1) * total // threads
    before = np.int64(0)
    for i in range(ranges.shape[0]):
        low, count = ranges[i, 0], ranges[i, 1] - ranges[i, 0]
        first, last = min(max(mine - before, 0), count), min(max(ends - before, 0), count)
        clear_rows(out[low + first : low + last])
        before += count


@helper
def _join(out, tokens, kids):
    """out (K, C) = rows of tokens, then of kids; nothing where out is empty."""
    if out.shape[0] > 0:
        copy_rows(out[: tokens.shape[0]], tokens)
        copy_rows(out[tokens.shape[0] :], kids)


@helper
def _scatter(dh, loss, nll, begin, end, dhs, sorted_loss, order, backward):
    for i in range(end - begin):
        to = order[begin + i]
        loss[to] = sorted_loss[0, begin + i]
        nll[to] = sorted_loss[1, begin + i]
        if backward:
            for c in range(dh.shape[1]):
                dh[to, c] = dhs[begin + i, c]


@helper
def _split_drows(dweight, dnodes, root, kept, pieces, hs, spans, accumulate, thread, threads, blas):
    """A thread's part of the gradients of the split nodes' rows: whole rows, an equal share of the work.

    root: see _tree_head; it takes the root's part, which is one product as well.
    """
    total = np.int64(0)
    for p in range(pieces.shape[0]):
        total += (pieces[p, 2] - pieces[p, 1]) * node_width(spans[pieces[p, 0]])
    mine, ends = thread * total // threads, (thread + 1) * total // threads
    before = np.int64(0)
    for p in range(pieces.shape[0]):
        begin, end, offset = pieces[p, 1], pieces[p, 2], pieces[p, 3]
        span = spans[pieces[p, 0]]
        width, positions = node_width(span), end - begin
        # row k is the work [before + k * positions, ...): it belongs to the thread in whose share that begins
        first = min(max((mine - before + positions - 1) // positions, 0), width)
        last = min(max((ends - before + positions - 1) // positions, 0), width)
        before += positions * width
        if first >= last:
            continue
        dlogits = kept[offset : offset + positions * width].reshape(positions, width)
        n_tokens = np.int64(span[1] - span[0])
        beta = _ONE if accumulate or pieces[p, 4] == 0 else _ZERO
        if pieces[p, 0] == 0 and root.shape[0] > 0:
            found = root[: last - first]
            gemm_tn(blas, found, dlogits[:, first:last], hs[begin:end], _ZERO)
            for k in range(first, last):
                row = dweight[span[0] + k] if k < n_tokens else dnodes[span[2] - 1 + k - n_tokens]
                if beta == 0:
                    for c in range(row.shape[0]):
                        row[c] = found[k - first, c]
                else:
                    _add_scaled(row, _ONE, found[k - first])
            continue
        if first < n_tokens:
            until = min(last, n_tokens)
            gemm_tn(blas, dweight[span[0] + first : span[0] + until], dlogits[:, first:until], hs[begin:end], beta)
        if last > n_tokens:
            since = max(first, n_tokens)
            kid = span[2] - 1 - n_tokens
            gemm_tn(blas, dnodes[kid + since : kid + last], dlogits[:, since:last], hs[begin:end], beta)


@helper
def _visit(
    dweight, dnodes, hs, dhs, sorted_loss, buffer, spare, root, items, mine, ends, keep, rows, weights, weight,
    nodes, spans, leaf_ends, log_prior, node_log_prior, smoothing, z_loss, soft_cap, backward, accumulate, blas,
):  # fmt: skip
    """Positions mine..ends of the nodes in items (I, 4 or more), parents first: losses, dhs and the nodes' gradients.

    With keep, the gradients of the products stay in buffer at the items' offsets, for `_split_drows`; else
    they are used up at once.
    """
    for i in range(items.shape[0]):
        span = spans[items[i, 0]]
        width = node_width(span)
        at, end = max(mine, items[i, 1]), min(ends, items[i, 2])
        if width < 2 or at >= end:  # a single child has probability one
            continue
        step = CHUNK if keep else min(CHUNK, buffer.shape[0] // width)
        while at < end:
            last = min(at + step, end)
            offset = items[i, 3] + (at - items[i, 1]) * width if keep else 0
            logits = buffer[offset : offset + (last - at) * width].reshape(last - at, width)
            beta = _ZERO if items[i, 0] == 0 else _ONE  # every position comes by the root, first of all
            joined = root if items[i, 0] == 0 else root[:0]
            _node_positions(
                logits, spare, joined, sorted_loss[0], sorted_loss[1], dhs, at, last, span, hs, rows, weights, weight,
                nodes, leaf_ends, log_prior, node_log_prior, smoothing, z_loss, soft_cap, backward, beta, blas,
            )  # fmt: skip
            if backward and not keep:
                dtokens, dkids = dweight[span[0] : span[1]], dnodes[span[2] - 1 : span[3] - 1]
                beta = _ONE if accumulate or at > items[i, 1] else _ZERO
                _find_drows(dtokens, dkids, logits, hs[at:last], beta, blas)
            at = last


@kernel
def _tree_head(
    dh, loss, nll, dweight, dnodes, hs, dhs, sorted_loss, kept, own, spares, roots,
    pieces, piece_first, bounds, visits, task_positions, task_first, tasks, thread_first, idle_tokens, idle_nodes,
    h, order, rows, weights, weight, nodes, spans, leaf_ends, log_prior, node_log_prior,
    smoothing, z_loss, soft_cap, backward, accumulate, blas, threads,
):  # fmt: skip
    """loss, nll (N,) = and, if backward, dh (N, C) =, dweight (V, C), dnodes (M, C) =, or += with accumulate.

    Scratch: hs, dhs (N, C), sorted_loss (2, N), kept (any,), own (P, any), spares (P, widest),
    roots (P, width of the root, C), or (P, 0, C) where its rows lie together as they are.
    order (N,) sorts the positions; rows and weights (N,) are sorted by it. The rest: see _Plan. Each round is
    two regions, of one body so that it is compiled once: in the first, thread p owns the positions from
    bounds[r, p] to bounds[r, p + 1] of the split nodes, in the second a share of their rows and, in the last
    round, its tasks.
    """
    rounds = piece_first.shape[0] - 1
    for region in range(2 * rounds):
        r, first_half = region // 2, region % 2 == 0
        split = pieces[piece_first[r] : piece_first[r + 1]]
        for index in prange(threads):
            thread = np.int64(index)  # a prange index is unsigned; mixed with signed, a float
            begin, end = bounds[r, thread], bounds[r, thread + 1]
            lists, items, buffer = 1, split, kept
            if region == 0:
                gather_rows(hs[begin:end], h, order[begin:end])
                clear_rows(sorted_loss[:, begin:end])
                if backward and node_width(spans[0]) < 2:  # else the root's share is the first
                    clear_rows(dhs[begin:end])
                if backward and not accumulate:
                    _clear_ranges(dweight, idle_tokens, thread, threads)
                    _clear_ranges(dnodes, idle_nodes, thread, threads)
            if first_half:
                _join(roots[thread], weight[spans[0, 0] : spans[0, 1]], nodes[spans[0, 2] - 1 : spans[0, 3] - 1])
            else:
                if backward:
                    _split_drows(
                        dweight, dnodes, roots[thread], kept, split, hs, spans, accumulate, thread, threads, blas
                    )
                lists = thread_first[thread + 1] - thread_first[thread] if r == rounds - 1 else 0
                buffer = own[thread]
            for i in range(lists):
                if not first_half:
                    t = tasks[thread_first[thread] + i]
                    items = visits[task_first[t] : task_first[t + 1]]
                    begin, end = task_positions[t, 0], task_positions[t, 1]
                _visit(
                    dweight, dnodes, hs, dhs, sorted_loss, buffer, spares[thread], roots[thread], items, begin, end,
                    first_half, rows, weights, weight, nodes, spans, leaf_ends, log_prior, node_log_prior,
                    smoothing, z_loss, soft_cap, backward, accumulate, blas,
                )  # fmt: skip
                if not first_half:
                    _scatter(dh, loss, nll, begin, end, dhs, sorted_loss, order, backward)


# --- public functions ---


@dataclass
class TreeScratch:
    """Buffers reused from call to call, grown as needed: at most 128 MB for N = 8,192 and C = 256."""

    buffers: dict[str, np.ndarray] = field(default_factory=dict)

    def take(self, name: str, size: int) -> np.ndarray:
        """A float32 buffer (size,) of this name; its contents are whatever was there."""
        if name not in self.buffers or self.buffers[name].size < size:
            self.buffers[name] = np.empty(size, np.float32)
        return self.buffers[name][:size]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self.buffers.values())


def tree_depth(spans: np.ndarray) -> int:
    """Nodes on the longest path of a tree, the root included; spans (M + 1, 5) int32."""
    # breadth first: each level's child nodes are the next level
    depth, begin, end = 0, 0, 1
    while begin < end:
        depth += 1
        begin, end = end, int(spans[end - 1, CHILD_END])
    return depth


def check_tree(where, h, weight, nodes, spans, log_prior, node_log_prior):
    _check.array(where, "weight", weight, (None, None))
    vocab, dim = weight.shape
    _check.array(where, "h", h, (None, dim))
    _check.array(where, "spans", spans, (None, 5), np.int32)
    _check.array(where, "nodes", nodes, (len(spans) - 1, dim))
    if spans[0, LEAF_END] != vocab:
        raise ValueError(f"{where}: the tree has {spans[0, LEAF_END]} leaves, but weight has {vocab} rows")
    if (log_prior is None) != (node_log_prior is None):
        raise ValueError(f"{where}: log_prior and node_log_prior must be given together")
    if log_prior is None:
        return np.empty(0, np.float32), np.empty(0, np.float32)
    _check.array(where, "log_prior", log_prior, (vocab,))
    _check.array(where, "node_log_prior", node_log_prior, (len(spans) - 1,))
    return log_prior, node_log_prior


def widest_node(spans: np.ndarray) -> int:
    return int((spans[:, 1] - spans[:, 0] + spans[:, 3] - spans[:, 2]).max())


def _run(
    where, h, weight, nodes, spans, targets, weights, dweight, dnodes, log_prior, node_log_prior,
    label_smoothing, z_loss, soft_cap, scratch, backward, accumulate,
):  # fmt: skip
    log_prior, node_log_prior = check_tree(where, h, weight, nodes, spans, log_prior, node_log_prior)
    n, dim = h.shape
    _check.array(where, "targets", targets, (n,), np.int32)
    _check.indices(where, "targets", targets, len(weight), "check the tokenizer's vocabulary size")
    loss, nll = np.empty(n, np.float32), np.empty(n, np.float32)
    dh = np.empty((n, dim) if backward else (0, dim), np.float32)
    if n == 0:
        if not accumulate:
            dweight[...], dnodes[...] = 0, 0
        return loss, nll, dh
    s = scratch or TreeScratch()
    threads = numba.get_num_threads()
    # a stable sort of 16-bit numbers is a radix sort, several times faster
    keys = targets.astype(np.uint16) if len(weight) <= 1 << 16 else targets
    order = np.argsort(keys, kind="stable")
    rows = targets[order]
    leaf_ends = np.ascontiguousarray(spans[:, LEAF_END])
    plan = _make_plan(rows, spans, leaf_ends, tree_depth(spans), threads)
    widest = widest_node(spans)
    own = min(max(OWN_FLOATS // threads, 1), CHUNK * widest)
    # the root, which every position visits, as one product instead of two
    n_tokens, n_kids = (
        int(spans[0, TOKEN_END] - spans[0, TOKEN_START]),
        int(spans[0, CHILD_END] - spans[0, CHILD_START]),
    )
    joined = n_tokens + n_kids if n_tokens and n_kids and n_tokens + n_kids <= JOINED else 0
    _tree_head(
        dh, loss, nll, dweight, dnodes,
        s.take("hs", n * dim).reshape(n, dim),
        s.take("dhs", n * dim).reshape(n, dim) if backward else dh,
        s.take("loss", 2 * n).reshape(2, n),
        s.take("kept", plan.kept),
        s.take("own", threads * own).reshape(threads, own),
        s.take("spares", threads * widest).reshape(threads, widest),
        s.take("roots", threads * joined * dim).reshape(threads, joined, dim),
        plan.pieces, plan.piece_first, plan.bounds, plan.visits, plan.task_positions, plan.task_first,
        plan.tasks, plan.thread_first, plan.idle_tokens, plan.idle_nodes,
        h, order, rows, weights[order] if backward else loss, weight, nodes, spans, leaf_ends,
        log_prior, node_log_prior, np.float32(label_smoothing), np.float32(z_loss), np.float32(soft_cap or 0),
        backward, accumulate, sgemm_address(), threads,
    )  # fmt: skip
    return loss, nll, dh


def tree_head_forward(
    h: np.ndarray,
    weight: np.ndarray,
    nodes: np.ndarray,
    spans: np.ndarray,
    targets: np.ndarray,
    *,
    log_prior: np.ndarray | None = None,
    node_log_prior: np.ndarray | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    scratch: TreeScratch | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and plain -log p of the targets, visiting the nodes of their paths only.

    h (N, C), weight (V, C) rows in leaf order, nodes (M, C) float32; spans (M + 1, 5) int32, see the module;
    targets (N,) int32, leaf rows; log_prior (V,), node_log_prior (M,) float32 added to the logits after the
    cap. Returns loss (N,), with smoothing and z-loss, and nll (N,): float32, nats. Raises ValueError if a
    shape, a dtype or a target is wrong.

    >>> spans = np.array([[0, 1, 1, 2, 3], [1, 3, 2, 2, 3]], np.int32)  # 0, and a node of 1, 2
    >>> weight, nodes = np.zeros((3, 4), np.float32), np.zeros((1, 4), np.float32)
    >>> nll = tree_head_forward(np.ones((1, 4), np.float32), weight, nodes, spans, np.array([2], np.int32))[1]
    >>> round(float(nll[0]), 4)  # ln 4
    1.3863
    """
    loss, nll, _ = _run(
        "tree_head_forward", h, weight, nodes, spans, targets, h, weight, nodes, log_prior, node_log_prior,
        label_smoothing, z_loss, soft_cap, scratch, False, True,
    )  # fmt: skip
    return loss, nll


def tree_head_forward_backward(
    h: np.ndarray,
    weight: np.ndarray,
    nodes: np.ndarray,
    spans: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    dweight: np.ndarray,
    dnodes: np.ndarray,
    *,
    log_prior: np.ndarray | None = None,
    node_log_prior: np.ndarray | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    accumulate: bool = True,
    scratch: TreeScratch | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, plain NLL and the gradients of sum(weights * loss): the forward and backward pass in one.

    As tree_head_forward, and weights (N,), dweight (V, C), dnodes (M, C) float32: gradients are added to these, or,
    without accumulate, take the place of what was there, which is faster than clearing and adding. The smoothing of a
    node is uniform over its children, z-loss is z * log(Z)**2 at every node of the path, the cap acts on each logit; a
    node with a single child costs nothing. Returns loss (N,), nll (N,), dh (N, C). Cost 6*C flop per position and child
    of a node on its path. The same bits for the same number of threads.
    """
    where = "tree_head_forward_backward"
    _check.array(where, "weights", weights, (len(h),))
    _check.array(where, "dweight", dweight, weight.shape)
    _check.array(where, "dnodes", dnodes, nodes.shape)
    return _run(
        where, h, weight, nodes, spans, targets, weights, dweight, dnodes, log_prior, node_log_prior,
        label_smoothing, z_loss, soft_cap, scratch, True, accumulate,
    )  # fmt: skip
