"""The model: embedding, trunk and head, with named parameters and gradients. Backward is forward in reverse.

Letters: B batch, T time, N = B*T positions, V vocabulary, C channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from flashlm_numba.heads import Head
from flashlm_numba.kernels import _check, decode
from flashlm_numba.kernels.decode import DecodeState
from flashlm_numba.kernels.embedding import embedding_backward, zero
from flashlm_numba.kernels.ngram_copy import scatter_copies
from flashlm_numba.kernels.ternary import ternarize
from flashlm_numba.kernels.trunk import TrunkBuffers, TrunkConfig, TrunkWeights, trunk_backward, trunk_forward
from flashlm_numba.model.config import ACTIVATIONS, ModelConfig
from flashlm_numba.model.mixers import MIXERS
from flashlm_numba.model.parameters import EMBEDDING, ENDS, parameter_shapes
from flashlm_numba.system.errors import UserError


def trunk_weights(config: ModelConfig) -> TrunkWeights:
    """The trunk's weights in the kernels' layouts, all zero."""
    trunk = TrunkConfig(
        config.dim,
        config.ffn_dim,
        config.n_blocks,
        config.n_passes,
        config.ffn_residual_scale,
        config.ngram_copy_orders,
        config.ngram_copy_reach,
    )
    return TrunkWeights(trunk, MIXERS[config.mixer].build(config))


class Model:
    """Parameters, gradients, forward and backward pass.

    make_head : function that builds the head on the live embedding and its gradient, both (V, C) float32
    `parameters` and `gradients` are dicts with the same keys: those of parameter_shapes, then the head's.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: dict[str, np.ndarray],
        make_head: Callable[[np.ndarray, np.ndarray], Head],
    ) -> None:
        self.config = config
        for name, shape in parameter_shapes(config).items():
            if name not in parameters:
                raise ValueError(f"Model: parameter {name} is missing")
            _check.array("Model", name, parameters[name], shape)
        self.parameters = {name: parameters[name] for name in parameter_shapes(config)}
        # np.zeros allocates memory on the first write, so a model that only generates has no gradients in memory
        self.gradients = {name: np.zeros(value.shape, np.float32) for name, value in self.parameters.items()}
        self.head = make_head(self.parameters[EMBEDDING], self.gradients[EMBEDDING])
        for name, value in self.head.parameters.items():
            self.parameters[f"head.{name}"] = value
            self.gradients[f"head.{name}"] = self.head.gradients[name]
        self._weights = trunk_weights(config)
        self._buffers: TrunkBuffers | None = None
        self._rows: np.ndarray | None = None
        self.use_activations(config.activations)

    def use_activations(self, kind: str) -> None:
        """Select the arithmetic of the ternary products, "float" or "int8"; the default is that of the configuration.

        With "int8" both passes quantise the inputs of the products with one scale per row. This is faster and less
        accurate. Raises ValueError for another kind.
        """
        if kind not in ACTIVATIONS:
            raise ValueError(f"Model: activations must be one of {', '.join(ACTIVATIONS)}, got {kind!r}")
        try:
            self._weights.use_int8(kind == "int8")
        except ValueError as error:  # the environment variable that selects a variant is wrong
            raise UserError(f"{error}.") from None
        self._buffers = None  # a backward pass must not follow a forward pass with other activations
        self.sync_weights()

    def sync_weights(self) -> None:
        """Ternarise and pack the weights for the kernels. Call this after every change of the parameters."""
        p, w = self.parameters, self._weights
        share = self.config.ternary_threshold
        for b in range(self.config.n_blocks):
            block = self._block(b)
            w.norm1[b], w.norm2[b] = block["norm1.weight"], block["norm2.weight"]
            ternarize(block["glu.gate.weight"], w.gate[b], threshold=share)
            ternarize(block["glu.up.weight"], w.up[b], threshold=share)
            w.down_values[b] = ternarize(block["glu.down.weight"], threshold=share)
            mixer = {n.removeprefix("mixer."): value for n, value in block.items() if n.startswith("mixer.")}
            w.mixer.set_weights(b, mixer)
            for name, matrices in w.mixer.matrices.items():
                ternarize(mixer[name], matrices.values[b], threshold=share)
        w.final_norm[...] = p["final_norm.weight"]
        for o in range(len(self.config.ngram_copy_orders)):
            w.gain_in[o], w.gain_out[o] = (p[f"ngram_copy.{end}.{o}.weight"] for end in ENDS)
        w.pack()
        self.head.prepare()

    def _block(self, block: int) -> dict[str, np.ndarray]:
        """The parameters of a block, by name within the block."""
        prefix = f"blocks.{block}."
        return {n.removeprefix(prefix): value for n, value in self.parameters.items() if n.startswith(prefix)}

    def zero_grad(self) -> None:
        """Set every gradient to zero."""
        for gradient in self.gradients.values():
            zero(gradient)

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Hidden states (B*T, C) float32 for token ids (B, T) int32. The result is a buffer, valid until the next call.

        A hidden state depends on no later token. Raises ValueError if an id is not in [0, V).
        """
        _check.array("Model.forward", "ids", ids, (None, None), np.int32)
        _check.indices("Model.forward", "ids", ids, self.config.vocab_size, "the data use another vocabulary")
        rows = ids.reshape(-1)
        if self.head.row_of_token is not None:
            rows = self.head.row_of_token[rows]
        self._rows = np.ascontiguousarray(rows, np.int32)
        if self._buffers is None or not self._buffers.fits(self._weights, *ids.shape):
            self._buffers = None  # frees the old buffers before new ones are allocated
            self._buffers = TrunkBuffers(self._weights, *ids.shape)
        return trunk_forward(self._buffers, self._weights, self.parameters[EMBEDDING], self._rows)

    def prefill(self, ids: np.ndarray) -> tuple[DecodeState, np.ndarray]:
        """Read a text, ids (T,) int32 with T >= 1, in one pass. Returns a decoding state and the last hidden state
        (1, C).

        Only the last receptive_field tokens matter, so only these are read. If parameters have changed, call
        sync_weights first. Raises ValueError if there is no token or if one is not in [0, V).
        """
        _check.array("Model.prefill", "ids", ids, (None,), np.int32)
        if not len(ids):
            raise ValueError("Model.prefill: ids must contain at least one token; a text begins with <|endoftext|>")
        h = self.forward(ids[None, -self.config.receptive_field :])
        assert self._buffers is not None
        assert self._rows is not None
        return decode.prefill(self._weights, self._buffers, self._rows), h[-1:].copy()

    def decode_step(self, state: DecodeState, token: int) -> np.ndarray:
        """Feed one token id to a state from prefill. Returns the hidden state (1, C) float32.

        The result is valid until the next call. Raises ValueError if the token is not in [0, V).
        """
        if not 0 <= token < self.config.vocab_size:
            raise ValueError(f"Model.decode_step: token must be in [0, {self.config.vocab_size}), got {token}")
        row = token if self.head.row_of_token is None else int(self.head.row_of_token[token])
        return decode.decode_step(state, self._weights, self.parameters[EMBEDDING], row)

    def backward(self, dh: np.ndarray) -> None:
        """Add the gradients of the last forward call, given dh (B*T, C) float32, to `gradients`, embedding included."""
        if self._buffers is None or self._rows is None:
            raise ValueError("Model.backward: call forward first")
        _check.array("Model.backward", "dh", dh, self._buffers.activations.out.shape)
        self._trunk_backward(dh)
        self._embedding_backward(dh)

    def _embedding_backward(self, dh: np.ndarray) -> None:
        """Add the embedding's gradient from the input rows, and from the copied rows at input and output."""
        assert self._buffers is not None
        assert self._rows is not None
        b, w, gradient = self._buffers, self._weights, self.gradients[EMBEDDING]
        dx = b.gradients.dx
        embedding_backward(gradient, dx, self._rows)
        for o, copies in enumerate(b.activations.copies):
            scatter_copies(gradient, dx, dh, copies, w.gain_in[o], w.gain_out[o])

    def _trunk_backward(self, dh: np.ndarray) -> None:
        assert self._buffers is not None
        g = self.gradients
        found = trunk_backward(self._buffers, self._weights, dh, self.parameters[EMBEDDING])
        for b in range(self.config.n_blocks):
            # straight-through estimator: ternarize passes the gradient unchanged
            own = {
                "norm1.weight": found.norm1[b],
                "norm2.weight": found.norm2[b],
                "glu.gate.weight": found.gate[b],
                "glu.up.weight": found.up[b],
                "glu.down.weight": found.down[b],
                **{f"mixer.{name}": value for name, value in found.mixers[b].items()},
            }
            for name, value in own.items():
                g[f"blocks.{b}.{name}"] += value
        g["final_norm.weight"] += found.final_norm
        for o in range(len(self.config.ngram_copy_orders)):
            g[f"ngram_copy.inputs.{o}.weight"] += found.gain_in[o]
            g[f"ngram_copy.outputs.{o}.weight"] += found.gain_out[o]

    def loss_and_grad(
        self, ids: np.ndarray, targets: np.ndarray, weights: np.ndarray, *, accumulate: bool = True
    ) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """Run one micro-batch: forward, head, backward. Gradients are added to `gradients` or replace them.

        ids, targets : (B, T) int32
        weights : (B*T,) float32, the share of each position in the step's loss; the shares of a step sum to 1.
            Positions of weight 0 cost the head nothing.
        accumulate : False replaces the gradients, for the first micro-batch of a step. It is cheaper than zero_grad,
            because the head, which has most of the gradients, clears only those that it does not write.
        Returns loss (n,) and nll (n,) float32, in nats, of the positions of non-zero weight, in order; and the seconds
        spent in `embedding`, `trunk` and `head`.
        """
        start = time.perf_counter()
        h = self.forward(ids)
        _check.array("Model.loss_and_grad", "targets", targets, ids.shape, np.int32)
        _check.array("Model.loss_and_grad", "weights", weights, (ids.size,))
        after_forward = time.perf_counter()
        flat = targets.reshape(-1)
        if weights.all():
            loss, nll, dh = self.head.forward_backward(h, flat, weights, accumulate=accumulate)
        else:
            kept = np.flatnonzero(weights)
            loss, nll, dh_kept = self.head.forward_backward(
                np.ascontiguousarray(h[kept]), np.ascontiguousarray(flat[kept]), weights[kept], accumulate=accumulate
            )
            dh = np.zeros_like(h)
            dh[kept] = dh_kept
        after_head = time.perf_counter()
        if not accumulate:
            for name, gradient in self.gradients.items():
                if name != EMBEDDING and not name.startswith("head."):
                    zero(gradient)
        self._trunk_backward(dh)
        after_trunk = time.perf_counter()
        self._embedding_backward(dh)
        end = time.perf_counter()
        seconds = {
            "embedding": end - after_trunk,
            "trunk": after_forward - start + after_trunk - after_head,
            "head": after_head - after_forward,
        }
        return loss, nll, seconds
