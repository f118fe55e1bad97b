"""Dropout: what becomes 0, its gradients, and that scoring and generating know nothing of it."""

import dataclasses

import numpy as np
import pytest

from flashlm_numba.heads import DenseHead, TreeHead
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.dropout import NO_DROPOUT, Dropout
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import EMBEDDING, initial_parameters

CONFIG = ModelConfig(
    30,
    16,
    24,
    4,
    dilations=(1, 2),
    mixer_residual_scale=0.25,
    ffn_residual_scale=2**-7,
    leaky_decay=0.9,
    ngram_copy_orders=(1, 2, 1),
    ngram_copy_reach=20,
    ngram_copy_output="mixture",
)
ADDED = dataclasses.replace(CONFIG, ngram_copy_output="add")
MMF = ModelConfig(30, 16, 24, mixer="mlgru", linear="bitlinear", n_blocks=2, n_passes=1)
RATES = {"hidden": 0.3, "embedding": 0.4}


def tree_head(weight, dweight):
    """Its rows are in another order than the token ids."""
    return TreeHead(build_tree("adaptive", np.arange(CONFIG.vocab_size)), weight, dweight)


def make_model(config=CONFIG, make_head=tree_head):
    parameters = initial_parameters(config, 0, embedding_std=0.5)
    rng = np.random.default_rng(1)
    for name, value in parameters.items():
        if name.startswith("ngram_copy."):
            value += rng.standard_normal(value.shape).astype(np.float32)
    return Model(config, parameters, make_head)


def batch():
    """Few tokens, so that there are copies."""
    ids = np.random.default_rng(2).integers(0, 8, (3, 21)).astype(np.int32)
    weights = np.full(60, 1 / 60, np.float32)
    weights[7] = 0  # a position that does not count
    return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]), weights


def dropout(seed=0, **rates):
    return Dropout(np.random.default_rng(seed), **(rates or RATES))


def gradients_of(model):
    return {name: value.copy() for name, value in model.gradients.items()}


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_share_of_the_gains_is_zero_and_their_mean_is_one(rate):
    for gains in (dropout(hidden=rate).hidden_gains(400, 500), dropout(embedding=rate).embedding_gains(400, 500)):
        assert gains.dtype == np.float32
        assert set(np.unique(gains).tolist()) == {0.0, float(np.float32(1 / (1 - rate)))}
        spread = np.sqrt(rate * (1 - rate) / gains.size)
        assert abs((gains == 0).mean() - rate) < 5 * spread
        assert abs(gains.mean() - 1) < 5 * spread / (1 - rate)
        # neither whole rows nor whole columns
        for axis in (0, 1):
            shares = (gains == 0).mean(axis)
            assert abs(shares.std() - np.sqrt(rate * (1 - rate) / gains.shape[axis])) < 0.2 * spread * 30


def test_nothing_is_drawn_at_rate_zero():
    assert NO_DROPOUT.hidden_gains(2, 3) is None
    assert NO_DROPOUT.embedding_gains(2, 3) is None
    before = str(NO_DROPOUT.rng.bit_generator.state)
    model, (ids, targets, weights) = make_model(), batch()
    loss, _, _ = model.loss_and_grad(ids, targets, weights)
    want = gradients_of(model)
    again, _, _ = model.loss_and_grad(ids, targets, weights, accumulate=False, dropout=NO_DROPOUT)
    np.testing.assert_array_equal(loss, again)
    for name, value in want.items():
        np.testing.assert_array_equal(model.gradients[name], value, err_msg=name)
    assert str(NO_DROPOUT.rng.bit_generator.state) == before


def test_all_occurrences_of_a_token_lose_the_same_channels():
    model, (ids, targets, weights) = make_model(make_head=DenseHead), batch()
    seen = {}
    forward = model._trunk.forward

    def spy(buffers, table, rows):
        seen.update(table=table, rows=rows)
        return forward(buffers, table, rows)

    model._trunk.forward = spy
    model.loss_and_grad(ids, targets, weights, dropout=dropout(embedding=0.5))
    read = seen["table"][seen["rows"]]  # (N, C)
    whole = model.parameters[EMBEDDING][ids.reshape(-1)]
    lost = (read == 0) & (whole != 0)
    assert 0.3 < lost.mean() < 0.7
    np.testing.assert_allclose(read[~lost], 2 * whole[~lost], rtol=1e-6)
    for token in np.unique(ids):
        of_token = lost[ids.reshape(-1) == token]
        np.testing.assert_array_equal(of_token, np.broadcast_to(of_token[0], of_token.shape))
    np.testing.assert_array_equal(seen["rows"][:, None] == seen["rows"], ids.reshape(-1)[:, None] == ids.reshape(-1))


