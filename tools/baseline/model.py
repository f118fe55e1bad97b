"""FlashLM v3's model in PyTorch, with later additions to the trunk: oracle of the tests, baseline of the benchmarks.

B batch, T time, N = B*T positions, C channels, V vocabulary, K taps of a convolution.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashlm_numba.kernels.ngram_copy import copy_kinds, ngram_copies
from flashlm_numba.model.config import ModelConfig
from tools.baseline.heads import adaptive_head, dense_loss

NORM_EPS = 1e-8


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x**2) + 1e-8) over the last axis."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * (x.pow(2).mean(dim=-1, keepdim=True) + NORM_EPS).rsqrt())


class TernaryLinear(nn.Module):
    """x @ ternary(weight).T without scale, with a straight-through gradient for weight (n_out, n_in).

    A weight becomes +1 or -1 if its magnitude exceeds `threshold` times the mean magnitude.
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


class LeakyAverage(nn.Module):
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
    """One factor per channel, initially zero."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))


class NgramCopy(nn.Module):
    """The rows of tokens that followed the same n-gram earlier, with a gain per n-gram at the input and the output.

    An n-gram is given by its order and by the number of occurrences to skip (kernels/ngram_copy.py).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ngrams, self.reach = copy_kinds(config.ngram_copy_orders), config.ngram_copy_reach
        self.inputs = nn.ModuleList(Gain(config.dim) for _ in self.ngrams)
        self.outputs = nn.ModuleList(Gain(config.dim) for _ in self.ngrams if config.copy_adds)

    def forward(self, ids: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of ids (B, T): (B, T, C), and those of the copied tokens: (n-grams, B, T, C), zero without a copy.

        One gather reads all rows, so that the embedding gets one gradient.
        """
        tokens = np.ascontiguousarray(ids.numpy(), np.int32)
        found = np.stack([tokens, *(ngram_copies(tokens, order, self.reach, skip) for order, skip in self.ngrams)])
        rows = F.embedding(torch.from_numpy(np.maximum(found, 0)), embedding)
        return rows[0], rows[1:] * torch.from_numpy(found[1:] >= 0)[..., None]

    def add(self, x: Tensor, gains: nn.ModuleList, rows: Tensor) -> Tensor:
        """x (B, T, C) + the sum over n-grams of gain * rows."""
        for gain, row in zip(gains, rows, strict=True):
            x = torch.addcmul(x, gain.get_parameter("weight"), row)  # a third of an einsum's time
        return x


class Mixer(nn.Module):
    """Gated causal dilated grouped convolutions, each with a residual, then a ternary projection.

    A leaky average of the tokens so far comes first, if the configuration has one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, per_group = config.dim, config.dim // config.groups

        def convolution(dilation: int) -> nn.Conv1d:
            layer = nn.Conv1d(
                dim, dim, config.kernel_size, dilation=dilation, groups=config.groups, bias=False
            )  # weight (C, C/groups, K)
            nn.init.normal_(layer.weight, std=(per_group * config.kernel_size) ** -0.5)
            return layer

        self.leaky = LeakyAverage(dim, config.leaky_decay) if config.leaky_decay else nn.Identity()
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in config.dilations)
        self.gates = nn.ModuleList(convolution(d) for d in config.dilations)
        self.values = nn.ModuleList(convolution(d) for d in config.dilations)
        self.out = TernaryLinear(dim, dim, 0.01, config.ternary_threshold)
        self.left_padding = [(config.kernel_size - 1) * d for d in config.dilations]

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        x = self.leaky(x)
        for norm, gate, value, padding in zip(self.norms, self.gates, self.values, self.left_padding, strict=True):
            n = F.pad(norm(x).mT, (padding, 0))  # (B, C, padding + T)
            x = x + (gate(n).sigmoid() * value(n)).mT
        return self.out(x)


class GLU(nn.Module):
    """down(relu(gate(x))**2 * up(x)), all three ternary."""

    def __init__(self, dim: int, ffn_dim: int, threshold: float) -> None:
        super().__init__()
        self.gate = TernaryLinear(dim, ffn_dim, dim**-0.5, threshold)
        self.up = TernaryLinear(dim, ffn_dim, dim**-0.5, threshold)
        self.down = TernaryLinear(ffn_dim, dim, 0.01, threshold)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x).relu().square() * self.up(x))


