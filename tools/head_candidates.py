"""The heads that tools/bench_head.py compares: how each is made, run, and checked against float64.

A candidate is one head on one batch. Its `run` is what is timed, and the very same call is checked first: loss and
all gradients, of all positions and all rows, against plain NumPy in float64 (the dense head in chunks; trees by
kernels/reference_tree.py, position by position; the adaptive heads against their definition by autograd, whose float32
is their yardstick).
To add a head: a line in CANDIDATES, and a function that makes its Candidate.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashlm_numba.data.shards import TokenData
from flashlm_numba.heads import DenseHead, Head, SampledHead, TreeHead
from flashlm_numba.heads.label_tree import SHAPES, Tree, build_tree
from flashlm_numba.heads.tree import default_rank
from flashlm_numba.kernels import dense_head, reference_tree, tree_head
from flashlm_numba.model.config import HeadConfig
from flashlm_numba.model.embedding_init import cached_start
from tools.timing import WrongResultError

SLACK = 4.0  # a candidate may err this many times as far as plain float32 NumPy does
CHUNK = 256  # positions of the dense reference at a time: 103 MB of float64 logits for GPT-2's vocabulary

Found = dict[str, np.ndarray]  # "loss" (N,), or () where a head gives only the mean, and gradients by name


class UnavailableError(Exception):
    """A candidate needs what is not installed here; the message says what."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One batch for every candidate."""

    h: np.ndarray  # (N, C) float32
    weight: np.ndarray  # (V, C) float32, rows by token id
    targets: np.ndarray  # (N,) int32
    counts: np.ndarray  # (V,) int64, of the training documents
    by_meaning: bool = True  # trees may cluster the rows of weight, as training does

    @property
    def weights(self) -> np.ndarray:
        """Each position's share of the mean loss, (N,) float32."""
        return np.full(len(self.targets), 1 / len(self.targets), np.float32)

    def first(self, rows: int) -> Problem:
        """The same with the first positions only."""
        return dataclasses.replace(self, h=self.h[:rows].copy(), targets=self.targets[:rows].copy())


@dataclass(frozen=True)
class Candidate:
    """A head on one batch: forward and backward with all gradients of the mean loss."""

    run: Callable[[], Found]
    reference: Callable[[type], Found]  # the same by plain code, in float64 (the truth) or float32 (the yardstick)
    flop: float  # of a call's matrix products
    nbytes: float  # least memory traffic of a call: h, rows read, dh and all gradients, each once
    scratch_mb: Callable[[], float | None] = lambda: None  # held by the head after a call, MB (1e6 bytes); not torch's


def make_problem(data: TokenData, rows: int, dim: int, vocab: int, seed: int) -> Problem:
    """rows positions of the training text, folded into a smaller vocabulary where vocab asks for one."""
    rng = np.random.default_rng(seed)
    ids = data.train.windows(np.array([0]), min(rows + 1, data.train.n_tokens))[0]
    targets = np.resize(ids[1:], rows).astype(np.int32) % vocab
    folded = np.arange(data.manifest.vocab_size) % vocab
    counts = np.bincount(folded, data.train.counts(data.manifest.vocab_size), minlength=vocab)
    h = rng.standard_normal((rows, dim), np.float32)
    if vocab == data.manifest.vocab_size:
        weight, _ = cached_start(data, dim, vocab_size=vocab)
    else:
        weight = rng.standard_normal((vocab, dim), np.float32) * np.float32(0.05)
    return Problem(h, weight, targets, counts[:vocab].astype(np.int64))


def zipf_problem(rows: int, dim: int, vocab: int, seed: int = 0) -> Problem:
    """rows positions drawn by Zipf's law, for any vocabulary; trees are built from the counts alone."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(2.0, vocab + 2)
    share /= share.sum()
    targets = rng.choice(vocab, rows, p=share).astype(np.int32)
    h, weight = rng.standard_normal((rows, dim), np.float32), rng.standard_normal((vocab, dim), np.float32)
    return Problem(h, weight * np.float32(0.05), targets, (1e9 * share).astype(np.int64), by_meaning=False)


# --- ours ---


def run_head(head: Head, problem: Problem) -> Found:
    """loss (N,) and the gradients of the mean loss by name, those of the parameters in place of the last call's."""
    head.prepare()  # as every step does
    loss, _, dh = head.forward_backward(problem.h, problem.targets, problem.weights, accumulate=False)
    return {"loss": loss, "dh": dh, "dweight": head.dweight, **head.gradients}


