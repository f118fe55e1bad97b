"""The tree head: a hierarchical softmax, with a softmax at every node of a token's path. Exact and cheap."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from flashlm_numba.heads.base import (
    Head,
    check_options,
    check_rows,
    check_targets,
    loss_options,
    one_training_call,
)
from flashlm_numba.heads.config import HeadConfig
from flashlm_numba.heads.decisions import NO_TOKENS, Decisions, PathDecisions
from flashlm_numba.heads.label_tree import Tree
from flashlm_numba.heads.sampling import check_settings, sample_rows
from flashlm_numba.heads.tree_nodes import default_rank, factor_nodes, init_nodes, node_log_prior
from flashlm_numba.heads.tree_shapes import build_tree, check_shape
from flashlm_numba.kernels import tree_head as kernels
from flashlm_numba.kernels import tree_inference
from flashlm_numba.kernels.low_rank import low_rank_backward, low_rank_rows
from flashlm_numba.kernels.tree_draw import CopyModel, Drawing, draw_row, likeliest_drawing, plain_drawing
from flashlm_numba.system.arrays import for_reading
from flashlm_numba.system.calls import Pool
from flashlm_numba.system.threads import adopt_threads

__all__ = ["TreeHead"]


NEVER = -1e30  # finite log probability of an impossible token


class Descent(NamedTuple):
    """A node on a token's path from the root, and the softmax over its children, of which tokens come first."""

    node: int
    chosen: int  # index of the child on the path
    log_p: np.ndarray  # (children,) float64: ln p of each child, given the node


