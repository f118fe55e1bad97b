"""FlashLM v3 in PyTorch: the oracle of the tests and the peer of the benchmarks. The program never uses it.

    python tools/peer_torch.py head                      linear + cross-entropy, and the adaptive head
    python tools/peer_torch.py trunk                     hidden states, forward and backward
    python tools/peer_torch.py step                      a whole training step, and the share of each part
    python tools/peer_torch.py train DATA --minutes 10   training on prepared shards (`flashlm-numba prepare`)

Needs the extra `peer` (pip install -e '.[peer]'). Every result is one JSON object on a line. B batch, T time,
N = B*T positions, C channels, V vocabulary, I width of the GLU, K taps.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.config import ModelConfig

NORM_EPS = 1e-8
ADAPTIVE_CUTOFFS = (1_024, 4_096, 16_384)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic x -> a x + b x^3 + c x^5, Jordan et al. 2024 (Muon)
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
    """x @ ternary(weight).T without scale; the gradient goes straight through to weight (n_out, n_in)."""

    def __init__(self, n_in: int, n_out: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in).normal_(std=std))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            threshold = torch.mean(self.weight.abs(), dtype=torch.float64).to(self.weight.dtype)
            ternary = (self.weight > threshold).to(x.dtype) - (self.weight < -threshold).to(x.dtype)
            to_ternary = ternary - self.weight
        return F.linear(x, self.weight + to_ternary)


class Mixer(nn.Module):
    """Gated causal dilated grouped convolutions, each with a residual, then a ternary projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, per_group = config.dim, config.dim // config.groups

        def convolution(dilation: int) -> nn.Conv1d:
            layer = nn.Conv1d(
                dim, dim, config.taps, dilation=dilation, groups=config.groups, bias=False
            )  # weight (C, C/groups, K)
            nn.init.normal_(layer.weight, std=(per_group * config.taps) ** -0.5)
            return layer

        self.norms = nn.ModuleList(RMSNorm(dim) for _ in config.dilations)
        self.gates = nn.ModuleList(convolution(d) for d in config.dilations)
        self.values = nn.ModuleList(convolution(d) for d in config.dilations)
        self.out = TernaryLinear(dim, dim, std=0.01)
        self.left_padding = [(config.taps - 1) * d for d in config.dilations]

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        for norm, gate, value, padding in zip(
            self.norms, self.gates, self.values, self.left_padding, strict=True
        ):
            n = F.pad(norm(x).mT, (padding, 0))  # (B, C, padding + T)
            x = x + (gate(n).sigmoid() * value(n)).mT
        return self.out(x)


class GLU(nn.Module):
    """down(relu(gate(x))**2 * up(x)), all three ternary."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate = TernaryLinear(dim, inner, std=dim**-0.5)
        self.up = TernaryLinear(dim, inner, std=dim**-0.5)
        self.down = TernaryLinear(inner, dim, std=0.01)

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
        self.glu = GLU(config.dim, config.inner)
        self.router = nn.Linear(config.dim, 1)
        self.final_norm = RMSNorm(config.dim)
        self.adaptive: nn.AdaptiveLogSoftmaxWithLoss | None = None
        if ranks is not None:
            self.register_buffer("ranks", torch.as_tensor(ranks, dtype=torch.int64), persistent=False)
            self.adaptive = adaptive_head(config.dim, config.vocab_size, div_value)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> hidden states (B*T, C)."""
        x = self.embedding(ids)  # (B, T, C)
        for _ in range(self.config.recursions):
            x = x + self.mixer(self.norm1(x))
            x = x + self.glu(self.norm2(x))
        return self.final_norm(x).flatten(0, 1)

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
            nll = (
                F.cross_entropy(logits, targets, reduction="none")
                if label_smoothing
                else loss.detach().clone()
            )
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


def head_candidates(
    h: np.ndarray, weight: np.ndarray, targets: np.ndarray, ranks: np.ndarray, *, compiled: bool = False
) -> dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]]:
    """Benchmarks of a head: name -> call that does forward and backward of the mean loss.

    h (N, C), weight (V, C), targets (N,), ranks (V,). Each call returns the loss and the gradients of h and
    of the weights (for the adaptive heads, of the root's rows).
    """
    x = torch.tensor(h, requires_grad=True)
    w = torch.tensor(weight, requires_grad=True)
    y = torch.as_tensor(targets, dtype=torch.int64)
    ranked = torch.as_tensor(ranks, dtype=torch.int64)[y]

    def linear_cross_entropy(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), y)

    def dense(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor, Tensor]:
            loss = loss_of(x, w)
            dx, dw = torch.autograd.grad(loss, [x, w])
            return loss.detach(), dx, dw

        return run

    def adaptive(div_value: float) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        head = adaptive_head(weight.shape[1], weight.shape[0], div_value)
        parameters = list(head.parameters())

        def run() -> tuple[Tensor, Tensor, Tensor]:
            loss = head(x, ranked).loss
            dx, droot, *_ = torch.autograd.grad(loss, [x, *parameters], materialize_grads=True)
            return loss.detach(), dx, droot

        return run

    candidates = {"torch:eager": dense(linear_cross_entropy)}
    if compiled:
        candidates["torch:compile"] = dense(torch.compile(linear_cross_entropy))
    candidates["torch:adaptive"] = adaptive(1.0)
    candidates["torch:adaptive-div4"] = adaptive(4.0)
    return candidates


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
        self.adamw = torch.optim.AdamW(
            [
                {"params": [named[n] for n in names["decay"]], "weight_decay": weight_decay},
                {"params": [named[n] for n in names["no_decay"]], "weight_decay": 0.0},
            ],
            lr=adamw_lr,
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
