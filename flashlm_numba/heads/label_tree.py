"""Label trees: every token is a leaf, and its probability is the product of one softmax per node of its path.

A tree consists of flat arrays. Leaves are numbered depth first, a node's direct tokens before its child nodes. Nodes
are numbered breadth first from the root, 0. Both kinds of children of a node are therefore contiguous, and so are all
leaves below it:

    tokens of node n         leaf rows [token_start[n], token_end[n])
    child nodes of node n    nodes     [child_start[n], child_end[n])
    every leaf below node n  leaf rows [token_start[n], leaf_end[n])

token_of_row and row_of_token convert between leaf rows and token ids. A node's logits are h times the rows of its
tokens and of its child nodes. Node m >= 1 has row m - 1 of the node matrix.

Letters: V tokens, M + 1 nodes, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashlm_numba.system.display import plural
from flashlm_numba.system.errors import UserError

_NODE_ARRAYS = ("token_start", "token_end", "child_start", "child_end", "leaf_end", "parent")
_TOKEN_ARRAYS = ("token_of_row", "row_of_token")


@dataclass(frozen=True, eq=False)
class Tree:
    """A label tree as flat int32 arrays (see the module's docstring). The constructor checks them.

    token_start, token_end, child_start, child_end, leaf_end, parent : (M + 1,); parent[0] = -1
    token_of_row, row_of_token : (V,)
    shape : name of the builder
    Raises UserError, naming the error, unless the arrays reach every token exactly once.
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
        """V, the number of tokens."""
        return len(self.token_of_row)

    @property
    def n_nodes(self) -> int:
        """M + 1, the number of nodes with the root; M of them have a row."""
        return len(self.token_start)

    @property
    def arity(self) -> np.ndarray:
        """Number of children of every node, tokens and nodes together, (M + 1,) int64."""
        tokens = self.token_end.astype(np.int64) - self.token_start
        return tokens + self.child_end - self.child_start

    @property
    def spans(self) -> np.ndarray:
        """The ranges of every node in the kernels' layout, (M + 1, 5) int32: one cache line per node."""
        return np.stack([self.token_start, self.token_end, self.child_start, self.child_end, self.leaf_end], axis=1)

    @property
    def node_depth(self) -> np.ndarray:
        """Number of nodes above each node, (M + 1,) int64; 0 for the root."""
        return self._sum_to_root(np.ones(self.n_nodes, np.int64)) - 1

    @property
    def depth(self) -> int:
        """Number of nodes on the longest path with the root, which is the number of softmaxes of the deepest token."""
        return int(self.node_depth.max()) + 1

    @property
    def node_of_row(self) -> np.ndarray:
        """The parent node of each leaf row, (V,) int32."""
        node = np.empty(self.vocab_size, np.int32)
        order = np.argsort(self.token_start, kind="stable")
        sizes = (self.token_end - self.token_start)[order]
        # in the order of their rows, the nodes' direct tokens cover the vocabulary
        node[:] = np.repeat(order, sizes)
        return node

    def _sum_to_root(self, value: np.ndarray) -> np.ndarray:
        """Sum of value over each node and all nodes above it."""
        total = value.tolist()
        parent = self.parent.tolist()
        for n in range(1, len(total)):  # a parent has a smaller number
            total[n] += total[parent[n]]
        return np.array(total, value.dtype)

    def path(self, token: int) -> list[tuple[int, int]]:
        """The (node, child) pairs from the root to a token. Child indices count tokens before child nodes."""
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
        """The expected cost per position: the mean over tokens, weighted by counts (V,) by token id (default: equal).

        `depth` : number of softmaxes;  `path_cost` : number of logits, or rows of C channels; V in a dense head
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
        """Statistics of the tree, for `info` and its JSON. counts (V,) weight the expected cost and depth."""
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
        """A text that describes the tree level by level.

        >>> from flashlm_numba.heads.tree_shapes import build_tree
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
        """The arrays by name, for a safetensors file; `tree.shape` holds the shape's name as UTF-8 bytes.

        row_of_token, the inverse of token_of_row, is left out.
        """
        tensors = {f"tree.{name}": getattr(self, name) for name in (*_NODE_ARRAYS, "token_of_row")}
        tensors["tree.shape"] = np.frombuffer(self.shape.encode(), np.uint8).copy()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> Tree:
        """The tree stored by to_tensors; ignores other names.

        Raises UserError, naming the error, if an array is missing or the arrays are not a valid tree.
        """
        arrays = {}
        for name in (*_NODE_ARRAYS, "token_of_row", "shape"):
            if f"tree.{name}" not in tensors:
                raise _damaged(f"tree.{name} is missing")
            arrays[name] = np.ascontiguousarray(tensors[f"tree.{name}"])
        # the inverse if this is a permutation; the tree's checks refuse it otherwise
        arrays["row_of_token"] = np.argsort(arrays["token_of_row"], axis=None, kind="stable").astype(np.int32)
        shape = arrays.pop("shape").tobytes().decode("utf-8", "replace")
        return cls(**arrays, shape=shape)


def _damaged(what: str) -> UserError:
    return UserError(
        f"The label tree is damaged: {what}. A tree must reach every token exactly once; "
        "use another checkpoint, or build the tree again."
    )


def _validate(tree: Tree) -> None:
    """Raise UserError unless the arrays are consistent. Each message names the wrong array."""
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

    # Every child node is listed once, in order, after its parent, so there is no cycle and no node has two parents.
    before = np.concatenate([[1], child_end[:-1]])
    need(child_start == before, "child_start of node {n} does not follow the child nodes of the node before")
    need(child_end >= child_start, "child_end of node {n} is below its child_start")
    need(
        (child_start > np.arange(nodes)) | (child_start == child_end),
        "the child nodes of node {n} come before it, so there is a cycle",
    )
    if child_end[-1] != nodes:
        raise _damaged(f"its nodes have {child_end[-1] - 1} child nodes in total, expected {nodes - 1}")
    expected_parent = np.concatenate([[-1], np.repeat(np.arange(nodes), child_end - child_start)])
    need(parent == expected_parent, "parent of node {n} is not the node that lists it")

    # The leaves below a node are its tokens, then those of each child node in turn.
    need((token_start >= 0) & (token_end >= token_start), "the tokens of node {n} are not a range of leaf rows")
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
    """Build a tree from each node's token ids and child nodes, the root first. Renumbers nodes breadth first.

    Raises UserError if a token is missing or occurs twice, if a node has two parents or none, or if there is a cycle.

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
    """A tree of two levels: root_tokens are children of the root, and each group of tokens gets a separate node.

    A group of one token becomes a child of the root, and a single group becomes the root, because a node with one
    child has nothing to decide.
    """
    top = [int(token) for token in root_tokens]
    nodes = [[int(token) for token in group] for group in groups if len(group)]
    top += [group[0] for group in nodes if len(group) == 1]
    nodes = [group for group in nodes if len(group) > 1]
    if not top and len(nodes) == 1:
        top, nodes = nodes[0], []
    return tree_from_lists([top, *nodes], [list(range(1, len(nodes) + 1)), *([[]] * len(nodes))], shape)