@pytest.mark.parametrize("rates", [{"hidden": 0.3}, {"embedding": 0.4}, RATES])
@pytest.mark.parametrize(("config", "make_head"), [(CONFIG, tree_head), (CONFIG, DenseHead), (ADDED, DenseHead)])
def test_gradients_agree_with_finite_differences_through_the_masks(config, make_head, rates):
    """Along random directions of the tensors that the loss is smooth in: all but the ternary matrices."""
    model, (ids, targets, weights) = make_model(config, make_head), batch()
    model.use_activations("float")

    def loss():
        model.sync_weights()
        out, _, _ = model.loss_and_grad(ids, targets, weights, accumulate=False, dropout=dropout(**rates))
        return float(out.astype(np.float64) @ weights[weights > 0])

    loss()
    gradients = gradients_of(model)
    rng, step = np.random.default_rng(3), 2e-3
    names = [EMBEDDING, "final_norm.weight", *(name for name in gradients if name.startswith("ngram_copy."))]
    names += [name for name in gradients if ".mixer." in name and gradients[name].ndim == 3]
    for name in names:
        if not gradients[name].any():
            continue
        value, before = model.parameters[name], model.parameters[name].copy()
        direction = rng.standard_normal(value.shape).astype(np.float32)
        sides = []
        for sign in (1, -1):
            value[...] = before + np.float32(sign * step) * direction
            sides.append(loss())
        value[...] = before
        slope = float((gradients[name] * direction).sum(dtype=np.float64))
        size = float(np.linalg.norm(gradients[name]))
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(slope, rel=0.02, abs=0.02 * size + 1e-4), name


@pytest.mark.parametrize(("config", "make_head"), [(CONFIG, tree_head), (ADDED, DenseHead), (MMF, DenseHead)])
def test_gains_of_one_change_nothing(config, make_head, monkeypatch):
    """The copies of the rows in use give what the whole embedding gives."""
    model, (ids, targets, weights) = make_model(config, make_head), batch()
    want_loss, _, _ = model.loss_and_grad(ids, targets, weights, accumulate=False)
    want = gradients_of(model)
    monkeypatch.setattr(Dropout, "_gains", lambda self, rows, channels, rate: np.ones((rows, channels), np.float32))
    loss, _, _ = model.loss_and_grad(ids, targets, weights, accumulate=False, dropout=dropout())
    np.testing.assert_array_equal(loss, want_loss)
    for name, value in want.items():
        np.testing.assert_allclose(model.gradients[name], value, rtol=1e-4, atol=1e-7, err_msg=name)


def test_gradients_are_added_or_take_the_place_of_what_was_there():
    model, (ids, targets, weights) = make_model(), batch()
    model.loss_and_grad(ids, targets, weights, accumulate=False, dropout=dropout())
    once = gradients_of(model)
    model.loss_and_grad(ids, targets, weights, dropout=dropout())
    for name, value in once.items():
        np.testing.assert_allclose(model.gradients[name], 2 * value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_scoring_and_decoding_have_the_same_bits_after_a_step_with_dropout():
    model, (ids, targets, weights) = make_model(), batch()
    h = model.forward(ids)
    scores = model.log_prob(h, targets.reshape(-1), copies=model.copied(ids))
    state, last = model.prefill(ids[0])
    model.loss_and_grad(ids, targets, weights, dropout=dropout())
    np.testing.assert_array_equal(model.forward(ids), h)
    np.testing.assert_array_equal(model.log_prob(h, targets.reshape(-1), copies=model.copied(ids)), scores)
    np.testing.assert_array_equal(model.prefill(ids[0])[1], last)
    np.testing.assert_array_equal(model.decode_step(state, 3), model.decode_step(model.prefill(ids[0])[0], 3))
