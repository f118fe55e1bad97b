"""TRUNKS: the trunks that a model can have, by the name that the setting `linear` takes.

A trunk turns rows of the embedding into hidden states. This file joins the kernels, which know arrays, to the model,
which knows parameters by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from flashlm_numba.kernels import bit_decode, decode
from flashlm_numba.kernels._text import TextState
from flashlm_numba.kernels.bit_trunk import (
    BitBuffers,
    BitConfig,
    BitTrunkWeights,
    bit_trunk_backward,
    bit_trunk_forward,
    lower_bounds,
    lower_bounds_backward,
)
from flashlm_numba.kernels.ternary import ternarize
from flashlm_numba.kernels.trunk import TrunkBuffers, TrunkConfig, TrunkWeights, trunk_backward, trunk_forward
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.mixers import BIT_LAYERS, MIXERS
from flashlm_numba.model.parameters import ENDS
from flashlm_numba.system.arrays import for_reading

Named = dict[str, np.ndarray]  # parameters or gradients by name


class Trunk(Protocol):
    """The interface of a trunk for the model. Buffers are those of new_buffers, embedding (V, C), rows (N,) int32."""

    weights: Any  # in the kernels' layouts

    def use_int8(self, int8: bool) -> None:
        """Choose the arithmetic of the ternary products; call set_weights afterwards."""
        ...

    def set_weights(self, parameters: Named) -> None:
        """Take over the parameters, after every change."""
        ...

    def new_buffers(self, batch: int, time: int) -> Any:
        """Buffers for batches of this shape."""
        ...

    def forward(self, buffers: Any, embedding: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Hidden states (N, C), a view of the buffers."""
        ...

    def backward(self, buffers: Any, dout: np.ndarray, embedding: np.ndarray) -> Named:
        """Gradients by name for dout (N, C), without the embedding's, of which buffers.gradients.dx is a part."""
        ...

    def new_state(self) -> Any:
        """The decoding state before the first token of a text."""
        ...

    def step(self, state: Any, embedding: np.ndarray, row: int) -> np.ndarray:
        """Feed one token. Returns its hidden state (1, C), a view that the next call overwrites."""
        ...

    def prefill(self, buffers: Any, embedding: np.ndarray, rows: np.ndarray) -> tuple[Any, np.ndarray]:
        """The state after a text and its hidden states (T, C), a view of the buffers, made for this batch of one.

        Only of trunks with a finite receptive field.
        """
        ...

    def read(self, state: Any, buffers: Any, embedding: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Feed the next tokens of a text. Returns their hidden states (T, C), a view of the buffers.

        Only of trunks without a finite receptive field.
        """
        ...


def _blocks(config: ModelConfig, parameters: Named) -> Iterator[tuple[int, Named]]:
    """Number and parameters of every block, by name within the block."""
    for block in range(config.n_blocks):
        prefix = f"blocks.{block}."
        yield block, {n.removeprefix(prefix): value for n, value in parameters.items() if n.startswith(prefix)}


def _set_gains(weights: Any, parameters: Named) -> None:
    for end, gains in zip(ENDS, (weights.gain_in, weights.gain_out), strict=True):
        for o in range(len(gains)):
            gains[o] = parameters[f"ngram_copy.{end}.{o}.weight"]


def _gains(inputs: np.ndarray, outputs: np.ndarray) -> Named:
    """The gradients of the n-gram copies by name."""
    named: Named = {}
    for end, gains in zip(ENDS, (inputs, outputs), strict=True):
        named |= {f"ngram_copy.{end}.{o}.weight": gain for o, gain in enumerate(gains)}
    return named


class TernaryTrunk:
    """A mixer of MIXERS and a GLU with squared ReLU, whose matrices are -1, 0 and +1 without a scale."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        trunk = TrunkConfig(
            config.dim,
            config.ffn_dim,
            config.n_blocks,
            config.n_passes,
            config.ffn_residual_scale,
            config.ngram_copy_orders,
            config.ngram_copy_reach,
            config.copy_adds,
        )
        self.weights = TrunkWeights(trunk, MIXERS[config.mixer].build(config))

    def use_int8(self, int8: bool) -> None:
        """See Trunk."""
        self.weights.use_int8(int8)

    def set_weights(self, parameters: Named) -> None:
        """See Trunk."""
        w, share = self.weights, self._config.ternary_threshold
        for b, block in _blocks(self._config, parameters):
            w.norm1[b], w.norm2[b] = block["norm1.weight"], block["norm2.weight"]
            ternarize(for_reading(block["glu.gate.weight"]), w.gate[b], threshold=share)
            ternarize(for_reading(block["glu.up.weight"]), w.up[b], threshold=share)
            w.down_values[b] = ternarize(for_reading(block["glu.down.weight"]), threshold=share)
            mixer = {n.removeprefix("mixer."): value for n, value in block.items() if n.startswith("mixer.")}
            w.mixer.set_weights(b, mixer)
            for name, matrices in w.mixer.matrices.items():
                ternarize(for_reading(mixer[name]), matrices.values[b], threshold=share)
        w.final_norm[...] = parameters["final_norm.weight"]
        _set_gains(w, parameters)
        w.pack()

    def new_buffers(self, batch: int, time: int) -> TrunkBuffers:
        """See Trunk."""
        return TrunkBuffers(self.weights, batch, time)

    def forward(self, buffers: TrunkBuffers, embedding: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """See Trunk."""
        return trunk_forward(buffers, self.weights, embedding, rows)

    def backward(self, buffers: TrunkBuffers, dout: np.ndarray, embedding: np.ndarray) -> Named:
        """See Trunk."""
        found = trunk_backward(buffers, self.weights, dout, embedding)
        named = {"final_norm.weight": found.final_norm}
        for b in range(self._config.n_blocks):
            # straight-through estimator: ternarize passes the gradient unchanged
            own = {
                "norm1.weight": found.norm1[b],
                "norm2.weight": found.norm2[b],
                "glu.gate.weight": found.gate[b],
                "glu.up.weight": found.up[b],
                "glu.down.weight": found.down[b],
                **{f"mixer.{name}": value for name, value in found.mixers[b].items()},
            }
            named |= {f"blocks.{b}.{name}": value for name, value in own.items()}
        return named | _gains(found.gain_in, found.gain_out)

    def new_state(self) -> decode.DecodeState:
        """See Trunk."""
        return decode.new_state(self.weights)

    def step(self, state: decode.DecodeState, embedding: np.ndarray, row: int) -> np.ndarray:
        """See Trunk."""
        return decode.decode_step(state, embedding, row)

    def prefill(
        self, buffers: TrunkBuffers, embedding: np.ndarray, rows: np.ndarray
    ) -> tuple[decode.DecodeState, np.ndarray]:
        """See Trunk."""
        h = trunk_forward(buffers, self.weights, embedding, rows)
        return decode.prefill(self.weights, buffers, rows), h

    def read(self, state: Any, buffers: Any, embedding: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """See Trunk."""
        raise NotImplementedError("TernaryTrunk.read: its receptive field is finite; use prefill")


class BitTrunk:
    """The MatMul-free LM's: an MLGRU and a SwiGLU, whose matrices are BitLinears."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self.weights = BitTrunkWeights(
            BitConfig(
                config.dim,
                config.ffn_dim,
                config.n_blocks,
                config.n_passes,
                config.norm_eps,
                config.ngram_copy_orders,
                config.ngram_copy_reach,
                config.copy_adds,
            )
        )
        self._bounds = np.zeros((config.n_blocks, config.dim), np.float32)  # the parameter

    def use_int8(self, int8: bool) -> None:
        """Does nothing: a BitLinear rounds its inputs to int8 in any case."""

    def set_weights(self, parameters: Named) -> None:
        """See Trunk."""
        w = self.weights
        for b, block in _blocks(self._config, parameters):
            w.norm1[b], w.norm2[b] = block["norm1.weight"], block["norm2.weight"]
            w.hidden_norm[b] = block["mixer.hidden_norm.weight"]
            for field, name in BIT_LAYERS.items():
                w.layers[field].set(b, for_reading(block[f"{name}.weight"]))
                w.layers[field].norms[b] = block[f"{name}.norm.weight"]
        w.final_norm[...], self._bounds[...] = parameters["final_norm.weight"], parameters["lower_bounds"]
        w.bounds[...] = lower_bounds(self._bounds)
        _set_gains(w, parameters)

    def new_buffers(self, batch: int, time: int) -> BitBuffers:
        """See Trunk."""
        return BitBuffers(self.weights, batch, time)

    def forward(self, buffers: BitBuffers, embedding: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """See Trunk."""
        return bit_trunk_forward(buffers, self.weights, embedding, rows)

    def backward(self, buffers: BitBuffers, dout: np.ndarray, embedding: np.ndarray) -> Named:
        """See Trunk."""
        found = bit_trunk_backward(buffers, self.weights, dout, embedding)
        named = {
            "final_norm.weight": found["final_norm"],
            "lower_bounds": lower_bounds_backward(found["bounds"], self._bounds),
        }
        fields = {"norm1": "norm1", "norm2": "norm2", "hidden_norm": "mixer.hidden_norm"}
        for field, name in BIT_LAYERS.items():
            fields |= {field: name, f"{field}_norm": f"{name}.norm"}
        for field, name in fields.items():
            named |= {f"blocks.{b}.{name}.weight": value for b, value in enumerate(found[field])}
        return named | _gains(found["gain_in"], found["gain_out"])

    def new_state(self) -> TextState:
        """See Trunk."""
        return bit_decode.bit_new_state(self.weights)

    def step(self, state: TextState, embedding: np.ndarray, row: int) -> np.ndarray:
        """See Trunk."""
        return bit_decode.bit_decode_step(state, embedding, row)

    def prefill(self, buffers: Any, embedding: np.ndarray, rows: np.ndarray) -> tuple[Any, np.ndarray]:
        """See Trunk."""
        raise NotImplementedError("BitTrunk.prefill: its receptive field is the whole text; use read")

    def read(self, state: TextState, buffers: BitBuffers, embedding: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """See Trunk."""
        return bit_decode.bit_read(state, buffers, self.weights, embedding, rows)


TRUNKS: dict[str, Callable[[ModelConfig], Trunk]] = {"ternary": TernaryTrunk, "bitlinear": BitTrunk}
