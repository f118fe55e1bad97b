"""The MatMul-free LM (Zhu et al. 2024, arXiv:2406.02528) as a plain NumPy twin, in any floating dtype.

Where the paper and the authors' published code differ, the code holds (github.com/ridgerchu/matmulfreellm):

    bitlinear(x, W, n)   q(rmsnorm(x, n)) @ ternary(W).T. Every such layer has a norm of its own, whose epsilon is 1e-6
                         (the modules say 1e-8, but the fused layer, which all models use, passes on its default)
    q(y)                 round(y * s) / s, s = 127 / max(max|y|, 1e-5), per row
    ternary(W)           round(W / m) clamped to -1..1, times m = max(mean|W|, 1e-5), one m per matrix
    block                x += mixer(rmsnorm(x)),  x += glu(rmsnorm(x))
    mixer(y)             f = sigmoid(bitlinear(y, forget)), from the second block on f = b + (1 - b) f;
                         h[t] = f[t] h[t - 1] + silu(bitlinear(y, input)) (1 - f)
                         out = bitlinear(rmsnorm(bitlinear(y, gate), hidden_norm) * silu(h), out): it is the gate that
                         is normed, where the paper norms h
    b                    cumulative sums over the blocks of softmax(lower_bounds), minus the first block's
    glu(y)               gate, up = halves of bitlinear(y, gate_up), which has one m; bitlinear(silu(gate) * up, down)
    logits               bitlinear(rmsnorm(x), head)

The heads of the authors' recurrence only divide the channels, each of which is on its own, so they change nothing.
Letters: B batch, T time, C channels, H channels of the mixer, I width of the GLU, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

BITLINEAR_EPS = 1e-6
LEAST = 1e-5  # of a row's largest magnitude, and of a matrix's mean magnitude


def sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def silu(x):
    return x * sigmoid(x)


def rmsnorm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + x.dtype.type(eps)) * weight


def ternary(weight):
    """The codes -1, 0, +1 and the scale of a matrix. numpy rounds halves to even, as torch does."""
    scale = max(np.abs(weight).mean(dtype=np.float64), LEAST)
    return np.rint(weight / weight.dtype.type(scale)).clip(-1, 1), weight.dtype.type(scale)


def distance_to_half(values):
    """The least distance of a value from a number between two whole ones, where its rounding is undecided."""
    return float(np.abs(np.abs(values - np.floor(values)) - 0.5).min(initial=0.5))


@dataclass
class Twin:
    """The model with parameters by this project's names.

    eps : of the norms of the blocks, of the gate and of the end
    rounded : round the inputs of the layers;  ternary : round the weights. Without both, the model is smooth.
    closest : the least distance of an input to a half, where a last bit could change how it is rounded
    """

    parameters: dict[str, np.ndarray]
    eps: float = 1e-6
    rounded: bool = True
    ternary: bool = True
    use_lower_bounds: bool = True
    closest: float = field(default=0.5, init=False)

    @property
    def n_blocks(self) -> int:
        return 1 + max(int(name.split(".")[1]) for name in self.parameters if name.startswith("blocks."))

    def bitlinear(self, x, name):
        """x (..., K) through the layer whose parameters are name.weight and name.norm.weight."""
        p = self.parameters
        y, weight = rmsnorm(x, p[f"{name}.norm.weight"], BITLINEAR_EPS), p[f"{name}.weight"]
        if self.rounded:
            scale = y.dtype.type(127) / np.maximum(np.abs(y).max(-1, keepdims=True), y.dtype.type(LEAST))
            self.closest = min(self.closest, distance_to_half(y * scale))
            y = np.rint(y * scale).clip(-128, 127) / scale
        if self.ternary:
            codes, size = ternary(weight)
            weight = codes * size
        return y @ weight.T

    def lower_bounds(self):
        """(L, H): the least forget gate of every block."""
        bounds = self.parameters["lower_bounds"]
        shares = np.exp(bounds - bounds.max(0))
        shares /= shares.sum(0)
        return shares.cumsum(0) - shares[0]

    def mixer(self, y, block):
        name = f"blocks.{block}.mixer"
        f = sigmoid(self.bitlinear(y, f"{name}.forget"))
        if self.use_lower_bounds and block > 0:
            bound = self.lower_bounds()[block]
            f = bound + (1 - bound) * f
        i = silu(self.bitlinear(y, f"{name}.input")) * (1 - f)
        h, state = np.empty_like(i), np.zeros_like(i[:, 0])
        for t in range(i.shape[1]):
            state = h[:, t] = f[:, t] * state + i[:, t]
        gate = rmsnorm(self.bitlinear(y, f"{name}.gate"), self.parameters[f"{name}.hidden_norm.weight"], self.eps)
        return self.bitlinear(gate * silu(h), f"{name}.out")

    def glu(self, y, block):
        gate, up = np.split(self.bitlinear(y, f"blocks.{block}.glu.gate_up"), 2, axis=-1)
        return self.bitlinear(silu(gate) * up, f"blocks.{block}.glu.down")

    def hidden(self, ids):
        """The hidden states (B, T, C) that the head reads, for ids (B, T)."""
        p = self.parameters
        x = p["embedding.weight"][ids]
        for block in range(self.n_blocks):
            x = x + self.mixer(rmsnorm(x, p[f"blocks.{block}.norm1.weight"], self.eps), block)
            x = x + self.glu(rmsnorm(x, p[f"blocks.{block}.norm2.weight"], self.eps), block)
        return rmsnorm(x, p["final_norm.weight"], self.eps)

    def logits(self, ids):
        """(B, T, V) for ids (B, T)."""
        return self.bitlinear(self.hidden(ids), "head")

    def nll(self, ids, targets):
        """Mean of -ln p(target) over all positions."""
        logits = self.logits(ids)
        top = logits.max(-1, keepdims=True)
        lse = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
        return (lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).mean()


def parameter_shapes(vocab: int, dim: int, width: int, ffn_dim: int, n_blocks: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes, for C = dim, H = width, I = ffn_dim."""

    def layer(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (rows, columns), f"{name}.norm.weight": (columns,)}

    found: dict[str, tuple[int, ...]] = {"embedding.weight": (vocab, dim)}
    for block in range(n_blocks):
        at = f"blocks.{block}"
        found |= {f"{at}.norm1.weight": (dim,)}
        for name in ("input", "forget", "gate"):
            found |= layer(f"{at}.mixer.{name}", width, dim)
        found |= {f"{at}.mixer.hidden_norm.weight": (width,)} | layer(f"{at}.mixer.out", dim, width)
        found |= {f"{at}.norm2.weight": (dim,)} | layer(f"{at}.glu.gate_up", 2 * ffn_dim, dim)
        found |= layer(f"{at}.glu.down", dim, ffn_dim)
    return found | {"lower_bounds": (n_blocks, width), "final_norm.weight": (dim,)} | layer("head", vocab, dim)


