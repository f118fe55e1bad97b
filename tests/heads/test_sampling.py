"""Drawing a token: the frequencies are the probabilities, under every setting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.heads.sampling import sample_rows

P = np.array([0.0, 0.4, 0.05, 0.25, 0.0, 0.3])


def expected(temperature=1.0, top_k=None, top_p=None):
    """The distribution that the settings mean, by the plain rule."""
    p = np.where(P > 0, P ** (1 / temperature), 0)
    order = np.argsort(-p, kind="stable")[:top_k]
    p[np.setdiff1d(np.arange(len(P)), order)] = 0
    p /= p.sum()
    if top_p is not None:
        kept, mass = [], 0.0
        for token in order:
            kept.append(token)
            mass += p[token]
            if mass >= top_p - 1e-12:
                break
        p[np.setdiff1d(np.arange(len(P)), kept)] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"top_k": 2},
        {"top_p": 0.7},
        {"top_k": 3, "top_p": 0.5},
    ],
)
def test_frequencies_are_the_probabilities(settings):
    draws = 20_000
    found = np.bincount(sample_rows(np.tile(P, (draws, 1)), np.random.default_rng(0), **settings), minlength=len(P))
    want = draws * expected(**settings)
    assert not found[want == 0].any()
    likely = want > 0
    chi2 = ((found - want)[likely] ** 2 / want[likely]).sum()
    assert chi2 < likely.sum() + 6 * np.sqrt(2 * likely.sum())


@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_what_is_drawn_can_occur(seed, size):
    rng = np.random.default_rng(seed)
    p = rng.random(size) * (rng.random(size) < 0.5)
    p[rng.integers(size)] = 1e-30
    for settings in ({}, {"top_k": 1}, {"top_p": 1.0}, {"temperature": 0.1}, {"temperature": 0.0}):
        (token,) = sample_rows(p[None].astype(np.float32), rng, **settings)
        assert p[token] > 0


@pytest.mark.parametrize("row", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_what_is_no_distribution_is_refused(row):
    with pytest.raises(ValueError, match="must be finite and not all zero"):
        sample_rows(np.array([row]), np.random.default_rng(0))


@given(st.integers(0, 2**32 - 1), st.sampled_from([255, 256, 257, 3_000]), st.sampled_from([0.0, 1.0, 1.5]))
def test_what_is_kept_is_that_of_a_whole_sort(seed, size, power):
    """Most of a large vocabulary is never sorted; many tokens are equally likely."""
    rng = np.random.default_rng(seed)
    p = np.round(rng.permutation(np.arange(1.0, size + 1) ** -power), 4) + 1e-6
    order = np.argsort(-p, kind="stable")
    for settings in ({"top_k": 200}, {"top_p": 0.3}, {"top_p": 0.999}, {"top_k": 90, "top_p": 0.6}):
        kept = order[: settings.get("top_k")]
        total = np.cumsum(p[kept])
        if "top_p" in settings:
            mass = p[kept].sum() if "top_k" in settings else p.sum()
            total = total[: np.searchsorted(total, settings["top_p"] * mass) + 1]
        uniform = np.random.default_rng(seed).random()
        wanted = kept[min(np.searchsorted(total, uniform * total[-1], side="right"), len(total) - 1)]
        assert sample_rows(p[None], np.random.default_rng(seed), **settings)[0] == wanted, settings
