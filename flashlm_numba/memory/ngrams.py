"""The n-grams of a training text as a memory beside a model; kernels/ngrams.py has their formulas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from flashlm_numba.kernels.ngrams import NgramModel, class_count
from flashlm_numba.memory.gate import Gate, Recalled
from flashlm_numba.memory.mixed_head import MixedHead

if TYPE_CHECKING:
    from flashlm_numba.heads.base import Head
    from flashlm_numba.heads.copy_mixture import CopyMixture

ORDER = 5  # length of the longest n-grams


class Memory(ABC):
    """Counted n-grams to be mixed with a head.

    model : the n-grams
    """

    def __init__(self, model: NgramModel) -> None:
        self.model = model

    def recall(self, document: np.ndarray) -> Recalled:
        """For the tokens of a document (n,) int32, each behind those before it."""
        return Recalled(*self.model.probability(document))

    @abstractmethod
    def mixed(self, h: np.ndarray, log_prob: np.ndarray, recalled: Recalled) -> np.ndarray:
        """ln of the mixture (N,) float64, for h (N, C), ln p (N,) of the head, and the memory's of N targets."""

    def describe(self) -> dict[str, Any]:
        """Its kind and size, as JSON values."""
        return {
            "kind": "ngrams",
            "order": self.model.order,
            "ngrams": len(self.model.tables.tokens),
            "bytes": self.model.nbytes,
        }


class FixedMemory(Memory):
    """A memory with the same share everywhere, beside a model that was trained without one.

    share : from 0 to 1
    """

    def __init__(self, model: NgramModel, share: float) -> None:
        super().__init__(model)
        self.share = share

    def mixed(self, h: np.ndarray, log_prob: np.ndarray, recalled: Recalled) -> np.ndarray:
        """See Memory."""
        with np.errstate(divide="ignore"):  # a share of 0 or 1
            return np.logaddexp(
                np.log1p(-self.share) + log_prob.astype(np.float64),
                np.log(self.share) + np.log(recalled.probability.astype(np.float64)),
            )


class GatedMemory(Memory):
    """A memory whose share a gate chooses, which is trained with the model.

    dim : C, of the hidden states that the gate reads;  parameters : of the gate, if it has been trained
    """

    def __init__(self, model: NgramModel, dim: int, parameters: dict[str, np.ndarray] | None = None) -> None:
        super().__init__(model)
        self.gate = Gate(class_count(model.order), dim, parameters)

    def mixed(self, h: np.ndarray, log_prob: np.ndarray, recalled: Recalled) -> np.ndarray:
        """See Memory."""
        return self.gate.mixed(h, log_prob, recalled)

    def recall_in_training(self, ids: np.ndarray, targets: np.ndarray) -> Recalled:
        """For sequences (B, T) int32 from the text that was counted, as if their documents had not been counted."""
        return Recalled(*self.model.without_document(ids, targets)).flat()

    def beside(self, head: Head | CopyMixture, ids: np.ndarray) -> MixedHead:
        """The head mixed with what the memory expects after a text, ids (n,) int32."""
        return MixedHead(head, self.gate, self.model, ids)
