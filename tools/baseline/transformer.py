"""A decoder-only transformer in PyTorch, as is usual today: the yardstick of another architecture.

B batch, T time, C channels, H attention heads, D = C / H channels per head, V vocabulary.
Sources: Vaswani et al. 2017, arXiv:1706.03762; rotary positions, Su et al. 2021, arXiv:2104.09864; SwiGLU, Shazeer
2020, arXiv:2002.05202.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashlm_numba.system.errors import UserError
from tools.baseline.heads import dense_loss

STD = 0.02  # of the initial matrices
ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a transformer. Raises UserError if it cannot be built.

    context : most tokens that it reads at once
    """

    vocab_size: int
    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 256

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "context"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"The transformer's {name} must be at least 1, got {value}.")
        if self.width % (2 * self.heads):
            raise UserError(
                f"The transformer's width must be a multiple of twice its heads, got {self.width} and "
                f"{self.heads} heads."
            )

    @property
    def ffn_dim(self) -> int:
        """8/3 of the width, rounded up to a multiple of 32: as many weights as two matrices of four times the width."""
        return -(-8 * self.width // (3 * 32)) * 32


def rotary_angles(length: int, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, dim / 2) of position times ROTARY_BASE ** (-2 i / dim)."""
    rates = ROTARY_BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D) with channel i and channel i + D/2 turned as a pair; cos, sin (T, D/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, T, C)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.width, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """x + attention(norm1(x)), then x + ffn(norm2(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.width)
        self.ffn = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, T, C)
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.ffn(self.norm2(x))


class Transformer(nn.Module):
    """Embedding, layers, a norm, and a dense head tied to the embedding; all in float32.

    It has what training_step and score need of a BaselineModel.
    """

    adaptive = None  # the head is dense

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = nn.RMSNorm(config.width)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # the outputs of 2 * layers branches add up, as in GPT-2
                branch = name.endswith(("attention.out.weight", "ffn.down.weight"))
                nn.init.normal_(p, std=STD / (2 * config.layers) ** 0.5 if branch else STD)
        cos, sin = rotary_angles(config.context, config.width // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def scoring_window(self, length: int) -> tuple[int, int]:
        """Tokens of context in a window of a long document, and tokens in the window: half the context, and all of it.

        length : what a model without a limit would read;  unused
        """
        return self.config.context // 2, self.config.context

    def hidden(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> hidden states (B*T, C). Raises ValueError if T is more than the context."""
        if ids.shape[1] > self.config.context:
            raise ValueError(f"Transformer.hidden: at most {self.config.context} tokens, got {ids.shape[1]}")
        cos, sin = (self.get_buffer(name)[: ids.shape[1]] for name in ("cos", "sin"))
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.final_norm(x).flatten(0, 1)

    def losses(
        self, h: Tensor, targets: Tensor, *, want_nll: bool = True, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """loss (N,) and nll (N,) of targets (N,) at h (N, C); `options` are those of dense_loss."""
        return dense_loss(h, self.embedding.weight, targets, want_nll=want_nll, **options)
