"""Label trees: every token is a leaf, its probability the product of a softmax at each node on the way to it.

A tree is flat arrays. Leaves are numbered depth first, a node's own tokens before its child nodes; nodes are
numbered breadth first from the root, 0. So both kinds of children of a node are contiguous, and so are all
leaves below it:

    tokens of node n         leaf rows [token_start[n], token_end[n])
    child nodes of node n    nodes     [child_start[n], child_end[n])
    every leaf below node n  leaf rows [token_start[n], leaf_end[n])

token_of_row and row_of_token translate between leaf rows and token ids. A node's logits are h times the rows
of its tokens and of its child nodes; node m >= 1 owns row m - 1 of the matrix of nodes.

Letters: V tokens, M + 1 nodes, C channels.
"""

from __future__ import annotations

import heapq
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashlm_numba.system.display import plural
from flashlm_numba.system.errors import UserError

_NODE_ARRAYS = ("token_start", "token_end", "child_start", "child_end", "leaf_end", "parent")
MOST_SIMILARITIES = 1 << 28  # of tokens and clusters in k-means: 4 bytes each, and 8 for their order
_TOKEN_ARRAYS = ("token_of_row", "row_of_token")


@dataclass(frozen=True, eq=False)
class Tree:
    """A label tree as flat int32 arrays (see the module's docstring), checked when it is made.

    token_start, token_end, child_start, child_end, leaf_end, parent : (M + 1,); parent[0] = -1
    token_of_row, row_of_token : (V,)
    shape : the name of the builder
    Raises UserError, naming what is wrong, unless the arrays reach every token exactly once.
    """

    token_start: np.ndarray
    token_end: np.ndarray
    child_start: np.ndarray
    child_end: np.ndarray
    leaf_end: np.ndarray
    parent: np.ndarray
    token_of_row: np.ndarray
    row_of_token: np.ndarray
    shape: str

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.token_of_row)

    @property
    def n_nodes(self) -> int:
        """M + 1, the root included; M of them have a row."""
        return len(self.token_start)

    @property
    def arity(self) -> np.ndarray:
        """Children of every node, tokens and nodes, (M + 1,) int64."""
        tokens = self.token_end.astype(np.int64) - self.token_start
        return tokens + self.child_end - self.child_start

    @property
    def spans(self) -> np.ndarray:
        """The five ranges of every node as the kernels read them, (M + 1, 5) int32: one cache line a node."""
        return np.stack([self.token_start, self.token_end, self.child_start, self.child_end, self.leaf_end], axis=1)

    @property
    def node_depth(self) -> np.ndarray:
        """Nodes above each node, (M + 1,) int64; 0 for the root."""
        return self._sum_to_root(np.ones(self.n_nodes, np.int64)) - 1

    @property
    def depth(self) -> int:
        """Nodes on the longest path, the root included: softmaxes of the deepest token."""
        return int(self.node_depth.max()) + 1

    @property
    def node_of_row(self) -> np.ndarray:
        """The node that each leaf row hangs from, (V,) int32."""
        node = np.empty(self.vocab_size, np.int32)
        order = np.argsort(self.token_start, kind="stable")
        sizes = (self.token_end - self.token_start)[order]
        # in order of their rows the nodes' own tokens tile the vocabulary
        node[:] = np.repeat(order, sizes)
        return node

    def _sum_to_root(self, value: np.ndarray) -> np.ndarray:
        """value summed over each node and all nodes above it."""
        total = value.tolist()
        parent = self.parent.tolist()
        for n in range(1, len(total)):  # a parent has the smaller number
            total[n] += total[parent[n]]
        return np.array(total, value.dtype)

    def path(self, token: int) -> list[tuple[int, int]]:
        """The (node, child) choices from the root to a token; tokens are counted before child nodes."""
        row = int(self.row_of_token[token])
        n = int(self.node_of_row[row])
        steps = [(n, row - int(self.token_start[n]))]
        while n:
            up = int(self.parent[n])
            tokens = int(self.token_end[up] - self.token_start[up])
            steps.append((up, tokens + n - int(self.child_start[up])))
            n = up
        return steps[::-1]

    def expected(self, counts: np.ndarray | None = None) -> dict[str, float]:
        """What a position costs, the mean over tokens weighted by counts (V,), by token id (default: alike).

        `depth`: softmaxes; `path_cost`: logits, that is rows of C channels; the dense head's would be V.
        """
        node = self.node_of_row
        weight = np.ones(self.vocab_size)
        if counts is not None and np.any(counts):
            weight = np.asarray(counts, np.float64)[self.token_of_row]
        weight = weight / weight.sum()
        return {
            "depth": float(weight @ (self.node_depth[node] + 1)),
            "path_cost": float(weight @ self._sum_to_root(self.arity)[node]),
        }

    def describe(self, counts: np.ndarray | None = None) -> dict[str, Any]:
        """Numbers about the tree, for `info` and its JSON; counts (V,) weigh the expected cost and depth."""
        expected = self.expected(counts)
        depth = self.node_depth
        tokens = self.token_end - self.token_start
        arity = self.arity
        levels = []
        for level in range(self.depth):
            here = depth == level
            widest = int(arity[here].max())
            levels.append({"nodes": int(here.sum()), "tokens": int(tokens[here].sum()), "widest": widest})
        return {
            "shape": self.shape,
            "tokens": self.vocab_size,
            "nodes": self.n_nodes,
            "depth": self.depth,
            "widest": int(arity.max()),
            "expected_depth": round(expected["depth"], 3),
            "expected_path_cost": round(expected["path_cost"], 1),
            "levels": levels,
        }

    def draw(self, counts: np.ndarray | None = None) -> str:
        """The tree level by level as text.

        >>> print(build_tree("two-level", np.ones(9)).draw())
        two-level tree of 9 tokens, 4 nodes, depth 2, widest node 3
        a token costs 6.0 logits in 2.00 softmaxes on average (dense: 9 in 1)
          level 1: 1 node, 0 tokens, widest 3
          level 2: 3 nodes, 9 tokens, widest 3
        """
        d = self.describe(counts)
        lines = [
            f"{d['shape']} tree of {d['tokens']:,} tokens, {plural(d['nodes'], 'node')}, depth {d['depth']}, "
            f"widest node {d['widest']:,}",
            f"a token costs {d['expected_path_cost']:,.1f} logits in {d['expected_depth']:.2f} softmaxes "
            f"on average (dense: {d['tokens']:,} in 1)",
        ]
        for i, level in enumerate(d["levels"], 1):
            lines.append(
                f"  level {i}: {plural(level['nodes'], 'node')}, {level['tokens']:,} tokens, widest {level['widest']:,}"
            )
        return "\n".join(lines)

    def to_tensors(self) -> dict[str, np.ndarray]:
        """Arrays by name, for a safetensors file; the shape's name is UTF-8 bytes in `tree.shape`."""
        tensors = {f"tree.{name}": getattr(self, name) for name in (*_NODE_ARRAYS, *_TOKEN_ARRAYS)}
        tensors["tree.shape"] = np.frombuffer(self.shape.encode(), np.uint8).copy()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> Tree:
        """The tree that to_tensors stored; other names are ignored.

        Raises UserError, naming what is wrong, if a part is missing or the arrays are no such tree.
        """
        arrays = {}
        for name in (*_NODE_ARRAYS, *_TOKEN_ARRAYS):
            if f"tree.{name}" not in tensors:
                raise _damaged(f"tree.{name} is missing")
            arrays[name] = np.ascontiguousarray(tensors[f"tree.{name}"])
        shape = tensors.get("tree.shape", np.empty(0, np.uint8))
        return cls(**arrays, shape=shape.tobytes().decode("utf-8", "replace"))