def scratch_mb(head: Head) -> float:
    """Scratch arrays that one of our heads holds, MB; none before its first call."""
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
    """Free what the references remember: hundreds of MB at GPT-2's vocabulary."""
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
    """SampledHead in training, with the recipes' number of candidates; the same ones are drawn at every call."""
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
    """TreeHead of this shape, its rows those of the problem in leaf order, as training makes it by default."""
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


# --- PyTorch's, from tools/peer_heads.py ---


def peer() -> Any:
    """tools.peer_heads, where torch is installed."""
    if importlib.util.find_spec("torch") is None:
        raise UnavailableError("torch is not installed: pip install -e '.[peer]'")
    from tools import peer_heads

    return peer_heads


def named(call: Callable[[], tuple[Any, ...]], names: tuple[str, ...]) -> Callable[[], Found]:
    """The tensors of a peer's call as NumPy arrays by name; empty ones are left out."""

    def run() -> Found:
        return {name: tensor.numpy() for name, tensor in zip(names, call(), strict=True) if tensor.numel()}

    return run


def mean_loss(truth: Callable[[type], Found]) -> Callable[[type], Found]:
    """A reference for heads that give the mean loss only."""

    def reference_of(dtype: type) -> Found:
        found = truth(dtype)
        return {**found, "loss": found["loss"].mean()}

    return reference_of


def torch_dense_candidate(problem: Problem, *, compiled: bool = False) -> Candidate:
    """cross_entropy(linear(h, weight)), eager or through torch.compile."""
    peer_heads = peer()
    if compiled and not shutil.which(os.environ.get("CXX", "g++")):
        raise UnavailableError("torch.compile needs a C++ compiler (g++, or CXX)")
    call = peer_heads.dense_head(problem.h, problem.weight, problem.targets, compiled=compiled)
    if compiled:
        try:
            call()
        except Exception as error:  # the compiler may be there and not work; torch raises what it likes
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnavailableError(f"torch.compile failed: {reason}") from None
    run = named(call, ("loss", "dh", "dweight"))
    return Candidate(run, mean_loss(functools.partial(dense_reference, problem)), *dense_cost(problem))


def torch_tree_candidate(problem: Problem, threads: int | None = None) -> Candidate:
    """The default tree by hand in PyTorch, on torch's threads or on fewer."""
    peer_heads = peer()
    head = make_tree_head(problem, "default")
    rows = head.row_of_token[problem.targets]
    call = peer_heads.tree_head(problem.h, head.weight, head.nodes, head.tree.spans, rows, threads=threads)
    truth = mean_loss(functools.partial(tree_reference, problem, head))
    return Candidate(named(call, ("loss", "dh", "dweight", "nodes.weight")), truth, *tree_cost(problem, head.tree))


