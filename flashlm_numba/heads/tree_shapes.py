"""Shapes of label trees: builders that use token counts and, optionally, the rows of an embedding.

A builder takes weight (V,), the counts plus one by token id, and rows (V, C) by token id or None. It returns a Tree.
SHAPES names the builders for `--tree`.
"""

from __future__ import annotations

import heapq
import inspect
from collections.abc import Callable, Iterable

import numpy as np

from flashlm_numba.heads.label_tree import Tree, tree_from_groups, tree_from_lists
from flashlm_numba.system.errors import UserError

MOST_SIMILARITIES = 1 << 28  # maximum number of token-cluster similarities in k-means; 12 bytes each with their order
FREQUENT_SHARE = 0.75  # share of the weight in the first half of the groups, if grouped by embedding


def _huffman(weight: np.ndarray, rows: np.ndarray | None) -> Tree:
    """The binary tree with the smallest expected depth (Huffman 1952), in O(V log V). Ignores rows."""
    vocab = len(weight)
    if vocab == 1:
        return tree_from_lists([[0]], [[]], "huffman")
    # the number breaks ties, so that the tree does not depend on the heap's implementation
    heap = [(w, i) for i, w in enumerate(weight.tolist())]
    heapq.heapify(heap)
    pairs: list[tuple[int, int]] = []
    while len(heap) > 1:
        w0, a = heapq.heappop(heap)
        w1, b = heapq.heappop(heap)
        heapq.heappush(heap, (w0 + w1, vocab + len(pairs)))
        pairs.append((a, b))
    pairs.reverse()  # the root was created last
    tokens = [[i for i in pair if i < vocab] for pair in pairs]
    children = [[len(pairs) - 1 - (i - vocab) for i in pair if i >= vocab] for pair in pairs]
    return tree_from_lists(tokens, children, "huffman")


def _by_frequency(weight: np.ndarray) -> np.ndarray:
    """Token ids, most frequent first, ties by id."""
    return np.argsort(-weight, kind="stable")


def _split_tree(
    ids: np.ndarray,
    arity: int,
    widest: int,
    split: Callable[[np.ndarray, int], list[np.ndarray]],
    shape: str,
) -> Tree:
    """A tree that splits ids into `arity` parts, recursively, until a part fits a node of `widest` tokens."""
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
    """Arity of a tree with three levels: 37 for GPT-2's vocabulary."""
    return max(2, int(np.ceil(vocab ** (1 / 3))))


def _balanced(weight: np.ndarray, rows: np.ndarray | None, *, arity: int | None = None) -> Tree:
    """Nodes with `arity` children (default: three levels), tokens in order of frequency. Ignores rows."""
    arity = _at_least("arity", arity or _cube_root(len(weight)), 2)
    return _split_tree(_by_frequency(weight), arity, arity, np.array_split, "balanced")


def _runs(weight: np.ndarray, count: int, cap: int) -> list[slice]:
    """At most `count` consecutive slices of about equal weight, each at most `cap` long (or longer if necessary)."""
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

    low, high = total[-1] / count / 2, total[-1]  # high gives slices of length `cap`, which are few enough
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if len(cut(middle)) > count else (low, middle)
    return cut(high)


