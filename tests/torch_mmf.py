"""The MatMul-free LM as a torch module with the tensor names of the published models: an oracle of the tests.

mmf_twin.py has the formulas and says where they come from. Gradients pass straight through both roundings, as in the
authors' BitLinear.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6


class RMSNorm(nn.Module):
    """x / sqrt(mean(x**2) + eps) * weight over the last axis."""

    def __init__(self, dim: int, eps: float = EPS) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


def rounded_inputs(x: Tensor) -> Tensor:
    """Rows rounded to 127 steps of their largest magnitude; the gradient passes unchanged."""
    with torch.no_grad():
        steps = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        difference = (x * steps).round().clamp(-128, 127) / steps - x
    return x + difference


def ternary_weight(weight: Tensor) -> Tensor:
    """-1, 0 or +1 times the mean magnitude; the gradient passes unchanged."""
    with torch.no_grad():
        size = weight.double().abs().mean().clamp(min=1e-5).to(weight.dtype)
        difference = (weight / size).round().clamp(-1, 1) * size - weight
    return weight + difference


class BitLinear(nn.Module):
    """A norm, rounded inputs, ternary weights; both roundings can be turned off."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.zeros(n_out, n_in)), RMSNorm(n_in)
        self.rounded = self.ternary = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y = rounded_inputs(y) if self.rounded else y
        return F.linear(y, ternary_weight(self.weight) if self.ternary else self.weight)


class Attention(nn.Module):
    """The mixer: a gated linear recurrence per channel."""

    def __init__(self, dim: int, width: int, eps: float) -> None:
        super().__init__()
        self.i_proj, self.f_proj, self.g_proj = (BitLinear(dim, width) for _ in range(3))
        self.g_norm, self.o_proj = RMSNorm(width, eps), BitLinear(width, dim)

    def forward(self, y: Tensor, bound: Tensor | None) -> Tensor:
        f = torch.sigmoid(self.f_proj(y))
        if bound is not None:
            f = torch.lerp(f, torch.ones_like(f), bound.expand_as(f))
        i = F.silu(self.i_proj(y)) * (1 - f)
        states = [i[:, 0]]
        for t in range(1, i.shape[1]):
            states.append(f[:, t] * states[-1] + i[:, t])
        return self.o_proj(self.g_norm(self.g_proj(y)) * F.silu(torch.stack(states, 1)))


class MLP(nn.Module):
    """The GLU, whose gate and up rows are one matrix."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj, self.down_proj = BitLinear(dim, 2 * ffn_dim), BitLinear(ffn_dim, dim)

    def forward(self, y: Tensor) -> Tensor:
        gate, up = self.gate_proj(y).tensor_split(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, dim: int, width: int, ffn_dim: int, eps: float) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNorm(dim, eps), RMSNorm(dim, eps)
        self.attn, self.mlp = Attention(dim, width, eps), MLP(dim, ffn_dim)

    def forward(self, x: Tensor, bound: Tensor | None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), bound)
        return x + self.mlp(self.mlp_norm(x))


class Trunk(nn.Module):
    def __init__(self, vocab: int, dim: int, width: int, ffn_dim: int, n_blocks: int, eps: float, bounds: bool) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(Block(dim, width, ffn_dim, eps) for _ in range(n_blocks))
        self.norm = RMSNorm(dim, eps)
        self.lower_bounds = nn.Parameter(torch.zeros(n_blocks, width)) if bounds else None

    def forward(self, ids: Tensor) -> Tensor:
        x, bounds = self.embeddings(ids), None
        if self.lower_bounds is not None:
            shares = self.lower_bounds.softmax(0)
            bounds = shares.cumsum(0) - shares[0]
        for block, layer in enumerate(self.layers):
            x = layer(x, bounds[block] if bounds is not None and block > 0 else None)
        return self.norm(x)


class MatMulFreeLM(nn.Module):
    """Logits (B, T, V) for ids (B, T). Its state_dict has the names of the published files."""

    def __init__(
        self, vocab: int, dim: int, width: int, ffn_dim: int, n_blocks: int, eps: float = EPS, bounds: bool = True
    ) -> None:
        super().__init__()
        self.model = Trunk(vocab, dim, width, ffn_dim, n_blocks, eps, bounds)
        self.lm_head = BitLinear(dim, vocab)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model(ids))

    def round(self, inputs: bool, weights: bool) -> None:
        """Turn the roundings on or off."""
        for module in self.modules():
            if isinstance(module, BitLinear):
                module.rounded, module.ternary = inputs, weights

    def load(self, tensors: dict[str, np.ndarray]) -> None:
        """Set the parameters, by the published names."""
        own = self.state_dict()
        assert own.keys() == tensors.keys(), own.keys() ^ tensors.keys()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(tensors[name])))
