"""Counting the n-grams of a training text."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from flashlm_numba.memory.ngrams import ORDER
from flashlm_numba.system.errors import UserError

if TYPE_CHECKING:
    from flashlm_numba.data.shards import TokenData
    from flashlm_numba.kernels.ngrams import NgramModel
    from flashlm_numba.system.display import Progress


def count_tokens(tokens: TokenData, least: int, progress: Progress) -> tuple[NgramModel, float]:
    """Count the n-grams of the training text, by kernels that the caller has compiled (the use "memory").

    least : as in kernels.ngram_counts.count_ngrams
    Returns the n-grams and the seconds that counting took. Raises UserError if the text is too long or there is not
    enough memory.
    """
    from flashlm_numba.kernels.ngram_counts import MOST_TOKENS, count_ngrams

    split = tokens.train
    if split.n_tokens >= MOST_TOKENS:
        raise UserError(f"The training text has {split.n_tokens:,} tokens; fewer than {MOST_TOKENS:,} can be counted.")
    began = time.perf_counter()
    with progress.tokens("counting n-grams", (ORDER - 1) * split.n_tokens) as bar:  # all, once for every length
        try:
            model = count_ngrams(
                split.ids(),
                tokens.vocabulary.size,
                tokens.vocabulary.eot,
                order=ORDER,
                least=least,
                progress=lambda length: bar.advance(split.n_tokens),
            )
        except MemoryError:
            raise UserError(
                f"There is not enough memory for the n-grams of {split.n_tokens:,} tokens; leave out --memory."
            ) from None
    return model, time.perf_counter() - began