def _damaged(what: str) -> UserError:
    return UserError(
        f"The label tree is damaged: {what}. A tree must reach every token exactly once; "
        "take another checkpoint, or build the tree again."
    )


def _validate(tree: Tree) -> None:
    """Raise UserError unless the arrays are consistent. Each rule names the array that breaks it."""
    nodes, vocab = len(tree.token_start), len(tree.token_of_row)
    for name in (*_NODE_ARRAYS, *_TOKEN_ARRAYS):
        array = getattr(tree, name)
        size = nodes if name in _NODE_ARRAYS else vocab
        if array.dtype != np.int32 or array.shape != (size,):
            raise _damaged(f"{name} is {array.dtype} {array.shape}, expected int32 ({size},)")
    if not nodes or not vocab:
        raise _damaged("it has no node or no token")

    # 64 bits: a damaged file may hold any number
    token_start, token_end, child_start, child_end, leaf_end, parent, token_of_row, row_of_token = (
        getattr(tree, name).astype(np.int64) for name in (*_NODE_ARRAYS, *_TOKEN_ARRAYS)
    )

    def need(good: np.ndarray, sentence: str) -> None:
        if not good.all():
            raise _damaged(sentence.format(n=int(np.flatnonzero(~good)[0])))

    # Child nodes are handed out in order, each once, after their parent: no cycle, no node with two parents.
    before = np.concatenate([[1], child_end[:-1]])
    need(child_start == before, "child_start of node {n} does not follow the child nodes of the node before")
    need(child_end >= child_start, "child_end of node {n} is below its child_start")
    need(
        (child_start > np.arange(nodes)) | (child_start == child_end),
        "the child nodes of node {n} come before it, so there is a cycle",
    )
    if child_end[-1] != nodes:
        raise _damaged(f"its nodes have {child_end[-1] - 1} child nodes in all, expected {nodes - 1}")
    expected_parent = np.concatenate([[-1], np.repeat(np.arange(nodes), child_end - child_start)])
    need(parent == expected_parent, "parent of node {n} is not the node that lists it")

    # The leaves below a node are its tokens, then those of each child node in turn.
    need((token_start >= 0) & (token_end >= token_start), "the tokens of node {n} are no range of leaf rows")
    need(leaf_end > token_start, "node {n} has no token below it")
    if token_start[0] != 0 or leaf_end[0] != vocab:
        raise _damaged(f"the root covers leaf rows {token_start[0]} to {leaf_end[0]}, expected 0 to {vocab}")
    inner = child_end > child_start
    need(inner | (leaf_end == token_end), "leaf_end of node {n} is not the end of its tokens")
    first = child_start[inner]
    at_first, at_last = np.ones(nodes, bool), np.ones(nodes, bool)
    at_first[inner] = token_start[first] == token_end[inner]
    at_last[inner] = leaf_end[child_end[inner] - 1] == leaf_end[inner]
    need(at_first, "the first child node of node {n} does not begin after its tokens")
    need(at_last, "the last child node of node {n} does not end at its leaf_end")
    sibling = np.ones(nodes, bool)
    sibling[2:] = (parent[2:] != parent[1:-1]) | (token_start[2:] == leaf_end[1:-1])
    need(sibling, "node {n} does not begin where its sibling ends")

    found = np.zeros(vocab, np.int64)
    inside = (token_of_row >= 0) & (token_of_row < vocab)
    np.add.at(found, token_of_row[inside], 1)
    need(found == 1, "token {n} is not in it exactly once")
    need(row_of_token[token_of_row] == np.arange(vocab), "row_of_token is not the inverse at row {n}")