def _capacity_assign(score: np.ndarray, capacity: int) -> np.ndarray:
    """Assign each row of score (n, k) to its best column with free capacity; better scores go first."""
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
    """Cluster index (n,) of each row of rows (n, C), for `count` clusters by direction of at most `capacity` rows.

    Rows are normalised, because the length of an embedding row reflects the token's frequency and the direction its
    meaning. The method is Lloyd's algorithm with limited capacity, best scores first. It is deterministic for a seed.
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
    """Split ids into `count` clusters by the direction of their rows, each at most a quarter above the mean size.

    Raises UserError if the table of similarities and its order would take several GB.
    """
    if len(ids) * count > MOST_SIMILARITIES:
        raise UserError(
            f"{count:,} clusters of {len(ids):,} tokens would need too much memory; request at most "
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
    """Split ids, most frequent first, into about `count` groups: by rows if given, else into slices of equal weight.

    With rows, half of the groups share the frequent tokens that have FREQUENT_SHARE of the weight. These groups are
    small, and most positions visit them.
    """
    count = min(count, len(ids))
    if not count:
        return []
    if rows is not None:
        total = np.cumsum(weight[ids])
        cut = int(np.searchsorted(total, FREQUENT_SHARE * total[-1]))
        few = count // 2
        if not few <= cut <= len(ids) - (count - few) or few == 0:  # too few tokens in one half for its groups
            return _clusters(rows, ids, count)
        return _clusters(rows, ids[:cut], few) + _clusters(rows, ids[cut:], count - few)
    cap = max(1, round(2.23 * len(weight) ** 0.5))  # 500 for GPT-2, so that no node is slow
    return [ids[run] for run in _runs(weight[ids], count, cap)]


def _two_level(weight: np.ndarray, rows: np.ndarray | None, *, classes: int | None = None) -> Tree:
    """About sqrt(V) classes: slices by frequency with about equal weight, or clusters of rows.

    A token that is frequent enough to be a class becomes a child of the root. Equal weight makes those classes small
    that most positions visit. Source of the classes: Goodman 2001, arXiv:cs/0108006.
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
    """The most frequent tokens in the root, and nodes for the others: clusters of rows, or slices by frequency.

    The defaults are 2/7 and 10/7 of sqrt(V), 64 and 320 for GPT-2's vocabulary, the best tried (docs/experiments.md).
    Source of the shortlist in the root: Grave et al. 2016, arXiv:1609.04309, section 4.
    """
    vocab = len(weight)
    top = _at_least("root_tokens", round(vocab**0.5 * 2 / 7) if root_tokens is None else root_tokens, 0)
    count = _at_least("clusters", max(1, round(vocab**0.5 * 10 / 7)) if clusters is None else clusters, 1)
    ids = _by_frequency(weight)
    return tree_from_groups(ids[:top], _groups(weight, ids[top:], rows, count), "adaptive")


def _clustered(weight: np.ndarray, rows: np.ndarray | None, *, arity: int | None = None) -> Tree:
    """Recursive balanced k-means of the rows, until a cluster fits a node of `arity` children."""
    assert rows is not None  # see check_shape
    arity = _at_least("arity", arity or _cube_root(len(weight)), 2)

    def split(ids: np.ndarray, count: int) -> list[np.ndarray]:
        return _clusters(rows, ids, count)

    # clusters differ in size, so nodes of up to twice the arity save a level
    return _split_tree(_by_frequency(weight), arity, 2 * arity, split, "clustered")


def _default(
    weight: np.ndarray,
    rows: np.ndarray | None,
    *,
    arity: int | None = None,
    root_tokens: int | None = None,
    clusters: int | None = None,
) -> Tree:
    """The clustered tree; the adaptive tree if there are no rows or its options are given."""
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


EITHER_CLUSTERING = ("default", "adaptive", "two-level")  # with rows they group by these, without by frequency


def check_shape(shape: str, options: Iterable[str], *, rows: bool, prefix: str = "") -> None:
    """Raise UserError unless build_tree knows the shape and the shape takes these options, with or without rows.

    prefix : prefix of the options' names in the message
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
            f"A tree takes either {prefix}arity, or {prefix}root_tokens and {prefix}clusters; leave out one of them."
        )
    if not rows and (shape == "clustered" or (shape == "default" and "arity" in options)):
        raise UserError("A clustered tree needs embedding rows to cluster; without rows use the shape adaptive.")


def build_tree(shape: str, counts: np.ndarray, *, rows: np.ndarray | None = None, **options: int) -> Tree:
    """Build a tree.

    shape : a name in SHAPES
    counts : (V,) token counts by token id; one is added to each, so that unseen tokens get a path too
    rows : embedding (V, C) by token id, with which two-level and adaptive group similar tokens; clustered needs it
    options : `classes` for two-level; `root_tokens`, `clusters` for adaptive; `arity` for balanced and clustered
    The result is deterministic. Raises UserError for an unknown shape, or for unsuitable counts, rows or options.

    >>> build_tree("huffman", np.array([2, 1, 0, 0])).describe(np.array([2, 1, 0, 1]))["expected_depth"]
    1.75
    """
    check_shape(shape, options, rows=rows is not None)
    counts = np.asarray(counts)
    if counts.ndim != 1 or not counts.size or not np.isfinite(counts).all() or (counts < 0).any():
        raise UserError("A tree needs one non-negative count per token.")
    if rows is not None and (rows.ndim != 2 or len(rows) != len(counts) or not np.isfinite(rows).all()):
        raise UserError(f"A tree over {len(counts)} tokens needs the same number of finite rows, got {rows.shape}.")
    return SHAPES[shape](counts.astype(np.float64) + 1, rows, **options)
