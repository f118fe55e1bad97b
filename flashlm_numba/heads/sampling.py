"""Sampling a token from a distribution: temperature, then top-k, then top-p."""

from __future__ import annotations

import numpy as np


def check_settings(
    temperature: float, top_k: int | None, top_p: float | None, vocab_size: int
) -> tuple[int | None, float | None]:
    """Return top_k and top_p, each replaced by None if it excludes no token, so that the same seed samples the same.

    They are Python's numbers, because kernels would be compiled anew for other types of number.
    Raises ValueError if a setting is out of range.
    """
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
    if top_k is not None and (top_k != int(top_k) or top_k < 1):
        raise ValueError(f"top_k must be a whole number of at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    return (
        None if top_k is None or top_k >= vocab_size else int(top_k),
        None if top_p is None or top_p == 1 else float(top_p),
    )


# kinds of sampling, which use different kernels: by the probabilities as they are, among the likeliest tokens, or by
# changed probabilities of all tokens
KINDS = ("plain", "likeliest", "whole")
_FEW = 256  # of the likeliest tokens that are tried first
_MANY = 1_000  # a top_k above the size of the vocabulary excludes no token


def kinds_of_sampling(temperature: float, top_k: int | None, top_p: float | None) -> list[str]:
    """The KINDS that Head.sample may use with these settings.

    >>> kinds_of_sampling(0.8, None, None), kinds_of_sampling(0.8, 40, 0.9), kinds_of_sampling(1, None, 1)
    (['whole'], ['likeliest'], ['plain'])
    """
    if temperature == 0 or (top_k is not None and top_k < _MANY):
        return ["likeliest"]
    rest = ["plain" if temperature == 1 and top_p in (None, 1) else "whole"]
    return rest if top_k is None else ["likeliest", *rest]


def _largest(p: np.ndarray, count: int) -> np.ndarray:
    """Indices (k,) of the k = min(count, V) largest of p (V,), largest first, of equal ones the smaller index."""
    if count >= len(p):
        return np.argsort(-p, kind="stable")
    found = np.flatnonzero(p >= np.partition(p, -count)[-count])  # the equal ones too
    return found[np.argsort(-p[found], kind="stable")][:count]


def _until_mass(p: np.ndarray, mass: float) -> np.ndarray:
    """Indices of the largest of p (V,), largest first: as many as sum to this mass, or more."""
    count = _FEW
    while True:
        found = _largest(p, count)
        if len(found) == len(p) or np.cumsum(p[found])[-1] > mass:
            return found
        count *= 8


def sample_rows(
    probabilities: np.ndarray,
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> np.ndarray:
    """Sample one column per row of probabilities (N, V). Returns (N,) int32.

    Temperature 0 takes the likeliest token. Otherwise p becomes p**(1/temperature), and only the top_k likeliest tokens
    remain, and of these the fewest whose probabilities sum to top_p. Their probabilities are renormalised.
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
        mass = p.sum()
        if not 0 < mass < np.inf:
            raise ValueError(f"probabilities must be finite and not all zero, their sum is {mass}")
        if top_k is not None:
            keep = _largest(p, top_k)
            mass = p[keep].sum()
        elif top_p is not None:
            keep = _until_mass(p, top_p * mass)
        else:
            keep = np.arange(p.size)
        total = np.cumsum(p[keep])
        if top_p is not None:
            total = total[: int(np.searchsorted(total, top_p * mass)) + 1]
        # the first token whose cumulative probability exceeds a uniform random share of the total
        chosen = int(np.searchsorted(total, rng.random() * total[-1], side="right"))
        out[i] = keep[min(chosen, len(total) - 1)]
    return out