# --- assembling ---


def tree_from_lists(tokens: Sequence[Sequence[int]], children: Sequence[Sequence[int]], shape: str = "custom") -> Tree:
    """A tree from each node's token ids and child nodes, the root first; nodes are renumbered breadth first.

    Raises UserError if a token is missing or doubled, a node has two parents or none, or there is a cycle.

    >>> tree_from_lists([[2], [0, 1]], [[1], []]).path(1)
    [(0, 1), (1, 1)]
    """
    order = [0]
    for n in order:
        order.extend(children[n])
        if len(order) > len(tokens):
            raise _damaged("a node is the child of two nodes, or there is a cycle")
    if len(order) != len(tokens):
        raise _damaged(f"{len(tokens) - len(order)} nodes cannot be reached from the root")
    count = len(order)
    child_end = 1 + np.cumsum([len(children[n]) for n in order])
    child_start = np.concatenate([[1], child_end[:-1]])
    parent = np.concatenate([[-1], np.repeat(np.arange(count), child_end - child_start)])
    own = [len(tokens[n]) for n in order]
    below, up = own.copy(), parent.tolist()
    for n in range(count - 1, 0, -1):
        below[up[n]] += below[n]
    start = [0] * count
    following = own.copy()  # leaf row of the next child node, from the node's start
    for n in range(1, count):
        start[n] = start[up[n]] + following[up[n]]
        following[up[n]] += below[n]
    vocab = below[0]
    token_of_row = np.full(vocab, -1, np.int32)
    for n, source in enumerate(order):
        token_of_row[start[n] : start[n] + own[n]] = tokens[source]
    row_of_token = np.zeros(vocab, np.int32)
    inside = (token_of_row >= 0) & (token_of_row < vocab)
    row_of_token[token_of_row[inside]] = np.flatnonzero(inside)
    start_, own_, below_ = np.array(start), np.array(own), np.array(below)
    arrays = (start_, start_ + own_, child_start, child_end, start_ + below_, parent)
    node_arrays = dict(zip(_NODE_ARRAYS, (a.astype(np.int32) for a in arrays), strict=True))
    return Tree(**node_arrays, token_of_row=token_of_row, row_of_token=row_of_token, shape=shape)