def random_parameters(seed: int, vocab: int, dim: int, width: int, ffn_dim: int, n_blocks: int) -> dict:
    """Random float32 parameters without a weight near a half, where its rounding would be undecided."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in parameter_shapes(vocab, dim, width, ffn_dim, n_blocks).items():
        value = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            value = 1 + np.float32(0.2) * value
        elif name not in ("embedding.weight", "lower_bounds"):
            value *= np.float32(shape[1] ** -0.5)
            size = np.abs(value).mean() / 2
            value[np.abs(np.abs(value) - size) < 0.05 * size] *= np.float32(0.8)
        found[name] = value
    return found


def authors_names(n_blocks: int) -> Iterator[tuple[str, str]]:
    """This project's name and the authors' name of every parameter, in pairs."""
    yield "embedding.weight", "model.embeddings.weight"
    yield "lower_bounds", "model.lower_bounds"
    for block in range(n_blocks):
        here, there = f"blocks.{block}", f"model.layers.{block}"
        yield f"{here}.norm1.weight", f"{there}.attn_norm.weight"
        yield f"{here}.norm2.weight", f"{there}.mlp_norm.weight"
        yield f"{here}.mixer.hidden_norm.weight", f"{there}.attn.g_norm.weight"
        layers = {
            "mixer.input": "attn.i_proj",
            "mixer.forget": "attn.f_proj",
            "mixer.gate": "attn.g_proj",
            "mixer.out": "attn.o_proj",
            "glu.gate_up": "mlp.gate_proj",
            "glu.down": "mlp.down_proj",
        }
        for own, other in layers.items():
            yield f"{here}.{own}.weight", f"{there}.{other}.weight"
            yield f"{here}.{own}.norm.weight", f"{there}.{other}.norm.weight"
    yield "final_norm.weight", "model.norm.weight"
    yield "head.weight", "lm_head.weight"
    yield "head.norm.weight", "lm_head.norm.weight"
