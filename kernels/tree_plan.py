"""Division of a tree head's work among the threads: the nodes that a batch visits are split or grouped into tasks.

`_walk` descends through the visited nodes. If the work below a node is a large part of the total, the node is split:
all threads share its positions, and then its rows. Every subtree below the split nodes is a task of one thread, with
positions and rows that no other thread writes. Tasks are assigned longest first to the thread with the least work. The
logits of split nodes are stored up to a bound; if they would exceed it, there are more rounds.

Letters: N positions, V leaves, M nodes below the root, P threads; R rounds, S pieces of split nodes, I visits of tasks,
T tasks.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from flashlm_numba.kernels._jit import helper, serial_kernel
from flashlm_numba.kernels.tree_node import (
    CHILD_END,
    CHILD_START,
    LEAF_END,
    NARROW,
    TOKEN_END,
    TOKEN_START,
    Tree,
    node_widths,
    span_of,
)

SPLIT_FLOATS = 1 << 23  # logits kept of split nodes in a round: 32 MB
TASK_FLOATS = 1 << 22  # logits of a chunk, all threads together: 16 MB
CHUNK = 512  # positions of a node at a time: their logits stay in the second cache
SHARES = 8  # a subtree of more than 1/(SHARES * P) of the work is split


class Plan(NamedTuple):
    """The work of every thread; all arrays are int64. Positions are those of the sorted batch."""

    piece_node: np.ndarray  # (S,): a split node, or a part of its positions
    piece_begin: np.ndarray  # (S,): its positions
    piece_end: np.ndarray  # (S,)
    piece_offset: np.ndarray  # (S,): where its logits begin in split_logits
    piece_is_first: np.ndarray  # (S,): 1 for the first piece of a node, else 0
    round_first: np.ndarray  # (R + 1,): pieces of each round
    bounds: np.ndarray  # (R, P + 1): positions of each thread in each round
    visit_node: np.ndarray  # (I,): a node of a task, parents first; grouped by task
    visit_begin: np.ndarray  # (I,): its positions
    visit_end: np.ndarray  # (I,)
    task_begin: np.ndarray  # (T,): positions of each task
    task_end: np.ndarray  # (T,)
    task_first: np.ndarray  # (T + 1,): visits of each task
    tasks: np.ndarray  # (T,): tasks by thread, longest first
    thread_first: np.ndarray  # (P + 1,): tasks of each thread
    idle_token_start: np.ndarray  # (any,): ranges of the leaf rows without a gradient
    idle_token_end: np.ndarray  # (any,)
    idle_node_start: np.ndarray  # (any,): the same of the rows of nodes
    idle_node_end: np.ndarray  # (any,)
    split_floats: int  # floats of split_logits
    task_floats: int  # floats of task_logits, of each thread


class Walk(NamedTuple):
    """The output of `_walk`, in arrays that are at least as large as needed."""

    node: np.ndarray  # (any,) int64: per visit, the node,
    begin: np.ndarray  # int64: its positions,
    end: np.ndarray  # int64
    above: np.ndarray  # int64: the visit above,
    cost: np.ndarray  # float64: cost of its subtree,
    split: np.ndarray  # bool: whether it is split,
    task: np.ndarray  # int64: its task, or -1 if it is split
    task_begin: np.ndarray  # (any,) int64: per task, its positions,
    task_end: np.ndarray  # int64
    task_cost: np.ndarray  # float64
    task_first: np.ndarray  # int64: its visits are order[task_first[t] : task_first[t + 1]]
    order: np.ndarray  # (any,) int64: visits grouped by task, parents first


class Piece(NamedTuple):
    """A split node, or as many of its positions as fit into a round."""

    node: int
    begin: int
    end: int
    offset: int  # of its logits
    is_first: bool  # of the node


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


@helper
def _find_visits(walk, rows, spans, leaf_ends):
    """Fill in node, begin, end and above, breadth first; returns the number of visits."""
    walk.node[0], walk.begin[0], walk.end[0], walk.above[0] = 0, 0, rows.shape[0], -1
    visits, v = 1, 0
    while v < visits:
        span, end = span_of(spans, walk.node[v]), walk.end[v]
        at = _lower_bound(rows, walk.begin[v], end, span.token_end)
        child = span.child_start
        while at < end:
            child = _lower_bound(leaf_ends, child, span.child_end, rows[at] + 1)
            last = _lower_bound(rows, at, end, leaf_ends[child])
            walk.node[visits], walk.begin[visits], walk.end[visits], walk.above[visits] = child, at, last, v
            visits += 1
            at = last
        v += 1
    return visits


@helper
def _find_costs(walk, visits, spans, task_floats):
    """Fill in the cost of every subtree, and split: whether it holds a node wider than task_floats."""
    for v in range(visits):
        width = span_of(spans, walk.node[v]).width
        # in products; reading the rows costs as much as ten positions, and a call something
        positions = walk.end[v] - walk.begin[v]
        walk.cost[v] = width * (positions + 10.0) + (10.0 if width <= NARROW else 100.0)
        walk.split[v] = width > task_floats
    for i in range(visits - 1):
        v = visits - 1 - i
        walk.cost[walk.above[v]] += walk.cost[v]
        walk.split[walk.above[v]] |= walk.split[v]


@helper
def _make_tasks(walk, visits, rows, spans, share):
    """Split subtrees of more than share of the cost too, from the top; fill in the tasks; returns their number."""
    tasks = 0
    limit = walk.cost[0] * share
    for v in range(visits):
        open_above = v == 0 or walk.split[walk.above[v]]
        walk.split[v] |= open_above and walk.cost[v] > limit
        if walk.split[v]:
            # positions whose target is a token of this node are finished with it: a task without visits
            walk.task[v] = -1
            last = _lower_bound(rows, walk.begin[v], walk.end[v], spans[walk.node[v], TOKEN_END])
            if last > walk.begin[v]:
                walk.task_begin[tasks], walk.task_end[tasks], walk.task_cost[tasks] = walk.begin[v], last, 0
                tasks += 1
        elif open_above:
            walk.task_begin[tasks], walk.task_end[tasks] = walk.begin[v], walk.end[v]
            walk.task_cost[tasks] = walk.cost[v]
            walk.task[v] = tasks
            tasks += 1
        else:
            walk.task[v] = walk.task[walk.above[v]]
    return tasks


@helper
def _group_visits(walk, visits, tasks):
    """Fill in order and task_first: a counting sort of the visits by task."""
    task, task_first = walk.task, walk.task_first
    for t in range(tasks + 1):
        task_first[t] = 0
    for v in range(visits):
        if task[v] >= 0:
            task_first[task[v] + 1] += 1
    for t in range(tasks):
        task_first[t + 1] += task_first[t]
    for v in range(visits):
        if task[v] >= 0:
            walk.order[task_first[task[v]]] = v
            task_first[task[v]] += 1
    for i in range(tasks):
        task_first[tasks - i] = task_first[tasks - i - 1]
    task_first[0] = 0


@serial_kernel
def _walk(walk, rows, spans, leaf_ends, share, task_floats):
    """Visited nodes and tasks of the ascending leaf rows (N,); returns their numbers.

    Subtrees of more than share of the cost, or with a node wider than task_floats, are split at the top.
    """
    visits = _find_visits(walk, rows, spans, leaf_ends)
    _find_costs(walk, visits, spans, task_floats)
    tasks = _make_tasks(walk, visits, rows, spans, share)
    _group_visits(walk, visits, tasks)
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


def _empty_walk(most: int) -> Walk:
    """Room for this many visits, and for the tasks that they can give."""
    node, begin, end, above, task, order = (np.empty(most, np.int64) for _ in range(6))
    task_begin, task_end, task_first = (np.empty(2 * most + 1, np.int64) for _ in range(3))
    return Walk(
        node=node,
        begin=begin,
        end=end,
        above=above,
        cost=np.empty(most),
        split=np.empty(most, np.bool_),
        task=task,
        task_begin=task_begin,
        task_end=task_end,
        task_cost=np.empty(2 * most),
        task_first=task_first,
        order=order,
    )


def _gaps(start: np.ndarray, end: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """What of [0, size) lies outside the disjoint ranges [start, end), some of them empty: starts and ends (G,)."""
    order = np.argsort(start + end)  # an empty range at the start of another comes before it
    low, high = np.concatenate([[0], end[order]]), np.concatenate([start[order], [size]])
    return low[low < high].astype(np.int64), high[low < high].astype(np.int64)


def _bounds(pieces: list[Piece], width: np.ndarray, n: int, threads: int) -> np.ndarray:
    """Positions (P + 1,) that give the threads equal shares of the pieces; every position costs a little."""
    edges = sorted({0, n, *(piece.begin for piece in pieces), *(piece.end for piece in pieces)})
    total = [0.0]  # cost of all positions before an edge
    for low, high in itertools.pairwise(edges):
        cost = 20 + sum(int(width[piece.node]) for piece in pieces if piece.begin <= low < piece.end)
        total.append(total[-1] + cost * (high - low))
    return np.rint(np.interp(total[-1] * np.arange(threads + 1) / threads, total, edges)).astype(np.int64)


def _cut_pieces(
    walk: Walk, visits: int, width: np.ndarray, n: int, threads: int
) -> tuple[list[Piece], list[int], list[np.ndarray]]:
    """The split nodes as pieces; the first piece of each round and one past the last; the bounds of each round."""
    pieces: list[Piece] = []
    round_first, bounds, used = [0], [], 0
    for v in np.flatnonzero(walk.split[:visits]):
        node, begin, end = int(walk.node[v]), int(walk.begin[v]), int(walk.end[v])
        if width[node] < 2:
            continue
        at = begin
        while at < end:
            room = (SPLIT_FLOATS - used) // int(width[node])
            if used and room < min(64 * threads, end - at):
                bounds.append(_bounds(pieces[round_first[-1] :], width, n, threads))
                round_first.append(len(pieces))
                used = 0
                continue
            last = min(end, at + max(1, room))
            pieces.append(Piece(node, at, last, used, at == begin))
            used += (last - at) * int(width[node])
            at = last
    bounds.append(_bounds(pieces[round_first[-1] :], width, n, threads))
    round_first.append(len(pieces))
    return pieces, round_first, bounds


def make_plan(rows: np.ndarray, tree: Tree, threads: int) -> Plan:
    """The plan for ascending leaf rows (N,) int32, N >= 1, and this number of threads."""
    spans = tree.spans
    walk = _empty_walk(min(len(spans), len(rows) * tree.depth))
    share = 1 / (SHARES * threads) if threads > 1 else 1.0
    visits, tasks = _walk(walk, rows, spans, tree.leaf_ends, share, TASK_FLOATS // threads)
    width = node_widths(spans)
    pieces, round_first, bounds = _cut_pieces(walk, visits, width, len(rows), threads)

    owner, by_cost = np.empty(tasks, np.int64), np.argsort(-walk.task_cost[:tasks], kind="stable")
    _deal(owner, np.zeros(threads), by_cost, walk.task_cost)
    dealt = owner[by_cost]
    chosen = walk.order[: walk.task_first[tasks]]
    visited = walk.node[:visits]
    busy = spans[visited[width[visited] > 1]]
    idle_token_start, idle_token_end = _gaps(busy[:, TOKEN_START], busy[:, TOKEN_END], int(spans[0, LEAF_END]))
    idle_node_start, idle_node_end = _gaps(busy[:, CHILD_START] - 1, busy[:, CHILD_END] - 1, len(spans) - 1)
    columns = np.array(pieces, np.int64).reshape(-1, len(Piece._fields)).T
    piece_node, piece_begin, piece_end, piece_offset, piece_is_first = np.ascontiguousarray(columns)
    return Plan(
        piece_node=piece_node,
        piece_begin=piece_begin,
        piece_end=piece_end,
        piece_offset=piece_offset,
        piece_is_first=piece_is_first,
        round_first=np.array(round_first, np.int64),
        bounds=np.stack(bounds).astype(np.int64),
        visit_node=walk.node[chosen],
        visit_begin=walk.begin[chosen],
        visit_end=walk.end[chosen],
        task_begin=walk.task_begin[:tasks],
        task_end=walk.task_end[:tasks],
        task_first=walk.task_first[: tasks + 1],
        tasks=by_cost[np.argsort(dealt, kind="stable")],
        thread_first=np.concatenate([[0], np.cumsum(np.bincount(dealt, minlength=threads))]).astype(np.int64),
        idle_token_start=idle_token_start,
        idle_token_end=idle_token_end,
        idle_node_start=idle_node_start,
        idle_node_end=idle_node_end,
        split_floats=max((p.offset + (p.end - p.begin) * int(width[p.node]) for p in pieces), default=0),
        task_floats=min(max(TASK_FLOATS // threads, 1), CHUNK * tree.widest),
    )
