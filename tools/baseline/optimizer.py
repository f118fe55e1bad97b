"""NorMuon, AdamW and the learning rate schedule in PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic x -> a x + b x^3 + c x^5, Jordan et al. 2024 (Muon)


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


def parameter_groups(model: nn.Module, matrices: str = "normuon") -> dict[str, list[str]]:
    """Names by group: "normuon" (matrices of the block), "decay" (other tensors), "no_decay" (vectors).

    matrices : "normuon", or "adamw" for a block whose matrices are in "decay" too
    """
    groups: dict[str, list[str]] = {"normuon": [], "decay": [], "no_decay": []}
    for name, p in model.named_parameters():
        if p.ndim < 2:
            groups["no_decay"].append(name)
        elif matrices == "normuon" and p.ndim == 2 and not name.startswith(("embedding.", "adaptive.", "head.")):
            groups["normuon"].append(name)
        else:
            groups["decay"].append(name)
    return groups


class Optimizers:
    """NorMuon for the block's matrices and torch's AdamW for the rest, with one global gradient norm for clipping.

    matrices : as in parameter_groups; with "adamw" there is no NorMuon
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        matrices: str = "normuon",
        normuon: str = "v3",
        normuon_lr: float = 0.02,
        adamw_lr: float = 3e-4,
        nonembedding_lr_scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        clip: float | None = 1.0,
        fused: bool = False,
    ) -> None:
        named = dict(model.named_parameters())
        names = parameter_groups(model, matrices)
        self.parameters = list(named.values())
        self.clip = clip
        tables = [n for n in names["decay"] if named[n].ndim == 2]
        trunk = [n for n in names["decay"] if n not in tables]
        adamw = torch.optim.AdamW(
            [
                {"params": [named[n] for n in tables], "weight_decay": weight_decay, "lr": adamw_lr},
                {"params": [named[n] for n in trunk], "weight_decay": weight_decay},
                {"params": [named[n] for n in names["no_decay"]], "weight_decay": 0.0},
            ],
            lr=adamw_lr * nonembedding_lr_scale,
            betas=betas,
            fused=fused,
        )
        self.optimizers: list[torch.optim.Optimizer] = [adamw]
        if names["normuon"]:
            normuon_matrices = [named[n] for n in names["normuon"]]
            self.optimizers.insert(0, NorMuon(normuon_matrices, lr=normuon_lr, variant=normuon))
        self._rates = [(g, g["lr"]) for o in self.optimizers for g in o.param_groups]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self.parameters:
            p.grad = None

    def step(self, scale: float = 1.0) -> float:
        """Clip, then step with `scale` times the learning rates. Returns the gradient norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, math.inf if self.clip is None else self.clip)
        for group, rate in self._rates:
            group["lr"] = rate * scale
        for optimizer in self.optimizers:
            optimizer.step()
        return float(norm)


def schedule(step: int, *, warmup: int, total: int | None = None, decay: int = 0) -> float:
    """Factor on the learning rate at `step` (from 0): linear warm-up, constant, linear decay at the end."""
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if decay and total is not None and step >= total - decay:
        factor *= max(0.0, (total - step) / decay)
    return factor
