"""Our tree head in hand-written PyTorch, as fast as we could make it, as a fair baseline for the kernels.

N positions, C channels, V vocabulary, M inner nodes of a tree.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

SHARED_FLOP = 5e7  # work of a node's three products from which on all threads share it


def tree_plan(spans: np.ndarray, rows: Tensor) -> list[tuple[int, int, Tensor]]:
    """The positions at every visited node: (node, first position, choices (n, 1)).

    spans : (M + 1, 5), token_start, token_end, child_start, child_end and leaf_end of every node, breadth first
    rows : (N,) int64, the targets' leaf rows, sorted, so that the n positions of a node are contiguous
    A choice is the index of a child, tokens before child nodes. Each level takes a few torch calls.
    """
    token_start, token_end, child_start, child_end, _ = torch.as_tensor(spans.astype(np.int64)).T.contiguous()
    first, last = 0, 1  # nodes of this level
    node, position = torch.zeros_like(rows), torch.arange(len(rows))
    plan: list[tuple[int, int, Tensor]] = []
    while len(rows):
        ids, counts = torch.unique_consecutive(node, return_counts=True)
        first, last = last, int(child_end[last - 1])  # nodes of the level below, in order of their leaf rows
        choice, leaf = rows - token_start[node], rows < token_end[node]
        if last > first:
            child = first + torch.searchsorted(token_start[first:last], rows, right=True) - 1
            below = token_end[node] - token_start[node] + child - child_start[node]
            choice = torch.where(leaf, choice, below)
        starts = position[torch.cumsum(counts, 0) - counts].tolist()
        plan += zip(ids.tolist(), starts, torch.split(choice[:, None], counts.tolist()), strict=True)
        if last == first:
            break
        inner = ~leaf
        rows, node, position = rows[inner], child[inner], position[inner]
    return plan


def tree_head(
    h: np.ndarray,
    weight: np.ndarray,
    nodes: np.ndarray,
    spans: np.ndarray,
    rows: np.ndarray,
    *,
    threads: int | None = None,
) -> Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Our tree head in hand-written PyTorch. Returns a function that gives the mean loss, dh, dweight and dnodes.

    h (N, C); weight (V, C) in leaf order; nodes (M, C); spans (M + 1, 5) int; rows (N,), the targets' leaf rows. Any
    floating dtype. dweight and dnodes are the same tensors at every call, cleared first. threads : default: torch's

    Positions are sorted by leaf row, so each node is one product of a slice. Its loss and gradients are written out,
    because a node's gradient can then go directly into its slice of dweight. The following alternatives were tried on
    the default and the two-level tree at N = 4,096 with 2 threads of a busy machine (best of seven calls):
    - Autograd with `weight[a:b]` at each node makes a zero-filled (V, C) gradient per slice: 50 to 100 times slower.
    - Autograd with all slices taken at once by torch.split is 3 to 4 times slower.
    - Gathering nodes with few positions into padded batches for torch.bmm copies their rows: 1.2 to 1.6 times slower.
    - Two products into one buffer, instead of concatenating the rows of tokens and child nodes, take the same time.
    Nodes below SHARED_FLOP run on one thread, because torch's threads would mostly wait for one another. Whether large
    nodes gain from several threads depends on the load of the machine. On a loaded machine one thread for all nodes was
    several times faster, so the benchmark measures both.
    """
    x_all, w, w_nodes = (torch.tensor(array) for array in (h, weight, nodes))
    targets = torch.as_tensor(rows, dtype=torch.int64)
    dw, dw_nodes = torch.zeros_like(w), torch.zeros_like(w_nodes)
    ranges = spans.tolist()
    n_all = len(x_all)
    minus_one = x_all.new_full((n_all, 1), -1.0)

    def work(visit: tuple[int, int, Tensor]) -> float:
        """flop of a node's three products."""
        a, b, c, d, _ = ranges[visit[0]]
        return 6.0 * len(visit[2]) * (b - a + d - c) * x_all.shape[1]

    def visit_all(plan: list[tuple[int, int, Tensor]], sorted_x: Tensor, sorted_dx: Tensor, loss: Tensor) -> None:
        """Compute these nodes: add to loss and sorted_dx, and write dw and dw_nodes."""
        for node, first, choice in plan:
            a, b, c, d, _ = ranges[node]
            tokens, kids = slice(a, b), slice(c - 1, d - 1)
            k = b - a
            if k + d - c == 1:  # a single child has probability one
                continue
            here = slice(first, first + len(choice))
            x = sorted_x[here]
            matrix = w[tokens] if c == d else w_nodes[kids] if not k else torch.cat([w[tokens], w_nodes[kids]])
            log_p = torch.log_softmax(x @ matrix.T, 1)
            loss[here] -= log_p.gather(1, choice)[:, 0]
            dlogits = log_p.exp_().scatter_add_(1, choice, minus_one[: len(choice)])
            sorted_dx[here].addmm_(dlogits, matrix, alpha=1 / n_all)
            if k:
                dw[tokens].addmm_(dlogits[:, :k].T, x, beta=0, alpha=1 / n_all)
            if d > c:
                dw_nodes[kids].addmm_(dlogits[:, k:].T, x, beta=0, alpha=1 / n_all)

    @torch.no_grad()
    def run() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        sorted_rows, order = torch.sort(targets)
        sorted_x = x_all[order]
        sorted_dx, loss = torch.zeros_like(sorted_x), x_all.new_zeros(n_all)
        dw.zero_()
        dw_nodes.zero_()
        plan = tree_plan(spans, sorted_rows)
        large = [visit for visit in plan if work(visit) >= SHARED_FLOP]
        small = [visit for visit in plan if work(visit) < SHARED_FLOP]
        visit_all(large, sorted_x, sorted_dx, loss)
        torch.set_num_threads(1)
        visit_all(small, sorted_x, sorted_dx, loss)
        torch.set_num_threads(threads or before)
        dx = torch.empty_like(sorted_x)
        dx[order] = sorted_dx
        torch.set_num_threads(before)
        return loss.mean(), dx, dw, dw_nodes

    return run
