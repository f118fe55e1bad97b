"""FlashLM v3 in PyTorch: the oracle of the tests and the peer of the benchmarks. The program never uses it.

    python tools/peer_torch.py head                      linear + cross-entropy, and the adaptive head
    python tools/peer_torch.py trunk                     hidden states, forward and backward
    python tools/peer_torch.py step                      a whole training step, and the share of each part
    python tools/peer_torch.py train DATA --minutes 10   training on prepared shards (`flashlm-numba prepare`)

Needs the extra `peer` (pip install -e '.[peer]'). Every result is one JSON object on a line. B batch, T time,
N = B*T positions, C channels, V vocabulary, I width of the GLU, K taps.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.config import ModelConfig
from flashlm_numba.display import peak_rss_mb
from flashlm_numba.kernels.induction import followers, kinds
from tools import timing

if TYPE_CHECKING:
    from flashlm_numba.data import Split

NORM_EPS = 1e-8
ADAPTIVE_CUTOFFS = (1_024, 4_096, 16_384)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic x -> a x + b x^3 + c x^5, Jordan et al. 2024 (Muon)
SHARED_FLOP = 5e7  # of a tree's node, in its three products, from which on all threads share it
EOT = 50_256  # GPT-2's <|endoftext|>


# ------------------------------------------------------------------------------------------- the model


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x**2) + 1e-8) over the last axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * (x.pow(2).mean(dim=-1, keepdim=True) + NORM_EPS).rsqrt())


class TernaryLinear(nn.Module):
    """x @ ternary(weight).T without scale; the gradient goes straight through to weight (n_out, n_in).

    threshold: times the mean magnitude, where a weight becomes +1 or -1.
    """

    def __init__(self, n_in: int, n_out: int, std: float, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.weight = nn.Parameter(torch.empty(n_out, n_in).normal_(std=std))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            threshold = self.threshold * torch.mean(self.weight.abs(), dtype=torch.float64).to(self.weight.dtype)
            ternary = (self.weight > threshold).to(x.dtype) - (self.weight < -threshold).to(x.dtype)
            to_ternary = ternary - self.weight
        return F.linear(x, self.weight + to_ternary)


class Average(nn.Module):
    """x + weight * y with y[t] = decay * y[t - 1] + sqrt(1 - decay**2) * x[t], as one product with a (T, T) matrix."""

    def __init__(self, dim: int, decay: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.decay = decay

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        ages = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        shares = (self.decay ** ages.clamp(min=0).double()).tril() * (1 - self.decay**2) ** 0.5
        return x + self.weight * (shares.to(x.dtype) @ x)


class Gain(nn.Module):
    """A number a channel, from zero."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))


class Induction(nn.Module):
    """Embedded followers, and the gains of each kind: at the input, and at the output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kinds, self.reach = kinds(config.induction_orders), config.induction_reach
        self.inputs = nn.ModuleList(Gain(config.dim) for _ in self.kinds)
        self.outputs = nn.ModuleList(Gain(config.dim) for _ in self.kinds)

    def forward(self, ids: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of ids (B, T): their own (B, T, C), and those of their followers (kinds, B, T, C), zero where none is.

        One look-up for all, so that the embedding gets one gradient.
        """
        tokens = np.ascontiguousarray(ids.numpy(), np.int32)
        found = np.stack([tokens, *(followers(tokens, order, self.reach, skip) for order, skip in self.kinds)])
        rows = F.embedding(torch.from_numpy(np.maximum(found, 0)), embedding)
        return rows[0], rows[1:] * torch.from_numpy(found[1:] >= 0)[..., None]

    def add(self, x: Tensor, gains: nn.ModuleList, rows: Tensor) -> Tensor:
        """x (B, T, C) + the sum over kinds of gain * rows."""
        for gain, row in zip(gains, rows, strict=True):
            x = torch.addcmul(x, gain.get_parameter("weight"), row)  # a third of an einsum's time
        return x