def tree_from_groups(
    root_tokens: Sequence[int] | np.ndarray,
    groups: Sequence[Sequence[int] | np.ndarray],
    shape: str = "custom",
) -> Tree:
    """A tree of two levels: root_tokens hang from the root, each group of tokens from a node of its own.

    A group of one token hangs from the root too, and one lone group is the root: a node with a single child
    would decide nothing.
    """
    top = [int(token) for token in root_tokens]
    nodes = [[int(token) for token in group] for group in groups if len(group)]
    top += [group[0] for group in nodes if len(group) == 1]
    nodes = [group for group in nodes if len(group) > 1]
    if not top and len(nodes) == 1:
        top, nodes = nodes[0], []
    return tree_from_lists([top, *nodes], [list(range(1, len(nodes) + 1)), *([[]] * len(nodes))], shape)


FREQUENT_SHARE = 0.75  # of the weight, in the first half of the groups by meaning


# --- builders: counts (V,) by token id, plus one, in; a tree out ---


def _huffman(weight: np.ndarray, rows: np.ndarray | None) -> Tree:
    """The binary tree of least expected depth (Huffman 1952), in O(V log V); rows are not used."""
    vocab = len(weight)
    if vocab == 1:
        return tree_from_lists([[0]], [[]], "huffman")
    # the number breaks ties, so that the tree does not depend on the heap's insides
    heap = [(w, i) for i, w in enumerate(weight.tolist())]
    heapq.heapify(heap)
    pairs: list[tuple[int, int]] = []
    while len(heap) > 1:
        w0, a = heapq.heappop(heap)
        w1, b = heapq.heappop(heap)
        heapq.heappush(heap, (w0 + w1, vocab + len(pairs)))
        pairs.append((a, b))
    pairs.reverse()  # the root was made last
    tokens = [[i for i in pair if i < vocab] for pair in pairs]
    children = [[len(pairs) - 1 - (i - vocab) for i in pair if i >= vocab] for pair in pairs]
    return tree_from_lists(tokens, children, "huffman")