class TreeHead(Head):
    """P(token) = product of a softmax over each node's children, over the nodes of the token's path. Exact.

    The cost per position is that of the path.

    tree : Tree; None: build one of the named shape from counts (V,), by token id
    weight, dweight : (V, C) float32, rows **in leaf order** (row r is token tree.token_of_row[r]), shared with the
        embedding. None: the head has separate leaf rows, small and random (`weight` in its parameters).
    nodes : (M, C) float32, one row per node below the root, which belongs to the head; default: init_nodes
    rank : store these rows as a product of nodes (M, R) and a basis (R, C), both trained, which saves parameters.
        Call prepare after changing the parameters. If basis is given, nodes are the coordinates in it.
    label_smoothing is uniform over a node's children. z_loss adds z * log(Z)**2 at each node of the path. soft_cap
    acts on each node's logits. log_prior (V,) float32, by token id, is a fixed log frequency added to the logits. A
    node gets the sum over its tokens, so that training starts at the unigram distribution.
    Raises ValueError if a shape or dtype is wrong.

    >>> head = TreeHead(vocab_size=1000, dim=8, counts=np.arange(1000))
    >>> h, targets = np.ones((4, 8), np.float32), np.array([0, 1, 2, 999], np.int32)
    >>> loss, nll, dh = head.forward_backward(h, targets, np.full(4, 0.25, np.float32))
    >>> bool(np.allclose(nll, -np.log(head.distribution(h)[np.arange(4), targets]), atol=1e-5))
    True
    """

    name = "tree"
    has_search = True
    own_settings = (
        "tree",
        "tree_clustering",
        "tree_root_tokens",
        "tree_clusters",
        "tree_classes",
        "tree_arity",
        "tree_rank",
    )

    def __init__(
        self,
        tree: Tree | None = None,
        weight: np.ndarray | None = None,
        dweight: np.ndarray | None = None,
        *,
        vocab_size: int | None = None,
        dim: int | None = None,
        counts: np.ndarray | None = None,
        shape: str = "default",
        nodes: np.ndarray | None = None,
        rank: int | None = None,
        basis: np.ndarray | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        soft_cap: float | None = None,
        log_prior: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        check_options("TreeHead", label_smoothing=label_smoothing, z_loss=z_loss, soft_cap=soft_cap)
        for name, size in (("vocab_size", vocab_size), ("dim", dim), ("rank", rank)):
            if size is not None and (size != int(size) or size < 1):
                raise ValueError(f"TreeHead: {name} must be a whole number of at least 1, got {size}")
        if tree is None:
            if counts is None and vocab_size is None:
                raise ValueError("TreeHead: give a tree, the tokens' counts or vocab_size")
            tree = build_tree(shape, np.zeros(vocab_size or 0) if counts is None else counts)
        self.tree = tree
        self.vocab_size = tree.vocab_size
        if vocab_size is not None and vocab_size != self.vocab_size:
            raise ValueError(f"TreeHead: the tree has {self.vocab_size} tokens, but vocab_size is {vocab_size}")
        if counts is not None and len(counts) != self.vocab_size:
            raise ValueError(f"TreeHead: the tree has {self.vocab_size} tokens, but there are {len(counts)} counts")
        self.parameters: dict[str, np.ndarray] = {}
        self.gradients: dict[str, np.ndarray] = {}
        if weight is None:
            if dim is None:
                raise ValueError("TreeHead: give weight (V, C), or dim for separate leaf rows")
            rng = np.random.default_rng(seed)
            weight = rng.standard_normal((self.vocab_size, dim), np.float32) * np.float32(dim**-0.5)
            self.parameters["weight"] = weight
        kernel_weight = for_reading(weight)
        check_rows("TreeHead", kernel_weight, dweight)
        weight = np.asarray(weight)
        if weight.shape[0] != self.vocab_size or dim not in (None, weight.shape[1]):
            raise ValueError(
                f"TreeHead: weight must have shape ({self.vocab_size}, {dim or 'any'}), got {weight.shape}"
            )
        self.weight = weight
        self.dweight = np.zeros(weight.shape, np.float32) if dweight is None else dweight
        if "weight" in self.parameters:
            self.gradients["weight"] = self.dweight
        self._take_nodes(init_nodes(tree, weight, counts) if nodes is None else nodes, rank, basis)
        self.row_of_token: np.ndarray = tree.row_of_token
        self.label_smoothing, self.z_loss, self.soft_cap = label_smoothing, z_loss, soft_cap
        self._prior: dict[str, Any] = {}
        if log_prior is not None:
            log_prior = np.asarray(log_prior)
            if log_prior.shape != (self.vocab_size,):
                raise ValueError(f"TreeHead: log_prior must have shape ({self.vocab_size},), got {log_prior.shape}")
            # -inf for an impossible token would make a node of such tokens 0 / 0
            by_row = np.maximum(log_prior[tree.token_of_row], NEVER).astype(np.float32)
            self._prior = {"log_prior": by_row, "node_log_prior": node_log_prior(tree, by_row)}
        self.log_prior = log_prior
        self._scratch: Pool[kernels.TreeScratch] = Pool()
        self._training = one_training_call("TreeHead")
        self._kernel_tree = kernels.make_tree(
            kernel_weight, for_reading(self.nodes), for_reading(tree.spans), soft_cap=soft_cap, **self._prior
        )
        self._sampler = tree_inference.TreeSampler(self._kernel_tree)

    @classmethod
    def check(cls, settings: HeadConfig, *, has_rows: bool) -> None:
        """Raise UserError unless the tree's shape exists and takes the given options."""
        rows = has_rows and _clusters_rows(settings)
        check_shape(settings.tree, _shape_options(settings), rows=rows, prefix="tree_")

    @classmethod
    def title(cls, settings: HeadConfig) -> str:
        """The head's name and the requested shape of the tree."""
        return f"tree ({settings.tree})"

    @classmethod
    def training_bytes(cls, settings: HeadConfig, vocab_size: int, dim: int, positions: int) -> int:
        """See Head.training_bytes: scratch, and the rows of the inner nodes where these are as many as the tokens."""
        arity = 2 if settings.tree == "huffman" else settings.tree_arity
        nodes = vocab_size // (arity - 1) if arity else 0
        return 64 * positions * dim + 4 * 4 * nodes * dim

    @classmethod
    def constants_from_data(
        cls, settings: HeadConfig, counts: np.ndarray, rows: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """The constants of Head.constants_from_data and the tree's arrays."""
        given = rows if _clusters_rows(settings) else None
        tree = build_tree(settings.tree, counts, rows=given, **_shape_options(settings))
        return super().constants_from_data(settings, counts, rows) | tree.to_tensors()

    @classmethod
    def token_of_row(cls, constants: dict[str, np.ndarray]) -> np.ndarray:
        """The tokens (V,) in leaf order."""
        return constants["tree.token_of_row"]

    @classmethod
    def from_settings(
        cls,
        settings: HeadConfig,
        weight: np.ndarray,
        dweight: np.ndarray,
        *,
        constants: dict[str, np.ndarray],
        parameters: dict[str, np.ndarray],
        counts: np.ndarray | None,
    ) -> TreeHead:
        """See Head.from_settings. Node rows that were not saved start as means of leaf rows, weighted by the counts."""
        tree = Tree.from_tensors(constants)
        nodes, basis = parameters.get("nodes.weight"), parameters.get("nodes.basis")
        rank = None
        if nodes is None:
            rank = settings.tree_rank or default_rank(settings.tree, tree, weight.shape[1])
        options = loss_options(settings, constants)
        return TreeHead(tree, weight, dweight, counts=counts, nodes=nodes, basis=basis, rank=rank, **options)

    def constants(self) -> dict[str, np.ndarray]:
        """The constants of Head.constants and the tree's arrays."""
        return super().constants() | self.tree.to_tensors()

    def describe(self, counts: Callable[[], np.ndarray | None]) -> dict[str, Any]:
        """The tree's shape, and the expected cost per position if the training text is available for token counts."""
        found = counts()
        description = self.tree.describe(found)
        if found is None:  # without counts there is no expected cost
            description = {name: value for name, value in description.items() if not name.startswith("expected")}
        return {"tree": description}

    def _take_nodes(self, nodes: np.ndarray, rank: int | None, basis: np.ndarray | None) -> None:
        """Set the node rows, full or factored, and their gradients."""
        count, dim = self.tree.n_nodes - 1, self.weight.shape[1]
        nodes, basis = np.asarray(nodes), None if basis is None else np.asarray(basis)
        if rank is not None and basis is None:
            nodes, basis = factor_nodes(nodes, rank)
        if basis is not None and (basis.ndim != 2 or basis.shape != (nodes.shape[-1], dim)):
            raise ValueError(f"TreeHead: basis must have shape ({nodes.shape[-1]}, {dim}), got {basis.shape}")
        width = dim if basis is None else len(basis)
        if nodes.shape != (count, width):
            raise ValueError(f"TreeHead: nodes must have shape ({count}, {width}), got {nodes.shape}")
        self._basis = basis
        self.nodes = nodes if basis is None else np.zeros((count, dim), np.float32)
        self.dnodes = np.zeros(self.nodes.shape, np.float32)  # gradient of the full rows
        if not count:  # a tree with only a root has no node rows
            return
        self.parameters["nodes.weight"] = nodes
        self.gradients["nodes.weight"] = self.dnodes
        if basis is not None:
            self.gradients["nodes.weight"] = np.zeros(nodes.shape, np.float32)
            self.parameters["nodes.basis"] = basis
            self.gradients["nodes.basis"] = np.zeros(basis.shape, np.float32)
        self.prepare()

    def prepare(self) -> None:
        """Multiply the factors of the node rows, if there are any. Call this after every change of the parameters."""
        if self._basis is not None and self.nodes.size:
            # through a temporary array, since a thread that generates text must not see a partial product
            coords, basis = for_reading(self.parameters["nodes.weight"]), for_reading(self._basis)
            self.nodes[...] = low_rank_rows(coords, basis, np.empty_like(self.nodes))

    def _buffers(self) -> AbstractContextManager[kernels.TreeScratch]:
        """Scratch for one call; the number of threads is determined first, because scratch depends on it."""
        adopt_threads()
        return self._scratch.item(lambda _: True, kernels.TreeScratch)

    def _rows(self, targets: np.ndarray) -> np.ndarray:
        targets = for_reading(targets)
        check_targets("TreeHead", targets, self.vocab_size)
        return self.row_of_token[targets]

    def forward_backward(
        self, h: np.ndarray, targets: np.ndarray, weights: np.ndarray, *, accumulate: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns loss (N,), nll (N,), dh (N, C), and adds the gradients of sum(weights * loss) to dweight and dnodes.

        h (N, C), weights (N,) float32; targets (N,) int32 token ids
        accumulate : False replaces the previous gradients, which is cheaper than clearing them, since only the rows on
            the targets' paths have gradients
        nll is the plain -log p, whatever the options.
        Raises RuntimeError if another thread is in forward_backward of this head.
        """
        with self._training.alone():
            return self._forward_backward(for_reading(h), self._rows(targets), for_reading(weights), accumulate)

    def _forward_backward(
        self, h: np.ndarray, rows: np.ndarray, weights: np.ndarray, accumulate: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        factored = self._basis is not None and self.nodes.size > 0
        if factored and accumulate:
            self.dnodes[...] = 0  # gradient of the full rows, of this batch only
        with self._buffers() as scratch:
            result = kernels.tree_head_forward_backward(
                h,
                self._kernel_tree,
                rows,
                weights,
                self.dweight,
                self.dnodes,
                label_smoothing=self.label_smoothing,
                z_loss=self.z_loss,
                accumulate=accumulate,
                scratch=scratch,
            )
        if factored:
            assert self._basis is not None
            low_rank_backward(
                self.gradients["nodes.weight"],
                self.gradients["nodes.basis"],
                self.dnodes,
                for_reading(self.parameters["nodes.weight"]),
                for_reading(self._basis),
                accumulate=accumulate,
            )
        return result

    def log_prob(self, h: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """log p(target), (N,) float32. Visits only the target's path."""
        rows = self._rows(targets)
        with self._buffers() as scratch:
            _, nll = kernels.tree_head_forward(for_reading(h), self._kernel_tree, rows, scratch=scratch)
        return -nll

    def log_distribution(self, h: np.ndarray) -> np.ndarray:
        """log p of all tokens, (N, V) float32, columns by token id. Visits all nodes."""
        adopt_threads()
        return tree_inference.tree_head_log_distribution(
            for_reading(h), self._kernel_tree, for_reading(self.tree.token_of_row)
        )

    def logits(self, h: np.ndarray) -> np.ndarray:
        """The result of log_distribution: a tree has no logits of tokens, and log-probabilities serve as such."""
        return self.log_distribution(h)

    def distribution(self, h: np.ndarray) -> np.ndarray:
        """Probabilities of all tokens, (N, V) float32, columns by token id. Visits all nodes."""
        return np.exp(self.log_distribution(h))

    def top(self, x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The k = min(count, V) likeliest tokens for one x (C,). Returns ids (k,) int32 and log p (k,) float64.

        The likeliest comes first. The result is exact; it uses best-first search over the nodes.
        """
        rows, log_p = self._sampler.top(for_reading(x)[None], count)
        return self.tree.token_of_row[rows], log_p

    def top_mixed(
        self, x: np.ndarray, count: int, tokens: np.ndarray, shares: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """See Head.top_mixed. It uses best-first search; which of equal tokens comes first is arbitrary."""
        x = for_reading(x)
        if not np.isfinite(x).all():
            raise ValueError("TreeHead: h must be finite to find the likeliest tokens")
        copies = np.where(tokens >= 0, self.row_of_token[tokens], np.int32(-1))
        rows, log_p = self._sampler.top_mixed(x[None], count, copies, shares)
        return self.tree.token_of_row[rows], log_p

    def decisions(self, x: np.ndarray, tokens: np.ndarray = NO_TOKENS, shares: np.ndarray | None = None) -> Decisions:
        """See Head.decisions: one at every node of the path."""
        x = for_reading(x)[None]
        rows = np.where(tokens >= 0, self.row_of_token[tokens], np.int32(-1))
        return PathDecisions(
            self.tree.spans,
            self.tree.token_of_row,
            self.row_of_token,
            lambda m: self._sampler.node(x, m),
            rows,
            np.ones(1) if shares is None else shares,
        )

    def log_prob_of(self, x: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """ln p of some tokens (K,) int32 for one x (C,), (K,) float64, by the arithmetic of `top`."""
        return self._sampler.log_prob(for_reading(x)[None], self._rows(tokens))

    def descent(self, x: np.ndarray, token: int) -> list[Descent]:
        """The nodes of a token's path for one x (C,), the root first. The log_p of the chosen children add to ln p."""
        x = for_reading(x)[None]
        return [Descent(node, chosen, self._sampler.node(x, node)) for node, chosen in self.tree.path(token)]

    def likeliest(self, h: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See Head.likeliest. It uses best-first search."""
        found = [self.top(x, count) for x in h]
        k = min(count, self.vocab_size)
        ids = np.array([ids for ids, _ in found], np.int32).reshape(-1, k)
        return ids, np.array([log_p for _, log_p in found], np.float64).reshape(-1, k)

    def sample(
        self,
        h: np.ndarray,
        rng: np.random.Generator,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> np.ndarray:
        """Sample one token id per row, (N,) int32, applying temperature, then top-k, then top-p.

        Temperature 1 without top-k and top-p samples by descent through the tree. Top-k at any temperature, and
        temperature 0, use best-first search. All other settings use all V probabilities.
        """
        h, drawing = for_reading(h), self.drawing(temperature, top_k, top_p)
        if drawing is None:
            return sample_rows(self.distribution(h), rng, temperature, top_k, top_p)
        return self.tokens_of_rows(
            np.array(
                [draw_row(drawing, h[n : n + 1], NO_TOKENS, rng.random(drawing.uniforms)) for n in range(len(h))], int
            )
        )

    def drawing(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        copies: CopyModel | None = None,
    ) -> Drawing | None:
        """See Head.drawing."""
        top_k, top_p = check_settings(temperature, top_k, top_p, self.vocab_size)
        if temperature == 1 and top_k is None and top_p is None:
            return plain_drawing(self._kernel_tree, copies)
        if temperature == 0 or top_k is not None:
            count = 1 if temperature == 0 else top_k or 1
            return likeliest_drawing(self._kernel_tree, count, float(temperature), top_p, copies)
        return None

    def tokens_of_rows(self, rows: np.ndarray) -> np.ndarray:
        """See Head.tokens_of_rows."""
        return self.tree.token_of_row[rows]


def _shape_options(settings: HeadConfig) -> dict[str, int]:
    """The options for build_tree from the settings."""
    options = {
        "root_tokens": settings.tree_root_tokens,
        "clusters": settings.tree_clusters,
        "classes": settings.tree_classes,
        "arity": settings.tree_arity,
    }
    return {name: value for name, value in options.items() if value is not None}


def _clusters_rows(settings: HeadConfig) -> bool:
    """Whether the tree is built from the initial embedding."""
    return settings.tree_clustering == "embedding" or settings.tree == "clustered"