class Mixer(nn.Module):
    """Gated causal dilated grouped convolutions, each with a residual, then a ternary projection.

    A running average of the tokens so far comes first, where the configuration has one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, per_group = config.dim, config.dim // config.groups

        def convolution(dilation: int) -> nn.Conv1d:
            layer = nn.Conv1d(
                dim, dim, config.taps, dilation=dilation, groups=config.groups, bias=False
            )  # weight (C, C/groups, K)
            nn.init.normal_(layer.weight, std=(per_group * config.taps) ** -0.5)
            return layer

        self.average = Average(dim, config.average_decay) if config.average_decay else nn.Identity()
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in config.dilations)
        self.gates = nn.ModuleList(convolution(d) for d in config.dilations)
        self.values = nn.ModuleList(convolution(d) for d in config.dilations)
        self.out = TernaryLinear(dim, dim, 0.01, config.ternary_threshold)
        self.left_padding = [(config.taps - 1) * d for d in config.dilations]

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        x = self.average(x)
        for norm, gate, value, padding in zip(self.norms, self.gates, self.values, self.left_padding, strict=True):
            n = F.pad(norm(x).mT, (padding, 0))  # (B, C, padding + T)
            x = x + (gate(n).sigmoid() * value(n)).mT
        return self.out(x)


class GLU(nn.Module):
    """down(relu(gate(x))**2 * up(x)), all three ternary."""

    def __init__(self, dim: int, inner: int, threshold: float) -> None:
        super().__init__()
        self.gate = TernaryLinear(dim, inner, dim**-0.5, threshold)
        self.up = TernaryLinear(dim, inner, dim**-0.5, threshold)
        self.down = TernaryLinear(inner, dim, 0.01, threshold)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x).relu().square() * self.up(x))


class PeerModel(nn.Module):
    """FlashLM v3 with the parameter names of flashlm_numba.model.

    With `ranks` (V,) (frequency rank of every token id, 0 the most frequent) the head is torch's
    AdaptiveLogSoftmaxWithLoss with its own untied weights (`adaptive.*`), otherwise dense and tied to
    `embedding.weight`. The router is there for the count of parameters; the loss does not use it.
    """

    def __init__(
        self,
        config: ModelConfig | None = None,
        *,
        ranks: np.ndarray | None = None,
        div_value: float = 4.0,
        embedding_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.embedding.weight, std=embedding_std)
        self.norm1 = RMSNorm(config.dim)
        self.mixer = Mixer(config)
        self.norm2 = RMSNorm(config.dim)
        self.glu = GLU(config.dim, config.inner, config.ternary_threshold)
        self.router = nn.Linear(config.dim, 1)
        self.final_norm = RMSNorm(config.dim)
        self.induction = Induction(config)
        self.adaptive: nn.AdaptiveLogSoftmaxWithLoss | None = None
        if ranks is not None:
            self.register_buffer("ranks", torch.as_tensor(ranks, dtype=torch.int64), persistent=False)
            self.adaptive = adaptive_head(config.dim, config.vocab_size, div_value)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> hidden states (B*T, C)."""
        x, followed = self.induction(ids, self.embedding.weight)  # (B, T, C), (kinds, B, T, C)
        x = self.induction.add(x, self.induction.inputs, followed)
        for _ in range(self.config.recursions):
            x = torch.add(x, self.mixer(self.norm1(x)), alpha=self.config.mixer_scale)
            x = torch.add(x, self.glu(self.norm2(x)), alpha=self.config.glu_scale)
        return self.induction.add(self.final_norm(x), self.induction.outputs, followed).flatten(0, 1)

    def losses(
        self, h: Tensor, targets: Tensor, *, want_nll: bool = True, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """loss (N,) and nll (N,) of targets (N,) at h (N, C); `options` are those of dense_loss."""
        if self.adaptive is not None:
            if any(options.values()):
                raise ValueError(f"the adaptive head knows no {sorted(options)}; its loss is the plain NLL")
            loss = -self.adaptive(h, self.get_buffer("ranks")[targets]).output
            return loss, loss.detach()
        return dense_loss(h, self.embedding.weight, targets, want_nll=want_nll, **options)

    def loss_and_grad(
        self, ids: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None, **options: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Loss (N,) and nll (N,) of a batch; adds the gradients of sum(weights * loss).

        ids, targets (B, T); weights (N,), by default 1/N each; `options` are those of dense_loss.
        """
        h = self.hidden(torch.as_tensor(ids, dtype=torch.int64))
        y = torch.as_tensor(targets, dtype=torch.int64).flatten()
        w = torch.full((len(y),), 1 / len(y)) if weights is None else torch.as_tensor(weights)
        loss, nll = self.losses(h, y, **options)
        assert nll is not None
        (loss * w.to(loss.dtype)).sum().backward()
        return loss.detach().numpy(), nll.numpy()

    def state_from_numpy(self, params: dict[str, np.ndarray]) -> None:
        """Copy params (name -> array, all of them and no others) into the model, in the model's dtype."""
        self.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in params.items()}, strict=True)

    def params_to_numpy(self) -> dict[str, np.ndarray]:
        """Copies of all parameters by name."""
        return {name: p.detach().numpy().copy() for name, p in self.named_parameters()}

    def grads_to_numpy(self) -> dict[str, np.ndarray]:
        """Copies of all gradients by name; zeros where there is none (router, frozen embedding)."""
        return {
            name: np.zeros_like(p.detach().numpy()) if p.grad is None else p.grad.numpy().copy()
            for name, p in self.named_parameters()
        }


# ------------------------------------------------------------------------------------------- the heads