def _by_frequency(weight: np.ndarray) -> np.ndarray:
    """Token ids, most frequent first, equal ones by id."""
    return np.argsort(-weight, kind="stable")


def _split_tree(
    ids: np.ndarray,
    arity: int,
    widest: int,
    split: Callable[[np.ndarray, int], list[np.ndarray]],
    shape: str,
) -> Tree:
    """ids are split into `arity` parts, and these again, until a part fits a node of `widest` tokens."""
    tokens: list[list[int]] = [[]]
    children: list[list[int]] = [[]]
    work = [(0, ids)]
    while work:
        n, here = work.pop()
        if len(here) <= widest:
            tokens[n] = here.tolist()
            continue
        for part in split(here, arity):
            if len(part) == 1:
                tokens[n].append(int(part[0]))
            else:
                children[n].append(len(tokens))
                work.append((len(tokens), part))
                tokens.append([])
                children.append([])
    return tree_from_lists(tokens, children, shape)


def _cube_root(vocab: int) -> int:
    """Arity of a tree of three levels: 37 for GPT-2's vocabulary."""
    return max(2, int(np.ceil(vocab ** (1 / 3))))


def _balanced(weight: np.ndarray, rows: np.ndarray | None, *, arity: int | None = None) -> Tree:
    """Nodes of `arity` children (default: three levels), tokens in order of frequency; rows are not used."""
    arity = _at_least("arity", arity or _cube_root(len(weight)), 2)
    return _split_tree(_by_frequency(weight), arity, arity, np.array_split, "balanced")


