"""The logits of several texts at once, for a head that reads all its rows for every token.

Letters: N texts, V vocabulary, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Joined:
    """The hidden states h (N, C) after a step of several texts; all logits are computed when the first is asked for.

    A text gets its row as a view, by which its head recognises it.
    """

    h: np.ndarray
    logits: dict[str, np.ndarray] = field(default_factory=dict)  # (N, V) float32, by the arithmetic

    def row(self, number: int) -> np.ndarray:
        """The hidden state (1, C) of a text."""
        return self.h[number : number + 1]

    def find(
        self, x: np.ndarray, compute: Callable[[np.ndarray], np.ndarray], arithmetic: str = "float"
    ) -> np.ndarray | None:
        """A text's row of compute(h) (1, V), for its hidden state x; None if x is not one of these rows.

        arithmetic : a name for what `compute` computes
        """
        if x.base is not self.h or x.size != self.h.shape[1]:
            return None
        if arithmetic not in self.logits:
            self.logits[arithmetic] = compute(self.h)
        number = (x.ctypes.data - self.h.ctypes.data) // self.h.strides[0]
        return self.logits[arithmetic][number : number + 1]
