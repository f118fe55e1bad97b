"""What the heads refuse when they are built or called, and that all of them mean the same by a setting."""

import numpy as np
import pytest

from flashlm_numba import BitLinearHead, DenseHead, SampledHead, TreeHead

V, C = 50, 8
ROWS = np.random.default_rng(0).standard_normal((V, C), np.float32)
H = np.random.default_rng(1).standard_normal((4, C), np.float32)
COUNTS = np.arange(V)[::-1]
MAKERS = {
    "dense": lambda weight=ROWS, dweight=None, **options: DenseHead(weight, dweight, **options),
    "sampled": lambda weight=ROWS, dweight=None, **options: SampledHead(
        weight, dweight, counts=COUNTS, candidates=9, **options
    ),
    "tree": lambda weight=ROWS, dweight=None, **options: TreeHead(
        weight=weight, dweight=dweight, counts=COUNTS, **options
    ),
    "bitlinear": lambda weight=ROWS, dweight=None, **options: BitLinearHead(weight, dweight, **options),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"soft_cap": 0.0}, "soft_cap must be above 0"),
        ({"soft_cap": -1.0}, "soft_cap must be above 0"),
        ({"soft_cap": np.nan}, "soft_cap must be above 0"),
        ({"soft_cap": np.inf}, "soft_cap must be above 0"),
        ({"label_smoothing": 2.0}, "label_smoothing must be between 0 and 1"),
        ({"label_smoothing": np.nan}, "label_smoothing must be between 0 and 1"),
        ({"z_loss": -1.0}, "z_loss must be finite and at least 0"),
        ({"weight": ROWS.astype(np.float64)}, "weight must be float32"),
        ({"weight": ROWS[0]}, "weight must have shape"),
        ({"weight": ROWS.tolist()}, "weight must be a NumPy array"),
        ({"weight": ROWS[:, :0].copy()}, "weight must have at least one row and one column"),
        ({"dweight": np.zeros((3, 3), np.float32)}, "dweight must have shape"),
        ({"log_prior": np.zeros(3, np.float32)}, "log_prior must have shape"),
    ],
)
def test_what_cannot_be_is_refused_when_a_head_is_built(make, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"vocab_size": 4, "dim": 0}, "dim must be a whole number of at least 1"),
        ({"vocab_size": 0, "dim": 4}, "vocab_size must be a whole number of at least 1"),
        ({"vocab_size": -1, "dim": 4}, "vocab_size must be a whole number of at least 1"),
        ({"vocab_size": 9, "dim": 4, "rank": 2.5}, "rank must be a whole number"),
    ],
)
def test_sizes_of_a_tree_head(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        TreeHead(**options)


@pytest.mark.parametrize(
    "targets", [[1, 2, 3, 4], np.ones(4, bool), np.ones(4), np.ones(4, np.int64), np.array([1, 2, 3, V], np.int32)]
)
def test_targets_are_token_ids(make, targets):
    head, weights = make(), np.full(4, 0.25, np.float32)
    with pytest.raises(ValueError, match="targets must"):
        head.forward_backward(H, targets, weights)
    with pytest.raises(ValueError, match="targets must"):
        head.log_prob(H, targets)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_nothing_is_drawn_from_what_is_not_finite(make, value, options):
    h = H.copy()
    h[2, 3] = value
    with pytest.raises(ValueError, match="finite"):
        make().sample(h, np.random.default_rng(0), **options)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("options", [{"top_k": V}, {"top_k": V + 1}, {"top_p": 1.0}])
def test_a_setting_that_keeps_everything_draws_what_none_draws(make, temperature, options):
    head = make()
    plain, other = (
        head.sample(H, np.random.default_rng(3), temperature=temperature, **which).tolist() for which in ({}, options)
    )
    assert plain == other


def test_a_token_that_cannot_be_has_no_probability_and_spoils_no_other(make):
    prior = np.zeros(V, np.float32)
    prior[-12:] = -np.inf
    p = make(log_prior=prior).distribution(H)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    assert (p[:, -12:] == 0).all()
    np.testing.assert_allclose(
        make(log_prior=prior).log_prob(H, np.arange(4, dtype=np.int32)), np.log(p[range(4), range(4)]), atol=1e-4
    )
