"""Model.logits and TrainedModel.logits, with every head."""

import numpy as np
import pytest

import flashlm_numba as fl
from flashlm_numba.heads import HEADS, head_class
from flashlm_numba.heads.config import HeadConfig
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters

CONFIG = ModelConfig(vocab_size=70, dim=16, ffn_dim=24, groups=4, dilations=(1, 2))


def model_with(head, **options):
    settings = HeadConfig(name=head, num_sampled=20, **options)
    counts = np.random.default_rng(0).integers(0, 99, CONFIG.vocab_size)
    constants = head_class(head).constants_from_data(settings, counts, None)

    def make(weight, dweight):
        return head_class(head).from_settings(
            settings, weight, dweight, constants=constants, parameters={}, counts=counts
        )

    return Model(CONFIG, initial_parameters(CONFIG, 0, embedding_std=0.5), make)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("options", [{}, {"soft_cap": 3.0, "log_prior": True}])
def test_a_softmax_of_the_logits_is_the_distribution(head, options):
    model = model_with(head, **options)
    ids = np.random.default_rng(1).integers(0, 70, (3, 8))
    logits = model.logits(ids)
    assert logits.shape == (3, 8, 70)
    assert logits.dtype == np.float32
    h = model.forward(ids.astype(np.int32))
    p = np.exp(logits.astype(np.float64).reshape(24, 70))
    sums = p.sum(1, keepdims=True)
    np.testing.assert_allclose(p / sums, model.head.distribution(h), rtol=1e-4, atol=1e-7)
    targets = ids.reshape(-1).astype(np.int32)
    expected = logits.reshape(24, 70)[np.arange(24), targets] - np.log(sums[:, 0])
    np.testing.assert_allclose(model.head.log_prob(h, targets), expected, rtol=1e-4, atol=1e-4)
    if head == "tree":  # log-probabilities already
        np.testing.assert_allclose(sums, 1, atol=1e-5)


def test_logits_take_any_integers_and_no_text_at_all():
    model = model_with("dense")
    ids = np.array([[3, 1, 69]])
    expected = model.logits(ids)
    for other in (ids.astype(np.uint16), [[3, 1, 69]], np.asfortranarray(ids.astype(np.int32))):
        np.testing.assert_array_equal(model.logits(other), expected)
    assert model.logits(np.zeros((2, 0), np.int64)).shape == (2, 0, 70)
    assert model.logits(np.zeros((0, 5), np.int64)).shape == (0, 5, 70)


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (np.array([1, 2]), r"must be integers of shape \(B, T\), got int64 \(2,\)"),
        (np.array([[1.0]]), r"must be integers of shape \(B, T\), got float64"),
        (np.array([[True]]), r"must be integers of shape \(B, T\), got bool"),
        (np.array([[70]]), r"must be in \[0, 70\), got 70"),
        (np.array([[-1]]), r"must be in \[0, 70\), got -1"),
        (np.array([[2**40]]), r"must be in \[0, 70\), got 1099511627776"),
    ],
)
def test_what_is_no_matrix_of_ids_is_refused(ids, sentence):
    with pytest.raises(ValueError, match=sentence):
        model_with("dense").logits(ids)


def test_a_loaded_model_gives_logits(run):
    model = fl.load(run)
    ids = [[model.vocabulary.eot, *model.vocabulary.encode("The people")]]
    logits = model.logits(ids)
    assert logits.shape == (1, len(ids[0]), model.vocabulary.size)
    likeliest, p = model.next_tokens("The people", k=1)[0]
    assert model._text(int(logits[0, -1].argmax())) == likeliest
    np.testing.assert_allclose(np.exp(logits[0, -1].max()), p, rtol=1e-4)  # the default head is a tree
