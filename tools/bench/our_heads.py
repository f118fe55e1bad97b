"""Our heads as candidates: construction, timed call, and reference loss and gradients in plain NumPy.

The reference of the dense head works in chunks of positions, that of trees (kernels/reference_tree.py) by position.
"""

from __future__ import annotations

import functools

import numpy as np

from flashlm_numba.heads import DenseHead, Head, SampledHead, TreeHead
from flashlm_numba.heads.label_tree import Tree
from flashlm_numba.heads.tree_nodes import default_rank
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.kernels import dense_head, reference_tree, tree_head
from flashlm_numba.model.config import HeadConfig
from tools.bench.head_problem import Candidate, Found, Problem

CHUNK = 256  # positions of the dense reference at a time: 103 MB of float64 logits for GPT-2's vocabulary


def run_head(head: Head, problem: Problem) -> Found:
    """loss (N,) and the gradients of the mean loss by name. The gradients replace those of the last call."""
    head.prepare()  # as every step does
    loss, _, dh = head.forward_backward(problem.h, problem.targets, problem.weights, accumulate=False)
    return {"loss": loss, "dh": dh, "dweight": head.dweight, **head.gradients}


def scratch_mb(head: Head) -> float:
    """Size of the scratch arrays of one of our heads, MB; none before its first call."""
    owners = (x for x in vars(head).values() if isinstance(x, dense_head.DenseScratch | tree_head.TreeScratch))
    return sum(owner.nbytes for owner in owners) * 1e-6


def dense_by_chunks(
    h: np.ndarray, weight: np.ndarray, targets: np.ndarray, weights: np.ndarray, prior: np.ndarray | float = 0.0
) -> Found:
    """Softmax of h @ weight.T + prior by plain NumPy, CHUNK positions at a time, in the dtype of h.

    The formulas of kernels/reference.py (a test compares the two), in place and with exp evaluated once.
    """
    loss, dh, dweight = np.empty_like(weights), np.empty_like(h), np.zeros_like(weight)
    for start in range(0, len(h), CHUNK):
        here = slice(start, start + CHUNK)
        chosen = np.arange(len(h[here])), targets[here]
        logits = h[here] @ weight.T
        logits += prior
        logits -= logits.max(1, keepdims=True)
        loss[here] = -logits[chosen]
        p = np.exp(logits, out=logits)
        z = p.sum(1, keepdims=True)
        loss[here] += np.log(z[:, 0])
        p *= weights[here, None] / z
        p[chosen] -= weights[here]
        dh[here] = p @ weight
        dweight += p.T @ h[here]
    return {"loss": loss, "dh": dh, "dweight": dweight}


@functools.lru_cache(maxsize=2)
def dense_reference(problem: Problem, dtype: type) -> Found:
    """The dense head's loss and gradients by plain NumPy."""
    h, weight, weights = (array.astype(dtype) for array in (problem.h, problem.weight, problem.weights))
    return dense_by_chunks(h, weight, problem.targets, weights)


def forget_references() -> None:
    """Clear the caches of the references, which take hundreds of MB with GPT-2's vocabulary."""
    dense_reference.cache_clear()
    tree_reference.cache_clear()


def dense_cost(problem: Problem) -> tuple[float, float]:
    """flop and bytes of a call: three products of N, V and C; h, weight and their gradients."""
    n, dim = problem.h.shape
    return 6.0 * n * problem.weight.size, 4.0 * (2 * n * dim + 2 * problem.weight.size)


def dense_candidate(problem: Problem) -> Candidate:
    """DenseHead."""
    head = DenseHead(problem.weight)
    truth = functools.partial(dense_reference, problem)
    return Candidate(lambda: run_head(head, problem), truth, *dense_cost(problem), lambda: scratch_mb(head))


