"""A memory of n-grams of the training text, whose probabilities are mixed with the model's.

    p(w) = weight p_memory(w) + (1 - weight) p_model(w)

The two know different things: the model what is alike, the memory what has occurred. Both sum to one, and so does the
mixture. The memory is counted anew for each command; kernels/ngrams.py has its formulas.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flashlm_numba.system.errors import UserError

if TYPE_CHECKING:
    from flashlm_numba.data.shards import TokenData
    from flashlm_numba.kernels.ngrams import NgramModel
    from flashlm_numba.model.config import MemoryOptions
    from flashlm_numba.system.display import Progress

ORDER = 5


@dataclass(frozen=True)
class Memory:
    """Counted n-grams, with what it took. seconds : for counting"""

    model: NgramModel
    options: MemoryOptions
    seconds: float

    def mixed(self, log_prob: np.ndarray, memory: np.ndarray) -> np.ndarray:
        """ln of the mixture (N,) float64, for ln p of the model and p of the memory, both (N,)."""
        weight = self.options.weight
        with np.errstate(divide="ignore"):  # a weight of 0 or 1
            return np.logaddexp(
                np.log1p(-weight) + log_prob.astype(np.float64), np.log(weight) + np.log(memory.astype(np.float64))
            )

    def describe(self) -> dict[str, Any]:
        """What `eval --json` says of it."""
        return {
            "kind": "ngrams",
            "order": self.model.order,
            "least": self.options.least,
            "weight": self.options.weight,
            "ngrams": len(self.model.tables.tokens),
            "bytes": self.model.nbytes,
            "seconds": self.seconds,
        }


def count_memory(tokens: TokenData, options: MemoryOptions, progress: Progress) -> Memory:
    """Count the n-grams of the training text, by kernels that the caller has compiled (the use "memory").

    Raises UserError if the text is too long or there is not enough memory.
    """
    from flashlm_numba.kernels.ngram_counts import MOST_TOKENS, count_ngrams

    split = tokens.train
    if split.n_tokens >= MOST_TOKENS:
        raise UserError(f"The training text has {split.n_tokens:,} tokens; fewer than {MOST_TOKENS:,} can be counted.")
    tokens.verify("train")
    began = time.perf_counter()
    with progress.tokens("counting n-grams", (ORDER - 1) * split.n_tokens) as bar:  # all, once for every length
        try:
            model = count_ngrams(
                split.ids(),
                tokens.vocabulary.size,
                tokens.vocabulary.eot,
                order=ORDER,
                least=options.least,
                progress=lambda length: bar.advance(split.n_tokens),
            )
        except MemoryError:
            raise UserError(
                f"There is not enough memory for the n-grams of {split.n_tokens:,} tokens; leave out --memory."
            ) from None
    return Memory(model, options, time.perf_counter() - began)
