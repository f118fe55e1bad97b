"""The rows of a label tree's inner nodes: initial values, low-rank factors, and node priors.

Letters: V tokens, M nodes below the root, C channels, R rank.
"""

from __future__ import annotations

import numpy as np

from flashlm_numba.heads.label_tree import Tree


def _over_leaves(ufunc: np.ufunc, tree: Tree, value: np.ndarray) -> np.ndarray:
    """Reduce value (V, ...) with ufunc over the leaf rows below each node except the root. Returns (M, ...)."""
    if tree.n_nodes == 1:
        return np.empty((0, *value.shape[1:]), value.dtype)
    # reduceat takes only starts, so pass each node's start and end and use every second result; an end may be V
    padded = np.concatenate([value, value[:1]])
    pairs = np.stack([tree.token_start[1:], tree.leaf_end[1:]], axis=1).ravel()
    return ufunc.reduceat(padded, pairs, axis=0)[::2]


def init_nodes(tree: Tree, weight: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Initial node rows (M, C) float32: the mean of the leaf rows below a node, weighted by token counts plus one.

    weight : (V, C), rows in leaf order;  counts : (V,) by token id; None: all equal
    With these rows a node's logit is close to that of its frequent tokens.
    """
    share = np.ones(tree.vocab_size) if counts is None else np.asarray(counts, np.float64)[tree.token_of_row] + 1
    total = _over_leaves(np.add, tree, share)
    nodes = np.empty((tree.n_nodes - 1, weight.shape[1]), np.float32)
    for c in range(0, weight.shape[1], 32):  # a few columns at a time, so that the float64 copy stays small
        columns = slice(c, c + 32)
        nodes[:, columns] = _over_leaves(np.add, tree, weight[:, columns] * share[:, None]) / total[:, None]
    return nodes


def default_rank(shape: str, tree: Tree, dim: int) -> int | None:
    """Default rank of the node rows of a tree requested as `shape`; None: full rank.

    The default tree, clustered by embedding, has about 1,400 node rows for GPT-2's vocabulary. With a rank of 3/16 of
    the channels they have as many parameters as the 320 rows of an adaptive tree, 0.6 % of the model.
    """
    return max(1, 3 * dim // 16) if shape == "default" and tree.shape == "clustered" else None


def factor_nodes(nodes: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors coords (M, R) and basis (R, C) float32 whose product is the best approximation of nodes (M, C).

    The basis is orthogonal and scaled so that the elements of coords are as large as those of the rows. A rule that
    moves every element by about the learning rate, such as AdamW, then moves a row as far as without factors.
    R is min(rank, C). Raises ValueError if rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"factor_nodes: rank must be at least 1, got {rank}")
    dim = nodes.shape[1]
    rank = min(rank, dim)
    whole = nodes.astype(np.float64)
    _, vectors = np.linalg.eigh(whole.T @ whole)  # by rising eigenvalue
    chosen = vectors[:, ::-1][:, :rank]
    size = (dim / rank) ** 0.5
    return (whole @ chosen / size).astype(np.float32), np.ascontiguousarray((chosen * size).T, np.float32)


def node_log_prior(tree: Tree, log_prior: np.ndarray) -> np.ndarray:
    """Log of the summed prior of the tokens below each node, (M,) float32. log_prior : (V,) in leaf order"""
    return _over_leaves(np.logaddexp, tree, log_prior.astype(np.float64)).astype(np.float32)