def sampled_candidate(problem: Problem) -> Candidate:
    """SampledHead in training, with the recipes' number of candidates and the same sample at every call."""
    (n, dim), vocab = problem.h.shape, len(problem.weight)
    head = SampledHead(problem.weight, counts=problem.counts, candidates=HeadConfig().num_sampled)
    head.begin(np.random.default_rng(0), full=False)
    ids, p = head.choose(problem.targets, float(np.random.default_rng(0).random()))  # as begin has drawn

    def truth(dtype: type) -> Found:
        """The dense reference over the candidates; what is drawn is taken from the head."""
        h, rows, weights, prior = (
            a.astype(dtype) for a in (problem.h, problem.weight[ids], problem.weights, -np.log(p))
        )
        found = dense_by_chunks(h, rows, np.searchsorted(ids, problem.targets), weights, prior)
        dweight = np.zeros(problem.weight.shape, dtype)
        dweight[ids] = found["dweight"]
        return {**found, "dweight": dweight}

    nbytes = 4.0 * dim * (2 * n + len(ids) + vocab)
    return Candidate(lambda: run_head(head, problem), truth, 6.0 * n * dim * len(ids), nbytes, lambda: scratch_mb(head))


@functools.lru_cache(maxsize=1)
def make_tree_head(problem: Problem, shape: str) -> TreeHead:
    """TreeHead of this shape with the rows of the problem in leaf order, as in training by default."""
    # a clustered tree is nothing without rows
    rows = problem.weight if problem.by_meaning or shape == "clustered" else None
    tree = build_tree(shape, problem.counts, rows=rows)
    rank = default_rank(shape, tree, problem.weight.shape[1])
    return TreeHead(tree, np.ascontiguousarray(problem.weight[tree.token_of_row]), counts=problem.counts, rank=rank)


@functools.lru_cache(maxsize=2)
def tree_reference(problem: Problem, head: TreeHead, dtype: type) -> Found:
    """The same by the plain NumPy twin of the kernel, position by position."""
    h, weight, nodes, weights = (array.astype(dtype) for array in (problem.h, head.weight, head.nodes, problem.weights))
    dweight, dnodes = np.zeros_like(weight), np.zeros_like(nodes)
    loss, _, dh = reference_tree.tree_head_forward_backward(
        h, weight, nodes, head.tree.spans, head.row_of_token[problem.targets], weights, dweight, dnodes
    )
    return {"loss": loss, "dh": dh, "dweight": dweight, **({"nodes.weight": dnodes} if dnodes.size else {})}


def tree_cost(problem: Problem, tree: Tree) -> tuple[float, float]:
    """flop and bytes of a call: the nodes on the paths of its targets; reading their rows, writing all gradients."""
    n, dim = problem.h.shape
    path_cost = tree.expected(np.bincount(problem.targets, minlength=tree.vocab_size))["path_cost"]
    visited = set()
    for node in np.unique(tree.node_of_row[tree.row_of_token[problem.targets]]).tolist():
        while node >= 0 and node not in visited:
            visited.add(node)
            node = int(tree.parent[node])
    read, written = int(tree.arity[list(visited)].sum()), tree.vocab_size + tree.n_nodes - 1
    return 6.0 * n * dim * path_cost, 4.0 * dim * (2 * n + read + written)


def tree_candidate(problem: Problem, shape: str) -> Candidate:
    """TreeHead of this shape."""
    head = make_tree_head(problem, shape)

    def truth(dtype: type) -> Found:
        """The reference; where the node rows are kept as a product, with the gradients of its factors."""
        found = tree_reference(problem, head, dtype)
        if "nodes.basis" not in head.parameters:
            return found
        coords, basis = (head.parameters[f"nodes.{part}"].astype(dtype) for part in ("weight", "basis"))
        drows = found["nodes.weight"]
        return {**found, "nodes.weight": drows @ basis.T, "nodes.basis": coords.T @ drows}

    return Candidate(lambda: run_head(head, problem), truth, *tree_cost(problem, head.tree), lambda: scratch_mb(head))
