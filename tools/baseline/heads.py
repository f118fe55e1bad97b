"""Output heads in PyTorch: the dense head and adaptive softmax, as losses of a model and as calls to time.

N positions, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ADAPTIVE_CUTOFFS = (1_024, 4_096, 16_384)


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
