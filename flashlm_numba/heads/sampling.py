"""Drawing a token from a distribution: temperature, then top-k, then top-p."""

from __future__ import annotations

import numpy as np


def check_settings(
    temperature: float, top_k: int | None, top_p: float | None, vocab_size: int
) -> tuple[int | None, float | None]:
    """top_k and top_p, or None for one that keeps all of the vocabulary: the same seed then draws the same.

    Raises ValueError if a setting is out of range.
    """
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
    if top_k is not None and (top_k != int(top_k) or top_k < 1):
        raise ValueError(f"top_k must be a whole number of at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    return None if top_k is not None and top_k >= vocab_size else top_k, None if top_p == 1 else top_p


def sample_rows(
    probabilities: np.ndarray,
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> np.ndarray:
    """One column per row of probabilities (N, V), (N,) int32.

    temperature 0 takes the most likely token; otherwise p becomes p**(1/temperature), the top_k most likely are kept,
    of these the fewest whose probabilities reach top_p, and the rest is renormalised.
    Raises ValueError if a setting is out of range.

    >>> sample_rows(np.array([[0.1, 0.7, 0.2]]), np.random.default_rng(0), top_k=1).tolist()
    [1]
    """
    top_k, top_p = check_settings(temperature, top_k, top_p, probabilities.shape[1])
    out = np.empty(len(probabilities), np.int32)
    for i, row in enumerate(probabilities):
        if temperature == 0:
            out[i] = row.argmax()
            continue
        p = row.astype(np.float64)
        if temperature != 1:
            with np.errstate(divide="ignore", over="ignore"):
                logs = np.log(p)
                p = np.exp((logs - logs.max()) / temperature)
        # most likely first; equal ones by token id, so that the choice does not depend on the sort
        keep = np.argsort(-p, kind="stable") if top_k is not None or top_p is not None else np.arange(p.size)
        keep = keep[:top_k]
        total = np.cumsum(p[keep])
        if not 0 < total[-1] < np.inf:
            raise ValueError(f"probabilities must be finite and not all zero, their sum is {total[-1]}")
        if top_p is not None:
            total = total[: int(np.searchsorted(total, top_p * total[-1])) + 1]
        # the first whose running sum exceeds a share of the whole, drawn uniformly
        chosen = int(np.searchsorted(total, rng.random() * total[-1], side="right"))
        out[i] = keep[min(chosen, len(total) - 1)]
    return out
