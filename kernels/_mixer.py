"""The interface of a token mixer for the trunk and for decoding. docs/extending.md has a complete example."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from flashlm_numba.kernels._division import Copies, Division, Stage
from flashlm_numba.kernels._ternary_layer import TernaryMatrices


class Mixer(Protocol):
    """The interface of the mixers of L blocks for the trunk and for decoding: weights and regions.

    Each mixer defines its NamedTuples, which only its helpers read. `matrices` are its ternary matrices.
    """

    matrices: dict[str, TernaryMatrices]  # by the names of their parameters, relative to the block's mixer

    def set_weights(self, block: int, parameters: dict[str, np.ndarray]) -> None:
        """Set a block's parameters, except the ternary matrices, by name within the mixer."""
        ...

    def weights(self, transposed: bool) -> NamedTuple:
        """Weights for the forward pass, or with the layouts of the backward pass."""
        ...

    def new_activations(self, layers: int, batch: int, time: int) -> NamedTuple:
        """Arrays for the activations of R layers that the backward pass needs."""
        ...

    def forward_stages(self) -> list[Stage]:
        """The stages of the forward pass, in order, and how each divides among threads.

        Threads do not wait for one another between consecutive stages with the same division. A part of such a stage
        may therefore read only what the same part of the stage before has written.
        """
        ...

    def backward_stages(self) -> list[Stage]:
        """The same of the backward pass."""
        ...

    def new_scratch(self, division: Division) -> NamedTuple:
        """Scratch per thread, and what is kept between stages (Division.places)."""
        ...

    @property
    def gradients_type(self) -> Any:
        """The NamedTuple of the gradients."""
        ...

    def gradient_shapes(self, copies: Copies) -> dict[str, tuple[int, ...]]:
        """The shapes of the gradients by field, the copies first."""
        ...

    def gradients(self, block: int, found: Any) -> dict[str, np.ndarray]:
        """A block's gradients by name within the mixer; found: the NamedTuple of the gradients, without the copies."""
        ...

    @property
    def forward(self) -> Any:
        """The serial kernel (out, x, unit, weights, activations, scratch, normed, arithmetic) of a stage.

        All stages together add the mixer's output for x (M, C), times its residual scale, to out (M, C). They may
        change x. normed (any, C), with as many rows as a part that divides by rows, is scratch within the stage.
        """
        ...

    @property
    def backward(self) -> Any:
        """The serial kernel (dx, dout, x, unit, gradients, weights, activations, scratch, normed, arithmetic) of a
        stage.

        All stages together write dx (M, C), the gradient of the mixer's input x (M, C). dout (M, C) is the gradient of
        the sum to which the mixer's output was added. They may change x and normed, and add the gradients of the
        weights to the copy of the unit. The first stage that divides by rows may add only to Copies.rows.
        """
        ...

    def decode_weights(self, *forms: np.ndarray) -> NamedTuple:
        """For decoding; forms: each of `matrices` as int8 and packed, in their order (decode.decode_matrices)."""
        ...

    def new_state(self, layers: int) -> NamedTuple:
        """Decoding state before the first token, with the mixer's scratch."""
        ...

    @property
    def decode_region(self) -> Any:
        """The serial kernel (embedding, row, position, *fields of State, DecodeWeights and the mixer's state, weights)
        made with decode.make_decode_step.
        """
        ...

    @property
    def prefill_region(self) -> Any:
        """The serial kernel (x, activations, weights, and the mixer's state, weights, activations) made with
        decode.make_prefill.
        """
        ...
