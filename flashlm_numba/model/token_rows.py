"""The rows of the tokens, which the trunk reads, a tied head multiplies and the n-gram copies add.

They are the embedding itself, or an embedding of its own width times a projection.

Letters: V vocabulary, E width of the embedding, C channels.
"""

from __future__ import annotations

import numpy as np

from flashlm_numba.kernels.embedding import zero
from flashlm_numba.model.parameters import EMBEDDING, PROJECTION


class TokenRows:
    """Rows (V, C) and their gradient, both float32, in the order of the embedding's rows.

    parameters, gradients : those of the model, by name
    With a projection P (E, C) the rows are W P. A hidden state h then meets token v in the head as h P^T w_v, so P^T
    stands in front of a tied head as P stands in front of the trunk. The product is computed once per change of the
    weights; a step of training costs 6 V E C flop more, and memory for rows and gradient as without a projection.
    """

    def __init__(self, parameters: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        self._factors = None
        self.values, self.gradient = parameters[EMBEDDING], gradients[EMBEDDING]
        if PROJECTION in parameters:
            self._factors = parameters[EMBEDDING], parameters[PROJECTION], gradients[EMBEDDING], gradients[PROJECTION]
            self.values = parameters[EMBEDDING] @ parameters[PROJECTION]
            self.gradient = np.zeros(self.values.shape, np.float32)

    def sync(self) -> None:
        """Compute the rows. Call this after every change of the parameters."""
        if self._factors is not None:
            embedding, projection, _, _ = self._factors
            # through a temporary array, since a thread that generates text must not see a partial product
            self.values[...] = embedding @ projection

    def backward(self) -> None:
        """Set the gradients of embedding and projection by that of the rows, which has all micro-batches of a step.

        rows = W P:  dW = drows P^T,  dP = W^T drows. A row without a gradient has none in W either.
        """
        if self._factors is not None:
            embedding, projection, dembedding, dprojection = self._factors
            np.matmul(self.gradient, projection.T, out=dembedding)
            np.matmul(embedding.T, self.gradient, out=dprojection)

    def zero_grad(self) -> None:
        """Set the gradient of the rows to zero."""
        zero(self.gradient)
