"""One step: what counts in its loss, and what it leaves alone."""

from dataclasses import replace

import numpy as np
import pytest
from run_helpers import make_session, start
from safetensors.numpy import load_file

from flashlm_numba.data.shards import sample_batch
from flashlm_numba.model.config import Phase
from flashlm_numba.model.recipes import RECIPES
from flashlm_numba.model.settings import with_settings
from flashlm_numba.training.run import rehearse
from flashlm_numba.training.schedule import dropout_share
from flashlm_numba.training.step import loss_weights, train_step


def test_zero_learning_rate_changes_no_parameter(tiny_run, corpus, tmp_path):
    session = make_session(with_settings(tiny_run, ["head.name=dense", "weight_decay=0.5"]), corpus, tmp_path)
    before = {name: value.copy() for name, value in session.model.parameters.items()}
    train_step(session, Phase(None, 2, 8, 2), 1, lr=0.0)
    assert all(np.array_equal(before[name], value) for name, value in session.model.parameters.items())


def test_a_rehearsal_leaves_no_trace(tiny_run, corpus, tmp_path):
    session = make_session(with_settings(tiny_run, ["head.name=dense", "weight_decay=0.5"]), corpus, tmp_path)
    before = {name: value.copy() for name, value in session.model.parameters.items()}
    rehearse(session, None, began=0.0)
    assert all(np.array_equal(before[name], value) for name, value in session.model.parameters.items())
    assert not session.optimizer.state_dict()
    assert (session.clock.step, session.clock.tokens) == (0, 0)


def test_micro_batches_and_a_share_of_positions_average_the_positions_kept(tiny_run, corpus, tmp_path):
    """The step's gradient is that of the mean loss over all positions kept, computed here in one batch."""
    settings = ["head.name=dense", "loss_fraction=0.5", "activations=float", "hidden_dropout=0", "embedding_dropout=0"]
    session = make_session(with_settings(tiny_run, settings), corpus, tmp_path)
    model, phase = session.model, Phase(None, 2, 8, 3)
    done = train_step(session, phase, 5, lr=0.0)
    got = {name: value.copy() for name, value in model.gradients.items()}
    batches = [sample_batch(session.data.train, 42, 5, micro, 2, 8) for micro in range(3)]
    ids, targets = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    weights = np.concatenate([loss_weights(42, 5, micro, 16, 0.5, 3) for micro in range(3)])
    assert np.count_nonzero(weights) == 24
    assert weights.sum() == pytest.approx(1)
    assert not np.array_equal(weights[:16], weights[16:32])
    model.zero_grad()
    loss, nll, _ = model.loss_and_grad(ids, targets, weights)
    assert done.loss == pytest.approx(float(loss.mean()), rel=1e-6)
    assert done.nll == pytest.approx(float(nll.mean()), rel=1e-6)
    for name, value in model.gradients.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("given", "moves"), [(True, False), (False, True)])
def test_frozen_phase_holds_the_embedding_only_if_its_rows_were_given(
    tiny_run, corpus, tmp_path, monkeypatch, given, moves
):
    rows = np.random.default_rng(0).standard_normal((50_257, 16), np.float32)
    monkeypatch.setattr("flashlm_numba.model.pretrained.from_gpt2", lambda *arguments: (rows, 0.7))
    (tmp_path / "some.safetensors").touch()
    init = f"embedding_init={tmp_path / 'some.safetensors'}" if given else "embedding_init=random"
    run = with_settings(tiny_run, ["head.name=dense", init, "checkpoint_every=1"])
    phases = Phase(3, 2, 8, frozen=True), Phase(None, 2, 16)  # which a recipe may have without rows, but --set may not
    run = replace(run, training=replace(run.training, phases=phases))
    start(run, corpus, tmp_path / "run", steps=4)
    tables = [
        load_file(tmp_path / "run" / "checkpoints" / f"step-{step}" / "model.safetensors")["embedding.weight"]
        for step in (2, 3, 4)
    ]
    assert np.array_equal(tables[0], tables[1]) != moves
    assert not np.array_equal(tables[1], tables[2])
    if given:
        assert np.array_equal(tables[1], rows)


def test_dropout_grows_during_the_first_pass_of_a_small_text(tiny_run, corpus, tmp_path):
    """It is drawn from seed, step and micro-batch, and every micro-batch has its own."""
    phase = Phase(None, 2, 8, 2)
    settings = ["head.name=dense", "phases=2x8x2", "hidden_dropout=0.3", "embedding_dropout=0.4"]
    session = make_session(with_settings(tiny_run, settings), corpus, tmp_path)
    given, masks = [], []
    real = session.model.loss_and_grad

    def spy(*arguments, dropout, **options):
        given.append((dropout.hidden, dropout.embedding))
        masks.append(dropout.hidden_gains(2, 50))
        return real(*arguments, dropout=dropout, **options)

    session.model.loss_and_grad = spy
    text = session.data.train.n_tokens
    once, parameters = -(-text // phase.tokens), sum(value.size for value in session.model.parameters.values())
    assert text < parameters
    for step in (1, once // 2 + 1, 3 * once, 3 * once, 3 * once + 1):
        train_step(session, phase, step, lr=0.0)
    full = 1 - text / parameters
    assert given[:2] == [(0, 0)] * 2
    assert given[2] == pytest.approx((0.15 * full, 0.2 * full), rel=0.05)
    for rates in given[4:]:
        assert rates == pytest.approx((0.3 * full, 0.4 * full))
    assert masks[0] is None
    np.testing.assert_array_equal(masks[4], masks[6])
    np.testing.assert_array_equal(masks[5], masks[7])
    assert len({mask.tobytes() for mask in masks[4:]}) == 4


def test_a_large_text_gets_no_dropout():
    assert dropout_share(10**9, 38_000_000, 13_639_085) == 0


def test_only_the_default_recipe_has_dropout():
    rates = {name: (run.training.hidden_dropout, run.training.embedding_dropout) for name, run in RECIPES.items()}
    assert {name for name, rate in rates.items() if any(rate)} == {"default"}
