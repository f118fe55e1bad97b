"""The gate that mixes a memory's probabilities with those of a head.

    p(w) = m q(w) + (1 - m) p_head(w),   m = sigmoid(a[class of the context] + u . h)

q are the memory's probabilities. What the gate sees of a context is the memory's class of it and the hidden state h.
Both parts sum to one, and so does the mixture.
Letters: N positions, C channels, K classes of contexts.
Source: Jelinek and Mercer 1980, "Interpolated estimation of Markov source parameters from sparse data" (weights by the
class of the context); Neubig and Dyer 2016, arXiv:1606.00499 (weights that a network computes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flashlm_numba.kernels import _check

if TYPE_CHECKING:
    from flashlm_numba.heads.base import Head
    from flashlm_numba.heads.copy_mixture import CopyMixture


class Recalled(NamedTuple):
    """What a memory says of some targets. Arrays of one shape."""

    probability: np.ndarray  # float32: q(target)
    classes: np.ndarray  # int32: of the contexts

    def flat(self) -> Recalled:
        """In one row."""
        return Recalled(self.probability.reshape(-1), self.classes.reshape(-1))

    def at(self, index: np.ndarray | slice) -> Recalled:
        """At some positions of one row."""
        return Recalled(self.probability[index], self.classes[index])


class Gate:
    """The trained share of the memory, with its gradients.

    classes : K;  dim : C
    parameters, gradients : "classes" (K,), which is a, and "weight" (C,), which is u; float32. Both start at zero, so
        that head and memory begin with the same share
    """

    def __init__(self, classes: int, dim: int, parameters: dict[str, np.ndarray] | None = None) -> None:
        shapes: dict[str, tuple[int, ...]] = {"classes": (classes,), "weight": (dim,)}
        found = parameters or {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        for name, shape in shapes.items():
            if name not in found:
                raise ValueError(f"Gate: parameter {name} is missing")
            _check.array("Gate", name, found[name], shape)
        self.parameters: dict[str, np.ndarray] = {name: found[name] for name in shapes}
        self.gradients: dict[str, np.ndarray] = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}

    def logit(self, h: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """ln of m / (1 - m), (N,) float64, for h (N, C) float32 and the contexts' classes (N,)."""
        # a sum per row, so that a position's share does not depend on what else is computed with it
        direction = np.einsum("nc,c->n", h, self.parameters["weight"], dtype=np.float64)
        return direction + self.parameters["classes"][classes]

    def mixed(self, h: np.ndarray, log_prob: np.ndarray, recalled: Recalled) -> np.ndarray:
        """ln of the mixture (N,) float64, for ln p_head (N,) of the targets and what the memory says of them."""
        return np.logaddexp(*_parts(self.logit(h, recalled.classes), log_prob, recalled))

    def forward_backward(
        self,
        head: Head | CopyMixture,
        h: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray,
        recalled: Recalled,
        *,
        accumulate: bool = True,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Head.forward_backward, and the gradients of sum(weights * nll) of the mixture for the gate.

        Returns the head's loss (N,), the mixture's nll (N,), and dh (N, C) of the head's loss. The head learns as if
        there were no memory: trained through the mixture, it leaves to the memory what that knows, and of 1.5 million
        tokens it learnt too little (docs/experiments.md). With r, the head's part of the mixture's probability p of
        the target,
            d(-ln p) / d(logit of m) = r - (1 - m),   r = (1 - m) p_head(target) / p(target)
        """
        loss, nll, dh = head.forward_backward(h, targets, weights, accumulate=accumulate)
        logit = self.logit(h, recalled.classes)
        own, memory = _parts(logit, -nll.astype(np.float64), recalled)
        mixed = -np.logaddexp(own, memory)
        slope = weights * (np.exp(own + mixed) - np.exp(-np.logaddexp(0, logit)))
        found = {
            "classes": np.bincount(recalled.classes, slope, minlength=len(self.parameters["classes"])),
            "weight": slope.astype(np.float32) @ h,
        }
        for name, gradient in self.gradients.items():
            np.add(gradient if accumulate else np.float32(0), found[name].astype(np.float32), out=gradient)
        return loss, mixed.astype(np.float32), dh


def _parts(logit: np.ndarray, log_prob: np.ndarray, recalled: Recalled) -> tuple[np.ndarray, np.ndarray]:
    """ln of (1 - m) p_head and of m q, (N,) float64, for the logit of m and ln p_head (N,)."""
    with np.errstate(divide="ignore"):  # q may be 0
        known = np.log(recalled.probability.astype(np.float64))
    return log_prob - np.logaddexp(0, logit), known - np.logaddexp(0, -logit)