def dense_loss(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    log_prior: Tensor | None = None,
    want_nll: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Loss (N,) and nll (N,; no graph) of softmax(cap(h @ weight.T) + log_prior) against targets (N,).

    h (N, C), weight (V, C), log_prior (V,) fixed. The cap is soft_cap * tanh(logit / soft_cap) and acts on
    the learned part only. loss = (1 - s) * nll + s * mean over V of -log p + z_loss * logsumexp**2. nll is
    None unless `want_nll`: with smoothing it costs one more pass over the logits, which a benchmark leaves
    out.
    """
    logits = F.linear(h, weight)  # (N, V)
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if log_prior is not None:
        logits = logits + log_prior
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    nll = None
    if want_nll:
        with torch.no_grad():
            nll = F.cross_entropy(logits, targets, reduction="none") if label_smoothing else loss.detach().clone()
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(dim=-1).square()
    return loss, nll


def adaptive_head(dim: int, vocab_size: int, div_value: float = 4.0) -> nn.AdaptiveLogSoftmaxWithLoss:
    """Torch's adaptive softmax (Grave et al. 2017) at its usual cut-offs; targets are frequency ranks."""
    cutoffs = [c for c in ADAPTIVE_CUTOFFS if c < vocab_size - 1]
    if not cutoffs:
        cutoffs = [max(1, vocab_size // 4)]  # a test's vocabulary
    head = nn.AdaptiveLogSoftmaxWithLoss(dim, vocab_size, cutoffs, div_value=div_value)
    for p in head.parameters():
        nn.init.normal_(p, std=0.02)
    return head


def frequency_ranks(counts: np.ndarray) -> np.ndarray:
    """counts (V,) -> rank (V,) int64 of every token id, 0 the most frequent; ties by id."""
    ranks = np.empty(len(counts), np.int64)
    ranks[np.argsort(-np.asarray(counts, np.int64), kind="stable")] = np.arange(len(counts))
    return ranks


def dense_head(
    h: np.ndarray, weight: np.ndarray, targets: np.ndarray, *, compiled: bool = False
) -> Callable[[], tuple[Tensor, ...]]:
    """cross_entropy(linear(h, weight)): a call gives the mean loss and the gradients dh and dweight of it.

    h (N, C), weight (V, C), targets (N,). compiled: through torch.compile, which needs a C++ compiler.
    """
    x, w = torch.tensor(h, requires_grad=True), torch.tensor(weight, requires_grad=True)
    y = torch.as_tensor(targets, dtype=torch.int64)

    def linear_cross_entropy(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), y)

    loss_of = torch.compile(linear_cross_entropy) if compiled else linear_cross_entropy

    def run() -> tuple[Tensor, ...]:
        loss = loss_of(x, w)
        return loss.detach(), *torch.autograd.grad(loss, [x, w])

    return run


def adaptive_loss(
    h: np.ndarray, head: nn.AdaptiveLogSoftmaxWithLoss, ranks: np.ndarray
) -> Callable[[], tuple[Tensor, ...]]:
    """The adaptive head on h (N, C) and targets given as frequency ranks (N,).

    A call gives the mean loss and the gradients of h and of head.parameters().
    """
    x, y = torch.tensor(h, requires_grad=True), torch.as_tensor(ranks, dtype=torch.int64)
    parameters = list(head.parameters())

    def run() -> tuple[Tensor, ...]:
        loss = head(x, y).loss
        return loss.detach(), *torch.autograd.grad(loss, [x, *parameters], materialize_grads=True)

    return run


def head_candidates(
    h: np.ndarray, weight: np.ndarray, targets: np.ndarray, ranks: np.ndarray, *, compiled: bool = False
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Benchmarks of a head: name -> call that gives the mean loss and its gradients, that of h first.

    h (N, C), weight (V, C), targets (N,), ranks (V,).
    """
    vocab_size, dim = weight.shape
    candidates = {"torch:eager": dense_head(h, weight, targets)}
    if compiled:
        candidates["torch:compile"] = dense_head(h, weight, targets, compiled=True)
    for name, div_value in (("torch:adaptive", 1.0), ("torch:adaptive-div4", 4.0)):
        candidates[name] = adaptive_loss(h, adaptive_head(dim, vocab_size, div_value), ranks[targets])
    return candidates


def tree_plan(spans: np.ndarray, rows: Tensor) -> list[tuple[int, int, Tensor]]:
    """Which positions meet at which node: (node, first position, choices (n, 1)) for every visited node.

    spans (M + 1, 5): token_start, token_end, child_start, child_end, leaf_end of every node, numbered breadth first;
    rows (N,) int64: the targets' leaf rows, sorted, so that the n positions of a node follow one another. A choice is
    a child's number, tokens before child nodes. Level by level, each with a handful of torch calls.
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
    """Our tree head by hand in PyTorch: a call gives the mean loss and the gradients dh, dweight and dnodes of it.

    h (N, C); weight (V, C) in leaf order; nodes (M, C); spans (M + 1, 5) int; rows (N,): the targets' leaf rows. Any
    floating dtype. dweight and dnodes are the same tensors at every call, cleared first. threads: default torch's.

    Positions are sorted by leaf row, so each node is one product of a slice; its loss and gradients are written out,
    since a node's gradient can then go straight into its slice of dweight. Tried on the default and the two-level tree
    at N = 4,096, 2 threads of a busy machine (best of seven calls), and dropped: autograd with `weight[a:b]` at each
    node, which makes a zero-filled (V, C) gradient per slice (50 to 100 times slower); autograd with all slices taken
    at once by torch.split (3 to 4 times slower); nodes with few positions gathered into padded batches for torch.bmm,
    which copies their rows (1.2 to 1.6 times slower). Two products into one buffer, instead of concatenating the rows
    of a node that has both tokens and child nodes, took the same time. Nodes below SHARED_FLOP run on one thread: there
    torch's threads mostly wait for one another. Whether large nodes gain from more than one depends on how quiet the
    machine is: on a loaded one, one thread throughout was several times faster, so the benchmark measures both.
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
        """Loss and gradients of these nodes, added to loss and sorted_dx and put into dw and dw_nodes."""
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


# -------------------------------------------------------------------------------------- the optimisers


def newton_schulz(u: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of the SVD of u (m, n) by `steps` quintic Newton-Schulz iterations."""
    a, b, c = NEWTON_SCHULZ
    x = u / (u.norm() + 1e-7)
    wide = x.mT if u.shape[0] > u.shape[1] else x  # the Gram matrix of the smaller side
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.mT if u.shape[0] > u.shape[1] else wide


class NorMuon(torch.optim.Optimizer):
    """NorMuon (arXiv 2510.05491): orthogonalised momentum, divided by a running rms of every row.

    variant "v3": U = M, beta2 0.999, rows divided by sqrt(v) + 1e-8, step of Frobenius norm 0.2 * sqrt(m*n).
    variant "published": the repository's form: Nesterov, beta2 0.95, 1e-10, step rescaled to the norm of the
    orthogonalised momentum, times sqrt(max(1, m/n)).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        beta2: float | None = None,
        weight_decay: float = 0.0,
        variant: str = "v3",
    ) -> None:
        if variant not in ("v3", "published"):
            raise ValueError(f"NorMuon: variant must be 'v3' or 'published', got {variant!r}")
        if beta2 is None:
            beta2 = 0.999 if variant == "v3" else 0.95
        self.variant = variant
        defaults = {"lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            lr, beta1, beta2 = group["lr"], group["momentum"], group["beta2"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                    state["row_square"] = p.new_zeros(p.shape[0])
                m, v = state["momentum"], state["row_square"]
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                u = m if self.variant == "v3" else m * beta1 + p.grad * (1 - beta1)
                o = newton_schulz(u)
                v.mul_(beta2).add_(o.square().mean(dim=1), alpha=1 - beta2)
                if self.variant == "v3":
                    step = o / (v.sqrt() + 1e-8)[:, None]
                    step *= 0.2 * math.sqrt(o.numel()) / (step.norm() + 1e-8)
                else:
                    step = o / (v.sqrt() + 1e-10)[:, None]
                    step *= o.norm() / (step.norm() + 1e-10) * math.sqrt(max(1.0, o.shape[0] / o.shape[1]))
                p.mul_(1 - lr * group["weight_decay"]).sub_(step, alpha=lr)


def parameter_groups(model: nn.Module) -> dict[str, list[str]]:
    """Names by group: "normuon" (matrices of the block), "decay" (other tensors), "no_decay" (vectors)."""
    groups: dict[str, list[str]] = {"normuon": [], "decay": [], "no_decay": []}
    for name, p in model.named_parameters():
        if p.ndim < 2:
            groups["no_decay"].append(name)
        elif p.ndim == 2 and not name.startswith(("embedding.", "adaptive.", "head.")):
            groups["normuon"].append(name)
        else:
            groups["decay"].append(name)
    return groups


class Optimizers:
    """NorMuon for the block's matrices, torch's AdamW for the rest, one global clip over all of it."""

    def __init__(
        self,
        model: nn.Module,
        *,
        normuon: str = "v3",
        normuon_lr: float = 0.02,
        adamw_lr: float = 3e-4,
        trunk_factor: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        clip: float | None = 1.0,
        fused: bool = False,
    ) -> None:
        named = dict(model.named_parameters())
        names = parameter_groups(model)
        self.parameters = list(named.values())
        self.clip = clip
        self.normuon = NorMuon([named[n] for n in names["normuon"]], lr=normuon_lr, variant=normuon)
        tables = [n for n in names["decay"] if named[n].ndim == 2]
        trunk = [n for n in names["decay"] if n not in tables]
        self.adamw = torch.optim.AdamW(
            [
                {"params": [named[n] for n in tables], "weight_decay": weight_decay, "lr": adamw_lr},
                {"params": [named[n] for n in trunk], "weight_decay": weight_decay},
                {"params": [named[n] for n in names["no_decay"]], "weight_decay": 0.0},
            ],
            lr=adamw_lr * trunk_factor,
            betas=betas,
            fused=fused,
        )
        self._rates = [(g, g["lr"]) for o in (self.normuon, self.adamw) for g in o.param_groups]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self.parameters:
            p.grad = None

    def step(self, scale: float = 1.0) -> float:
        """Clip, then step at `scale` times the learning rates; returns the gradient norm before the clip."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, math.inf if self.clip is None else self.clip)
        for group, rate in self._rates:
            group["lr"] = rate * scale
        self.normuon.step()
        self.adamw.step()
        return float(norm)


def schedule(step: int, *, warmup: int, total: int | None = None, decay: int = 0) -> float:
    """Factor on the learning rate at `step` (from 0): linear warm-up, constant, linear decay at the end."""
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if decay and total is not None and step >= total - decay:
        factor *= max(0.0, (total - step) / decay)
    return factor


# ------------------------------------------------------------------------------------- training and scoring


def training_step(
    model: PeerModel,
    optimizers: Optimizers,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    positions: float = 1.0,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
    clock: dict[str, float] | None = None,
    **options: Any,
) -> float:
    """One optimiser step on micro-batches of ids and targets (B, T); returns the mean training loss.

    positions : share of the positions, drawn at random, that the loss is taken at
    scale : factor on the learning rates;  options : those of dense_loss
    clock : seconds are added to its keys "trunk", "head" and "optimizer"
    """
    clock = {} if clock is None else clock
    optimizers.zero_grad()
    total = 0.0
    for ids, targets in batches:
        start = time.perf_counter()
        h, y = model.hidden(ids), targets.flatten()
        if positions < 1:
            kept = torch.randperm(len(y), generator=generator)[: max(1, round(positions * len(y)))]
            h, y = h[kept], y[kept]
        cut = h.detach().requires_grad_()  # two graphs, so that trunk and head are timed apart
        middle = time.perf_counter()
        loss, _ = model.losses(cut, y, want_nll=False, **options)
        mean = loss.mean() / len(batches)
        mean.backward()
        total += mean.item()
        late = time.perf_counter()
        h.backward(cut.grad)
        end = time.perf_counter()
        clock["head"] = clock.get("head", 0.0) + late - middle
        clock["trunk"] = clock.get("trunk", 0.0) + (middle - start) + (end - late)
    start = time.perf_counter()
    optimizers.step(scale)
    clock["optimizer"] = clock.get("optimizer", 0.0) + time.perf_counter() - start
    return total


def scored_windows(document: np.ndarray, context: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Windows of a document (n,) that score each of its tokens once: inputs (t,), targets (t,), first scored.

    The first token is predicted from <|endoftext|>. Windows have at most `length` inputs and overlap by
    `context` (receptive field - 1) of them, which see the same past in every window, so that the result does
    not depend on `length`.
    """
    if length <= context:
        raise ValueError(f"windows of {length} tokens leave none to score after {context} of context")
    inputs = np.concatenate([[EOT], document[:-1]]).astype(np.int64)
    done = 0
    while done < len(document):
        start = max(0, done - context)
        end = min(start + length, len(document))
        yield inputs[start:end], document[start:end].astype(np.int64), done - start
        done = end


@torch.no_grad()
def score(
    model: PeerModel,
    split: Split,
    *,
    max_tokens: int | None = None,
    length: int = 1024,
    rows: int = 8,
    log_prior: Tensor | None = None,
    soft_cap: float | None = None,
) -> dict[str, float | int]:
    """NLL of a split by the rule of `flashlm-numba eval`: "nll", "tokens"; of a whole split "bits_per_byte".

    Every token of every document once, contexts inside documents. max_tokens takes the first ones only.
    """
    context = model.config.receptive_field - 1
    length = max(length, 2 * context)
    options: dict[str, Any] = {} if model.adaptive is not None else {"log_prior": log_prior, "soft_cap": soft_cap}
    windows = [w for d in split.documents(max_tokens) for w in scored_windows(d, context, length)]
    windows.sort(key=lambda w: -len(w[0]))  # little padding, which stands at the end and is never looked at
    total, count = 0.0, 0
    for low in range(0, len(windows), rows):
        part = windows[low : low + rows]
        ids = np.full((len(part), len(part[0][0])), EOT % model.config.vocab_size)
        for row, (inputs, _, _) in zip(ids, part, strict=True):
            row[: len(inputs)] = inputs
        hidden = model.hidden(torch.from_numpy(ids)).view(*ids.shape, -1)
        h = torch.cat([hidden[i, first : len(x)] for i, (x, _, first) in enumerate(part)])
        y = torch.from_numpy(np.concatenate([y[first:] for _, y, first in part]))
        for chunk in range(0, len(y), 512):
            nll = model.losses(h[chunk : chunk + 512], y[chunk : chunk + 512], **options)[1]
            assert nll is not None
            total += float(nll.double().sum())
        count += len(y)
    result: dict[str, float | int] = {"nll": total / max(1, count), "tokens": count}
    if max_tokens is None:
        result["bits_per_byte"] = total / (math.log(2) * max(1, split.n_bytes))
    return result


@dataclass(frozen=True)
class Phase:
    """Batches of a stretch of training."""

    last_step: int | None  # the phase ends after this step; None: never
    rows: int  # sequences in a micro-batch
    length: int  # tokens in a sequence
    micro_batches: int  # a step

    @staticmethod
    def parse(text: str) -> tuple[Phase, ...]:
        """Phases from "1000:4x64x4,4000:4x128x4" or a single "16x128": [last step:]rows x length [x micro].

        >>> Phase.parse("16x128")
        (Phase(last_step=None, rows=16, length=128, micro_batches=1),)
        """
        phases = []
        for part in text.split(","):
            last, _, shape = part.rpartition(":")
            sizes = [int(n) for n in shape.split("x")]
            if len(sizes) not in (2, 3) or min(sizes) < 1:
                raise ValueError(f"a phase is [LAST_STEP:]ROWSxLENGTH[xMICRO_BATCHES], got {part!r}")
            phases.append(Phase(int(last) if last else None, sizes[0], sizes[1], *(sizes[2:] or [1])))
        return tuple(phases)


V3_PHASES = "1000:4x64x4,4000:4x128x4,7000:4x256x8,10000:4x512x8"


# ---------------------------------------------------------------------------------------------- command line


def emit(**result: Any) -> None:
    """Print one JSON object on a line, floats to five decimals."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: short(item) for name, item in value.items()}
        return round(value, 5) if isinstance(value, float) else value

    click.echo(json.dumps(short(result)))


def ids_and_counts(data: Path | None, n: int, vocab_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n token ids in order and the counts (V,) of all ids: of prepared data, or drawn by Zipf's law."""
    if data is None:
        frequency = 1 / np.arange(2.0, vocab_size + 2)
        counts = np.maximum(1, 1e9 * frequency / frequency.sum()).astype(np.int64)
        return np.random.default_rng(seed).choice(vocab_size, n, p=frequency / frequency.sum()), counts
    from flashlm_numba.data import open_tokens

    train = open_tokens(data).train
    return train.windows(np.array([0]), n)[0].astype(np.int64), train.counts(vocab_size)


@click.group(help=__doc__.split("\n\n")[0] if __doc__ else None)
def main() -> None:
    pass


def common(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every benchmark."""
    for option in (
        click.option("--data", type=click.Path(path_type=Path), help="Prepared tokens; default: Zipf's law."),
        click.option("--seed", default=0, show_default=True),
        click.option("--repeats", default=5, show_default=True),
        click.option("--threads", default=timing.available_cores(), show_default=True),
    ):
        command = option(command)
    return command


@main.command("head")
@common
@click.option("--rows", "rows_list", multiple=True, type=int, default=(512, 2048), show_default=True)
@click.option("--vocab", default=50_257, show_default=True)
@click.option("--dim", default=256, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Also torch.compile (needs a C++ compiler).")
def head_command(
    threads: int,
    repeats: int,
    seed: int,
    data: Path | None,
    rows_list: tuple[int, ...],
    vocab: int,
    dim: int,
    compiled: bool,
) -> None:
    """Forward and backward of the heads, positions per second."""
    torch.set_num_threads(threads)
    emit(**timing.environment(threads))
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((vocab, dim), dtype=np.float32) * np.float32(0.02)
    for rows in rows_list:
        targets, counts = ids_and_counts(data, rows, vocab, seed)
        h = rng.standard_normal((rows, dim), dtype=np.float32)
        candidates = head_candidates(h, weight, targets, frequency_ranks(counts), compiled=compiled)
        for name, seconds in timing.measure(candidates, repeats).items():
            emit(head=name, rows=rows, seconds=seconds, positions_per_s=timing.rate(seconds, rows))


@main.command("trunk")
@common
@click.option("--batch", default="16x128", show_default=True, help="ROWSxLENGTH")
def trunk_command(threads: int, repeats: int, seed: int, data: Path | None, batch: str) -> None:
    """Hidden states, forward and backward, with the embedding's gradient; tokens per second."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    emit(**timing.environment(threads))
    (phase,) = Phase.parse(batch)
    model = PeerModel()
    n = phase.rows * phase.length
    ids = torch.from_numpy(ids_and_counts(data, n, model.config.vocab_size, seed)[0]).view(phase.rows, phase.length)
    cotangent = torch.randn(n, model.config.dim)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model.hidden(ids).backward(cotangent)

    seconds = timing.measure({"trunk": run}, repeats)["trunk"]
    emit(trunk=batch, seconds=seconds, tokens_per_s=timing.rate(seconds, n))


@main.command("step")
@common
@click.option("--batch", "batches", multiple=True, default=("16x128",), show_default=True, help="ROWSxLENGTH[xMICRO]")
@click.option("--head", type=click.Choice(["dense", "adaptive"]), default="dense", show_default=True)
@click.option("--div-value", default=4.0, show_default=True, help="Of the adaptive head; 4 is torch's default.")
@click.option("--positions", multiple=True, type=float, default=(1.0, 0.25), show_default=True)
@click.option("--label-smoothing", default=0.0, show_default=True)
@click.option("--z-loss", default=0.0, show_default=True)
@click.option("--normuon", type=click.Choice(["v3", "published"]), default="v3", show_default=True)
@click.option("--fused", is_flag=True, help="torch's fused AdamW.")
def step_command(
    threads: int,
    repeats: int,
    seed: int,
    data: Path | None,
    batches: tuple[str, ...],
    head: str,
    div_value: float,
    positions: tuple[float, ...],
    label_smoothing: float,
    z_loss: float,
    normuon: str,
    fused: bool,
) -> None:
    """A whole training step: tokens per second, and the shares of head, trunk and optimiser."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    emit(**timing.environment(threads))
    for batch in batches:
        for share in positions:
            emit(
                batch=batch,
                positions=share,
                head=head if head == "dense" else f"adaptive-div{div_value:g}",
                **measure_step(
                    batch,
                    positions=share,
                    adaptive_div=div_value if head == "adaptive" else None,
                    repeats=repeats,
                    seed=seed,
                    data=data,
                    normuon=normuon,
                    fused=fused,
                    **({} if head == "adaptive" else {"label_smoothing": label_smoothing, "z_loss": z_loss}),
                ),
            )


def measure_step(
    batch: str,
    *,
    positions: float = 1.0,
    adaptive_div: float | None = None,
    repeats: int = 5,
    seed: int = 0,
    data: Path | None = None,
    normuon: str = "v3",
    fused: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Time whole training steps of one batch shape: {"tokens_per_s": {median, p20, p80}, "shares": {...}}."""
    (phase,) = Phase.parse(batch)
    config = ModelConfig()
    n = phase.rows * phase.length
    ids, counts = ids_and_counts(data, n * phase.micro_batches + 1, config.vocab_size, seed)
    ranks = frequency_ranks(counts) if adaptive_div else None
    model = PeerModel(config, ranks=ranks, div_value=adaptive_div or 4.0)
    optimizers = Optimizers(model, normuon=normuon, fused=fused)
    flat = torch.from_numpy(ids)
    pairs = [
        (
            flat[i * n : (i + 1) * n].view(phase.rows, -1),
            flat[i * n + 1 : (i + 1) * n + 1].view(phase.rows, -1),
        )
        for i in range(phase.micro_batches)
    ]
    clock: dict[str, float] = {}
    spent = []
    for turn in range(repeats + 2):  # one after another, as in training, and as ours are timed
        if turn == 2:
            clock.clear()  # of the warm-up
        start = time.perf_counter()
        training_step(model, optimizers, pairs, positions=positions, clock=clock, **options)
        spent.append(time.perf_counter() - start)
    seconds = timing.summary(spent[2:])
    whole = sum(clock.values())
    return {
        "tokens_per_s": timing.rate(seconds, n * phase.micro_batches),
        "shares": {part: round(clock[part] / whole, 4) for part in ("trunk", "head", "optimizer")},
    }


@main.command("train")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--head", type=click.Choice(["dense", "adaptive"]), default="dense", show_default=True)
@click.option("--div-value", default=4.0, show_default=True, help="Of the adaptive head; 4 is torch's default.")
@click.option("--batch", default=V3_PHASES, show_default=True, help="[LAST_STEP:]ROWSxLENGTH[xMICRO],... ; v3's phases")
@click.option("--steps", type=int, help="Steps to train; default: to the end of the last phase.")
@click.option("--minutes", type=float, help="Stop after this much training time, the start of E aside.")
@click.option("--start", default="random", show_default=True, help="Of E: random, corpus, or a .npy of (V, C).")
@click.option("--start-std", default=0.02, show_default=True, help="Of a random start.")
@click.option("--frozen-steps", default=0, show_default=True, help="E is held fixed for this many steps.")
@click.option("--positions", default=0.25, show_default=True, help="Share of positions with a loss (adaptive: 1).")
@click.option("--label-smoothing", default=0.1, show_default=True)
@click.option("--z-loss", default=1e-4, show_default=True)
@click.option("--soft-cap", type=float)
@click.option("--log-prior", is_flag=True, help="Add the log frequency of the tokens to the logits.")
@click.option("--normuon", type=click.Choice(["v3", "published"]), default="v3", show_default=True)
@click.option("--normuon-lr", default=0.02, show_default=True)
@click.option("--mixer-scale", default=1.0, show_default=True, help="Factor of the mixer's output; v3 has none.")
@click.option("--glu-scale", default=1.0, show_default=True, help="Factor of the GLU's output; v3 has none.")
@click.option("--dilations", default="1,4,64", show_default=True, help="Of the mixer's convolutions.")
@click.option("--average-decay", default=0.0, show_default=True, help="Of the running average; 0, as in v3: none.")
@click.option("--induction-orders", default="", help="Orders of followers, such as 1,2,3; v3 has none.")
@click.option("--induction-reach", default=1024, show_default=True, help="Tokens that followers are looked for in.")
@click.option("--ternary-threshold", default=1.0, show_default=True, help="Times the mean magnitude of a matrix.")
@click.option("--adamw-lr", default=3e-4, show_default=True)
@click.option("--trunk-lr-factor", default=1.0, show_default=True, help="Times AdamW's: of convolutions and norms.")
@click.option("--adamw-beta1", default=0.9, show_default=True)
@click.option("--adamw-beta2", default=0.95, show_default=True)
@click.option("--weight-decay", default=0.1, show_default=True)
@click.option("--fused", is_flag=True, help="torch's fused AdamW.")
@click.option("--clip", default=1.0, show_default=True, help="Largest gradient norm.")
@click.option("--warmup", default=200, show_default=True, help="Steps.")
@click.option("--decay", default=1000, show_default=True, help="Last steps, over which the rates fall to 0.")
@click.option("--total", type=int, help="Steps that the decay is laid out for; default: the phases' end, or --steps.")
@click.option("--validate-every", default=60.0, show_default=True, help="Seconds of training between validations.")
@click.option("--validate-tokens", default=32_768, show_default=True, help="First tokens used for that; the end: all.")
@click.option("--mark", "marks", multiple=True, type=float, help="Minutes of training to score all validation text at.")
@click.option("--no-final", is_flag=True, help="Leave out the validation on all documents at the end.")
@click.option("--seed", default=42, show_default=True)
@click.option("--threads", default=timing.available_cores(), show_default=True)
def train_command(data: Path, **settings: Any) -> None:
    """Train on prepared tokens; validates outside the clock by the rule of `flashlm-numba eval`."""
    train(data, **settings)


def train(
    data: Path,
    *,
    head: str,
    div_value: float,
    batch: str,
    steps: int | None,
    minutes: float | None,
    start: str,
    start_std: float,
    frozen_steps: int,
    positions: float,
    label_smoothing: float,
    z_loss: float,
    soft_cap: float | None,
    log_prior: bool,
    normuon: str,
    normuon_lr: float,
    mixer_scale: float,
    glu_scale: float,
    dilations: str,
    average_decay: float,
    induction_orders: str,
    induction_reach: int,
    ternary_threshold: float,
    adamw_lr: float,
    trunk_lr_factor: float,
    adamw_beta1: float,
    adamw_beta2: float,
    weight_decay: float,
    fused: bool,
    clip: float,
    warmup: int,
    decay: int,
    total: int | None,
    validate_every: float,
    validate_tokens: int,
    marks: tuple[float, ...],
    no_final: bool,
    seed: int,
    threads: int,
) -> dict[str, Any]:
    """The body of `train`; prints a JSON line at each validation and returns the last."""
    from flashlm_numba.data import open_tokens, sample_batch

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = open_tokens(data)
    phases = Phase.parse(batch)
    end = steps if steps is not None else phases[-1].last_step
    if end is None and minutes is None:
        raise click.UsageError("give --steps or --minutes: the last phase has no end")
    config = ModelConfig(
        dilations=tuple(int(dilation) for dilation in dilations.strip("[]").split(",")),
        mixer_scale=mixer_scale,
        glu_scale=glu_scale,
        average_decay=average_decay,
        induction_orders=tuple(int(order) for order in induction_orders.strip("[]").split(",") if order),
        induction_reach=induction_reach,
        ternary_threshold=ternary_threshold,
    )
    counts = tokens.train.counts(config.vocab_size)
    adaptive = head == "adaptive"
    model = PeerModel(
        config,
        ranks=frequency_ranks(counts) if adaptive else None,
        div_value=div_value,
        embedding_std=start_std,
    )
    seconds = 0.0  # of training: the start of E out of the corpus, and steps
    if start != "random":
        if start == "corpus":
            from flashlm_numba.embeddings import cached_start

            rows, seconds = cached_start(tokens, config.dim, vocab_size=config.vocab_size)
        else:
            rows = np.load(start)
        with torch.no_grad():
            model.embedding.weight.copy_(torch.from_numpy(rows))
    prior = None
    if log_prior and not adaptive:
        prior = torch.from_numpy(np.log((counts + 1) / (counts + 1).sum()).astype(np.float32))
    scoring: dict[str, Any] = {"log_prior": prior, "soft_cap": soft_cap}
    options: dict[str, Any] = {} if adaptive else {"label_smoothing": label_smoothing, "z_loss": z_loss, **scoring}
    optimizers = Optimizers(
        model,
        normuon=normuon,
        normuon_lr=normuon_lr,
        adamw_lr=adamw_lr,
        trunk_factor=trunk_lr_factor,
        betas=(adamw_beta1, adamw_beta2),
        weight_decay=weight_decay,
        clip=clip,
        fused=fused,
    )
    emit(**timing.environment(threads))
    emit(
        data=str(data),
        head=head if not adaptive else f"adaptive-div{div_value:g}",
        parameters=sum(p.numel() for p in model.parameters()),
        groups={name: len(members) for name, members in parameter_groups(model).items()},
    )
    followers(np.zeros((1, 1), np.int32), 1, 1)  # compiled outside the clock
    seen, step, due, start_seconds = 0, 0, seconds, seconds
    left = sorted(marks)
    clock: dict[str, float] = {}
    result: dict[str, Any] = {}
    loss = math.nan
    while True:
        done = (end is not None and step >= end) or (minutes is not None and seconds - start_seconds >= 60 * minutes)
        marked = bool(left) and seconds >= 60 * left[0] and not done
        if seconds >= due or done or marked:
            whole = marked or (done and not no_final)
            limit = None if whole else validate_tokens
            validation = score(model, tokens.validation, max_tokens=limit, **scoring)
            result = {
                **({"mark": left.pop(0)} if marked else {}),
                "step": step,
                "tokens": seen,
                "seconds": seconds,
                "loss": None if math.isnan(loss) else loss,
                "validation": "all" if whole else f"first {validation['tokens']} tokens",
                **{f"val_{name}": value for name, value in validation.items()},
                "start_seconds": start_seconds,
                "tokens_per_s": seen / (seconds - start_seconds) if seen else None,
                "shares": {part: round(t / (seconds - start_seconds), 4) for part, t in clock.items()},
                "peak_rss_mb": peak_rss_mb(),
            }
            emit(**result)
            due = seconds + validate_every
        if done:
            return result
        begin = time.perf_counter()
        phase = next((p for p in phases if p.last_step is None or step < p.last_step), phases[-1])
        model.embedding.weight.requires_grad_(step >= frozen_steps)
        batches = []
        for micro in range(phase.micro_batches):
            ids, targets = sample_batch(tokens.train, seed, step, micro, phase.rows, phase.length)
            batches.append((torch.from_numpy(ids).long(), torch.from_numpy(targets).long()))
        loss = training_step(
            model,
            optimizers,
            batches,
            positions=1.0 if adaptive else positions,
            scale=schedule(step, warmup=warmup, total=total or phases[-1].last_step or steps, decay=decay),
            generator=generator,
            clock=clock,
            **options,
        )
        seconds += time.perf_counter() - begin
        seen += phase.rows * phase.length * phase.micro_batches
        step += 1


if __name__ == "__main__":
    main()