class Block(nn.Module):
    """x + s_m * mixer(norm1(x)), then x + s_f * glu(norm2(x)), with fixed residual scales."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim)
        self.mixer = Mixer(config)
        self.norm2 = RMSNorm(config.dim)
        self.glu = GLU(config.dim, config.ffn_dim, config.ternary_threshold)
        self.scales = config.mixer_residual_scale, config.ffn_residual_scale

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        x = torch.add(x, self.mixer(self.norm1(x)), alpha=self.scales[0])
        return torch.add(x, self.glu(self.norm2(x)), alpha=self.scales[1])


class BaselineModel(nn.Module):
    """FlashLM v3. As arrays, its parameters have the names of flashlm_numba.model.

    With `ranks` (V,), the frequency rank of every token id from 0, the head is torch's AdaptiveLogSoftmaxWithLoss with
    untied weights (`adaptive.*`). Otherwise it is dense and tied to `embedding.weight`. The router only counts as
    parameters; the loss does not use it.
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
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.router = nn.Linear(config.dim, 1)
        self.final_norm = RMSNorm(config.dim)
        self.ngram_copy = NgramCopy(config)
        self.adaptive: nn.AdaptiveLogSoftmaxWithLoss | None = None
        if ranks is not None:
            self.register_buffer("ranks", torch.as_tensor(ranks, dtype=torch.int64), persistent=False)
            self.adaptive = adaptive_head(config.dim, config.vocab_size, div_value)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> hidden states (B*T, C)."""
        x, copied = self.ngram_copy(ids, self.embedding.weight)  # (B, T, C), (n-grams, B, T, C)
        x = self.ngram_copy.add(x, self.ngram_copy.inputs, copied)
        for _ in range(self.config.n_passes):
            for block in self.blocks:
                x = block(x)
        added = copied if self.config.copy_adds else copied[:0]
        return self.ngram_copy.add(self.final_norm(x), self.ngram_copy.outputs, added).flatten(0, 1)

    def scoring_window(self, length: int) -> tuple[int, int]:
        """Tokens of context in a window of a long document, and tokens in the window, at least `length`.

        With a context of the receptive field minus 1, no result depends on the windows.
        """
        context = self.config.receptive_field - 1
        return context, max(length, 2 * context)

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

    def compile_calls(self) -> None:
        """Compile the trunk, and a dense head. The adaptive head stays eager: its shapes depend on the targets."""
        self.hidden = torch.compile(self.hidden)  # type: ignore[method-assign]
        if self.adaptive is None:
            self.losses = torch.compile(self.losses)  # type: ignore[method-assign]

    def loss_and_grad(
        self, ids: np.ndarray, targets: np.ndarray, loss_weights: np.ndarray | None = None, **options: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Loss (N,) and nll (N,) of a batch; adds the gradients of sum(loss_weights * loss).

        ids, targets (B, T); loss_weights (N,), by default 1/N each; `options` are those of dense_loss.
        """
        h = self.hidden(torch.as_tensor(ids, dtype=torch.int64))
        y = torch.as_tensor(targets, dtype=torch.int64).flatten()
        w = torch.full((len(y),), 1 / len(y)) if loss_weights is None else torch.as_tensor(loss_weights)
        loss, nll = self.losses(h, y, **options)
        assert nll is not None
        (loss * w.to(loss.dtype)).sum().backward()
        return loss.detach().numpy(), nll.numpy()

    def our_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by their names in flashlm_numba.model."""
        return dict(self.named_parameters())

    def state_from_numpy(self, params: dict[str, np.ndarray]) -> None:
        """Copy params (name -> array, all of them and no others) into the model, in the model's dtype."""
        own = {name: name for name, _ in self.named_parameters()}
        state = {own.get(name, name): torch.from_numpy(np.array(a)) for name, a in params.items()}
        self.load_state_dict(state, strict=True)

    def params_to_numpy(self) -> dict[str, np.ndarray]:
        """Copies of all parameters by name."""
        return {name: p.detach().numpy().copy() for name, p in self.our_parameters().items()}

    def grads_to_numpy(self) -> dict[str, np.ndarray]:
        """Copies of all gradients by name; zeros where there is none (router, frozen embedding)."""
        return {
            name: np.zeros_like(p.detach().numpy()) if p.grad is None else p.grad.numpy().copy()
            for name, p in self.our_parameters().items()
        }
