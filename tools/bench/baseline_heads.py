"""PyTorch's heads as candidates, from tools/baseline. Each raises UnavailableError if torch is not installed.

Dense head and tree are checked against the references of our heads. The adaptive heads are checked against their
definition by autograd in float64, with the error of float32 as tolerance.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from tools.bench.head_problem import Candidate, Found, Problem, UnavailableError
from tools.bench.our_heads import dense_cost, dense_reference, make_tree_head, tree_cost, tree_reference


def require_torch() -> None:
    """Raise UnavailableError if torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise UnavailableError("torch is not installed: pip install -e '.[baseline]'")


def named(call: Callable[[], tuple[Any, ...]], names: tuple[str, ...]) -> Callable[[], Found]:
    """The tensors of a call in PyTorch as NumPy arrays by name; empty ones are left out."""

    def run() -> Found:
        return {name: tensor.numpy() for name, tensor in zip(names, call(), strict=True) if tensor.numel()}

    return run


def mean_loss(truth: Callable[[type], Found]) -> Callable[[type], Found]:
    """A reference for heads that return only the mean loss."""

    def reference_of(dtype: type) -> Found:
        found = truth(dtype)
        return {**found, "loss": found["loss"].mean()}

    return reference_of


def torch_dense_candidate(problem: Problem, *, compiled: bool = False) -> Candidate:
    """cross_entropy(linear(h, weight)), eager or through torch.compile."""
    require_torch()
    from tools.baseline import heads

    if compiled and not shutil.which(os.environ.get("CXX", "g++")):
        raise UnavailableError("torch.compile needs a C++ compiler (g++, or CXX)")
    call = heads.dense_head(problem.h, problem.weight, problem.targets, compiled=compiled)
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
    require_torch()
    from tools.baseline import tree_head

    head = make_tree_head(problem, "default")
    rows = head.row_of_token[problem.targets]
    call = tree_head.tree_head(problem.h, head.weight, head.nodes, head.tree.spans, rows, threads=threads)
    truth = mean_loss(functools.partial(tree_reference, problem, head))
    return Candidate(named(call, ("loss", "dh", "dweight", "nodes.weight")), truth, *tree_cost(problem, head.tree))


def torch_adaptive_candidate(problem: Problem, div_value: float) -> Candidate:
    """AdaptiveLogSoftmaxWithLoss at torch's usual cut-offs, with random weights of its own."""
    require_torch()
    import torch
    from torch.nn.functional import cross_entropy

    from tools.baseline import heads

    torch.manual_seed(0)
    (n, dim), vocab = problem.h.shape, len(problem.weight)
    head = heads.adaptive_head(dim, vocab, div_value)
    ranks = heads.frequency_ranks(problem.counts)[problem.targets]
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
    run = named(heads.adaptive_loss(problem.h, head, ranks), ("loss", *names))
    return Candidate(run, truth, 6.0 * products, 4.0 * (2 * n * dim + 2 * parameters))