def _runs(weight: np.ndarray, count: int, cap: int) -> list[slice]:
    """At most `count` runs of about equal weight, at most `cap` long each (longer if it cannot be helped)."""
    n = len(weight)
    cap = max(cap, -(-n // count))
    total = np.concatenate([[0.0], np.cumsum(weight, dtype=np.float64)])

    def cut(target: float) -> list[slice]:
        runs: list[slice] = []
        start = 0
        while start < n and len(runs) <= count:
            end = int(np.searchsorted(total, total[start] + target))
            end = min(max(end, start + 1), start + cap, n)
            runs.append(slice(start, end))
            start = end
        return runs

    low, high = total[-1] / count / 2, total[-1]  # high gives runs of `cap`: few enough
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if len(cut(middle)) > count else (low, middle)
    return cut(high)


def _capacity_assign(score: np.ndarray, capacity: int) -> np.ndarray:
    """A column for each row of score (n, k): its best with room; where room is short, the better score."""
    label = np.full(len(score), -1)
    room = np.full(score.shape[1], capacity)
    todo = np.arange(len(score))
    while todo.size:
        here = np.where(room > 0, score[todo], -np.inf)
        best = here.argmax(1)
        order = np.lexsort((-here[np.arange(todo.size), best], best))
        best, todo = best[order], todo[order]
        rank = np.arange(todo.size) - np.searchsorted(best, best)
        taken = rank < room[best]
        label[todo[taken]] = best[taken]
        room -= np.bincount(best[taken], minlength=len(room))
        todo = todo[~taken]
    return label


def balanced_kmeans(rows: np.ndarray, count: int, capacity: int, *, iterations: int = 10, seed: int = 0) -> np.ndarray:
    """Cluster (n,) of each row of rows (n, C) by direction, `count` clusters of at most `capacity` rows.

    Rows are scaled to length one: the length of an embedding row follows its token's frequency, its direction
    the meaning. Lloyd's algorithm with assignment under a capacity, best first. Deterministic for a seed.
    Raises ValueError if count * capacity is below n.
    """
    n = len(rows)
    if count * capacity < n:
        raise ValueError(f"balanced_kmeans: {count} clusters of at most {capacity} cannot hold {n} rows")
    unit = np.array(rows, np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    centers = unit[np.random.default_rng(seed).choice(n, min(count, n), replace=False)]
    if len(centers) < count:
        centers = np.concatenate([centers, np.zeros((count - len(centers), rows.shape[1]), np.float32)])
    label = np.zeros(n, np.int64)
    for _ in range(iterations):
        new = _capacity_assign(unit @ centers.T, capacity)
        if (new == label).all():
            break
        label = new
        order = np.argsort(label, kind="stable")
        used, first = np.unique(label[order], return_index=True)
        centers[used] = np.add.reduceat(unit[order], first, axis=0)
        centers /= np.maximum(np.linalg.norm(centers, axis=1, keepdims=True), 1e-12)
    return label


def _clusters(rows: np.ndarray, ids: np.ndarray, count: int) -> list[np.ndarray]:
    """ids in `count` parts by the direction of their rows, each at most a quarter larger than the mean.

    Raises UserError for so many that the table of their similarities, and its order, would take several GB.
    """
    if len(ids) * count > MOST_SIMILARITIES:
        raise UserError(
            f"{count:,} clusters of {len(ids):,} tokens would need too much memory; ask for at most "
            f"{MOST_SIMILARITIES // len(ids):,}."
        )
    capacity = int(np.ceil(1.25 * len(ids) / count))
    label = balanced_kmeans(rows[ids], count, capacity)
    return [ids[label == c] for c in range(count) if (label == c).any()]


def _at_least(name: str, value: int, least: int) -> int:
    if value < least:
        raise UserError(f"The tree's {name} must be at least {least}, got {value}.")
    return value


def _groups(weight: np.ndarray, ids: np.ndarray, rows: np.ndarray | None, count: int) -> list[np.ndarray]:
    """ids, most frequent first, in about `count` groups: by meaning if there are rows, else runs of about equal weight.

    By meaning, half of the groups share the frequent tokens that hold FREQUENT_SHARE of the weight: these groups are
    small, and most positions go through them.
    """
    count = min(count, len(ids))
    if not count:
        return []
    if rows is not None:
        total = np.cumsum(weight[ids])
        cut = int(np.searchsorted(total, FREQUENT_SHARE * total[-1]))
        few = count // 2
        if not few <= cut <= len(ids) - (count - few) or few == 0:  # too few tokens in a band for its groups
            return _clusters(rows, ids, count)
        return _clusters(rows, ids[:cut], few) + _clusters(rows, ids[cut:], count - few)
    cap = max(1, round(2.23 * len(weight) ** 0.5))  # 500 for GPT-2: no node so wide that it is slow
    return [ids[run] for run in _runs(weight[ids], count, cap)]


def _two_level(weight: np.ndarray, rows: np.ndarray | None, *, classes: int | None = None) -> Tree:
    """About sqrt(V) classes: runs in order of frequency, of about equal weight, or clusters of rows.

    A token so frequent that it would be a class by itself hangs from the root. Source: Goodman 2001,
    arXiv:cs/0108006 (classes); the equal weight keeps small the classes that most positions visit.
    """
    classes = _at_least("classes", classes or max(1, round(len(weight) ** 0.5)), 1)
    return tree_from_groups([], _groups(weight, _by_frequency(weight), rows, classes), "two-level")


def _adaptive(
    weight: np.ndarray,
    rows: np.ndarray | None,
    *,
    root_tokens: int | None = None,
    clusters: int | None = None,
) -> Tree:
    """The most frequent tokens in the root beside nodes of the others: clusters of rows, or runs.

    Defaults: 2/7 and 10/7 of sqrt(V), 64 and 320 for GPT-2's vocabulary, the best of those tried (docs/experiments.md).
    Source: the shortlist in the root is that of Grave et al. 2016, arXiv:1609.04309, section 4.
    """
    vocab = len(weight)
    top = _at_least("root_tokens", round(vocab**0.5 * 2 / 7) if root_tokens is None else root_tokens, 0)
    count = _at_least("clusters", max(1, round(vocab**0.5 * 10 / 7)) if clusters is None else clusters, 1)
    ids = _by_frequency(weight)
    return tree_from_groups(ids[:top], _groups(weight, ids[top:], rows, count), "adaptive")


def _clustered(weight: np.ndarray, rows: np.ndarray | None, *, arity: int | None = None) -> Tree:
    """Balanced k-means of the rows, again and again, until a cluster fits a node of `arity` children."""
    assert rows is not None  # see check_shape
    arity = _at_least("arity", arity or _cube_root(len(weight)), 2)

    def split(ids: np.ndarray, count: int) -> list[np.ndarray]:
        return _clusters(rows, ids, count)

    # clusters differ in size, so that nodes of up to twice the arity save a level
    return _split_tree(_by_frequency(weight), arity, 2 * arity, split, "clustered")


def _default(
    weight: np.ndarray,
    rows: np.ndarray | None,
    *,
    arity: int | None = None,
    root_tokens: int | None = None,
    clusters: int | None = None,
) -> Tree:
    """Clustered; adaptive where there are no rows to cluster, or its options are given."""
    if arity is None and (rows is None or root_tokens is not None or clusters is not None):
        return _adaptive(weight, rows, root_tokens=root_tokens, clusters=clusters)
    return _clustered(weight, rows, arity=arity)


SHAPES: dict[str, Callable[..., Tree]] = {
    "default": _default,
    "adaptive": _adaptive,
    "two-level": _two_level,
    "balanced": _balanced,
    "clustered": _clustered,
    "huffman": _huffman,
}


def check_shape(shape: str, options: Iterable[str], *, rows: bool, prefix: str = "") -> None:
    """Raise UserError unless build_tree knows the shape, and it takes these options, with or without rows.

    prefix : of the options' names in the sentence
    """
    if shape not in SHAPES:
        raise UserError(f"There is no tree shape {shape!r}; choose one of {', '.join(SHAPES)}.")
    known = inspect.signature(SHAPES[shape]).parameters.keys() - {"weight", "rows"}
    if unknown := set(options) - known:
        has_not, takes = (", ".join(prefix + name for name in sorted(names)) for names in (unknown, known))
        only = f"only {takes}" if known else "none"
        raise UserError(f"The tree shape {shape} has no option {has_not}; it takes {only}.")
    if "arity" in options and {"root_tokens", "clusters"} & set(options):
        raise UserError(
            f"A tree takes either {prefix}arity, or {prefix}root_tokens and {prefix}clusters; leave one of them out."
        )
    if not rows and (shape == "clustered" or (shape == "default" and "arity" in options)):
        raise UserError("A clustered tree needs embedding rows to cluster; without them use the shape adaptive.")


def build_tree(shape: str, counts: np.ndarray, *, rows: np.ndarray | None = None, **options: int) -> Tree:
    """The tree of this shape (a name in SHAPES) for the training documents' token counts (V,), by token id.

    One is added to every count, so that a token never seen can be reached like any other. rows (V, C), by
    token id: an embedding; two-level and adaptive then put like tokens in a node; clustered needs it.
    options: two-level `classes`; adaptive `root_tokens`, `clusters`; balanced and clustered `arity`.
    Deterministic. Raises UserError for an unknown shape, unfit counts, rows or options.

    >>> build_tree("huffman", np.array([2, 1, 0, 0])).describe(np.array([2, 1, 0, 1]))["expected_depth"]
    1.75
    """
    check_shape(shape, options, rows=rows is not None)
    counts = np.asarray(counts)
    if counts.ndim != 1 or not counts.size or not np.isfinite(counts).all() or (counts < 0).any():
        raise UserError("A tree needs one count per token, none of them negative.")
    if rows is not None and (rows.ndim != 2 or len(rows) != len(counts) or not np.isfinite(rows).all()):
        raise UserError(f"A tree over {len(counts)} tokens needs as many finite rows, got {rows.shape}.")
    return SHAPES[shape](counts.astype(np.float64) + 1, rows, **options)