def torch_adaptive_candidate(problem: Problem, div_value: float) -> Candidate:
    """AdaptiveLogSoftmaxWithLoss at torch's usual cut-offs, with random weights of its own."""
    peer_heads = peer()
    torch, cross_entropy = peer_heads.torch, peer_heads.F.cross_entropy
    torch.manual_seed(0)
    (n, dim), vocab = problem.h.shape, len(problem.weight)
    head = peer_heads.adaptive_head(dim, vocab, div_value)
    ranks = peer_heads.frequency_ranks(problem.counts)[problem.targets]
    names = ("dh", *(name for name, _ in head.named_parameters()))

    clusters = list(itertools.pairwise(head.cutoffs))

    def truth(dtype: type) -> Found:
        """Its definition: cross-entropy over root tokens and clusters, then of each position in its cluster."""
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        x, y = torch.from_numpy(problem.h).to(kind).requires_grad_(), torch.from_numpy(ranks)
        head.to(kind).zero_grad()
        choice, loss = y.clone(), torch.zeros((), dtype=kind)
        for i, (low, high) in enumerate(clusters):
            here = (y >= low) & (y < high)
            choice[here] = head.cutoffs[0] + i
            loss = loss + cross_entropy(head.tail[i](x[here]), y[here] - low, reduction="sum")
        loss = (loss + cross_entropy(head.head(x), choice, reduction="sum")) / n
        loss.backward()
        found = {"loss": loss.detach().numpy(), "dh": x.grad.numpy()}
        found |= {name: parameter.grad.numpy() for name, parameter in head.named_parameters()}
        head.to(torch.float32).zero_grad()
        return found

    products = float(n * head.head.weight.numel())
    for (low, high), tail in zip(clusters, head.tail, strict=True):
        here = int(((ranks >= low) & (ranks < high)).sum())
        products += here * sum(p.numel() for p in tail.parameters())
    parameters = sum(p.numel() for p in head.parameters())
    run = named(peer_heads.adaptive_loss(problem.h, head, ranks), ("loss", *names))
    return Candidate(run, truth, 6.0 * products, 4.0 * (2 * n * dim + 2 * parameters))


CANDIDATES: dict[str, Callable[[Problem], Candidate]] = {
    "dense": dense_candidate,
    "sampled": sampled_candidate,
    **{f"tree:{shape}": functools.partial(tree_candidate, shape=shape) for shape in SHAPES if shape != "default"},
    "tree:default": functools.partial(tree_candidate, shape="default"),
    "torch:tree": torch_tree_candidate,  # beside tree:default: they share the tree and the reference
    "torch:tree-1thread": functools.partial(torch_tree_candidate, threads=1),
    "torch:eager": torch_dense_candidate,
    "torch:compile": functools.partial(torch_dense_candidate, compiled=True),
    "torch:adaptive": functools.partial(torch_adaptive_candidate, div_value=1.0),
    "torch:adaptive-div4": functools.partial(torch_adaptive_candidate, div_value=4.0),
}
QUICK = ("dense", "tree:two-level", "tree:default", "torch:eager", "torch:adaptive", "torch:adaptive-div4")


# --- the check ---


def row_errors(found: np.ndarray, truth: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of (difference, scale): each row's largest error, and the largest value of the row.

    A vector is one row. Each row has its own scale, so that a wrong gradient of a rare token cannot hide behind the
    values of a frequent one.
    """
    found, truth = (
        array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1) for array in (found, truth)
    )
    for start in range(0, len(truth), 4096):
        here = slice(start, start + 4096)
        yield np.abs(found[here] - truth[here]).max(1), np.abs(truth[here]).max(1)


def relative_error(found: np.ndarray, truth: np.ndarray) -> float:
    """Largest error of a row relative to its largest value; infinite where a row should be zero and is not."""
    worst = 0.0
    for difference, scale in row_errors(found, truth):
        wrong = np.where(scale > 0, difference / np.where(scale > 0, scale, 1), np.where(difference > 0, np.inf, 0))
        worst = max(worst, float(wrong.max()) if np.isfinite(difference).all() else np.inf)
    return worst


def compare(name: str, got: Mapping[str, np.ndarray], float32: Mapping, float64: Mapping) -> float:
    """Largest relative error of got; WrongResultError if it is more than SLACK times float32's."""
    worst = 0.0
    for key, truth in float64.items():
        error, yardstick = relative_error(got[key], truth), relative_error(float32[key], truth)
        allowed = SLACK * (yardstick + float(np.finfo(np.float32).eps))
        if not error <= allowed:
            raise WrongResultError(
                f"{name}: {key} errs by {error:.2g} of its row's largest value; plain float32 errs by {yardstick:.2g}, "
                f"so at most {allowed:.2g} was expected. The kernel is wrong on this machine; please report it."
            )
        worst = max(worst, error)
    return worst


def check(name: str, candidate: Candidate) -> float:
    """Largest relative error of a candidate's loss and gradients; WrongResultError if it is wrong."""
    float32, float64 = candidate.reference(np.float32), candidate.reference(np.float64)
    return compare(name, candidate.run(), float32, float64)
