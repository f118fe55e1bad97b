"""The whole model without torch: counts, causality, and what the parts have to agree on."""

import dataclasses
import weakref

import numba
import numpy as np
import pytest

from flashlm_numba.heads import DenseHead, SampledHead, TreeHead
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.kernels import ternary
from flashlm_numba.model import trunks
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters, parameter_shapes

SMALL = ModelConfig(
    97, 24, 37, 3, kernel_size=4, dilations=(1, 2, 8), n_passes=2, mixer_residual_scale=0.25, ffn_residual_scale=2**-7
)


def small_model(seed=0, config=SMALL, std=0.5):
    parameters = initial_parameters(config, seed, embedding_std=std)
    return Model(config, parameters, DenseHead)


def batch(seed, rows, length, vocab=SMALL.vocab_size):
    ids = np.random.default_rng(seed).integers(0, vocab, (rows, length + 1)).astype(np.int32)
    return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])


def test_v3_has_the_published_number_of_parameters():
    shapes = parameter_shapes(ModelConfig())
    size = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    assert sum(size.values()) == 13_555_969
    assert size["embedding.weight"] == 12_865_792
    outside = size["embedding.weight"] + size["final_norm.weight"]
    assert sum(size.values()) - outside == 689_921
    assert sum(n for name, n in size.items() if name.startswith("blocks.0.glu.")) == 524_544
    norms = sum(n for name, n in size.items() if name.startswith("blocks.0.mixer.norms."))
    assert sum(n for name, n in size.items() if name.startswith("blocks.0.mixer.")) == 164_608
    assert norms == 3 * 256
    assert ModelConfig().receptive_field == 415


@pytest.mark.parametrize(("decay", "orders"), [(0.0, ()), (0.9, ()), (0.9, (1, 2))])
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_hidden_states_see_nothing_of_the_future(length, activations, decay, orders):
    model = small_model(config=dataclasses.replace(SMALL, leaky_decay=decay, ngram_copy_orders=orders))
    for name, value in model.parameters.items():
        if name.startswith(("blocks.0.mixer.leaky", "ngram_copy.")):
            value[:] = 1
    model.use_activations(activations)
    ids, _ = batch(1, 3, length, vocab=4 if orders else SMALL.vocab_size)
    before = model.forward(ids).copy().reshape(3, length, -1)
    # everywhere, since a look-up that reads ahead does so only where tokens repeat
    for at in range(0, length, 7 if numba.config.DISABLE_JIT else 1):
        changed = ids.copy()
        changed[1, at] = (changed[1, at] + 1) % SMALL.vocab_size
        after = model.forward(changed).reshape(3, length, -1)
        np.testing.assert_array_equal(before[1, :at], after[1, :at])
        np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
        assert (before[1, at] != after[1, at]).any()


def test_dense_nll_before_a_changed_token_stays_bit_for_bit():
    model = small_model()
    ids, targets = batch(2, 2, 30)
    before = model.head.log_prob(model.forward(ids), targets.reshape(-1)).reshape(2, 30)
    ids[0, 17] = (ids[0, 17] + 1) % SMALL.vocab_size
    after = model.head.log_prob(model.forward(ids), targets.reshape(-1)).reshape(2, 30)
    np.testing.assert_array_equal(before[0, :17], after[0, :17])
    np.testing.assert_array_equal(before[1], after[1])


@pytest.mark.parametrize("shape", ["adaptive", "huffman"])
def test_tree_nll_before_a_changed_token_stays_to_rounding(shape):
    tree = build_tree(shape, np.arange(SMALL.vocab_size) % 7)
    parameters = initial_parameters(SMALL, 0, embedding_std=0.5)
    model = Model(SMALL, parameters, lambda weight, dweight: TreeHead(tree, weight, dweight))
    ids, targets = batch(2, 2, 30)
    before = model.head.log_prob(model.forward(ids), targets.reshape(-1)).reshape(2, 30)
    ids[0, 17] = (ids[0, 17] + 1) % SMALL.vocab_size
    after = model.head.log_prob(model.forward(ids), targets.reshape(-1)).reshape(2, 30)
    # the nodes' products change shape with the positions in them, so not bit for bit
    np.testing.assert_allclose(before[0, :17], after[0, :17], rtol=0, atol=1e-5)
    np.testing.assert_allclose(before[1], after[1], rtol=0, atol=1e-5)
    assert np.abs(before[0, 17:] - after[0, 17:]).max() > 1e-3


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_prepare_follows_the_weights(activations):
    """As after an optimiser's step: nothing packed from the old weights is left."""
    config = dataclasses.replace(SMALL, activations=activations)
    model, other = small_model(0, config), small_model(1, config)
    ids, targets = batch(7, 2, 20)
    weights = np.full(40, 1 / 40, np.float32)
    model.loss_and_grad(ids, targets, weights)
    for name, value in other.parameters.items():
        model.parameters[name][...] = value
    model.sync_weights()
    results = [m.loss_and_grad(ids, targets, weights, accumulate=False)[0] for m in (model, other)]
    np.testing.assert_array_equal(*results)
    for name, value in other.gradients.items():
        np.testing.assert_array_equal(model.gradients[name], value, err_msg=name)


def test_a_backward_pass_does_not_follow_a_forward_pass_of_the_other_kind():
    model = small_model()
    model.forward(batch(1, 1, 5)[0])
    model.use_activations("int8")
    with pytest.raises(ValueError, match="call forward first"):
        model.backward(np.zeros((5, SMALL.dim), np.float32))


def test_a_token_outside_the_receptive_field_has_no_influence():
    model = small_model()
    field = SMALL.receptive_field
    ids, _ = batch(3, 1, field + 1)
    before = model.forward(ids)[-1].copy()
    ids[0, 0] = (ids[0, 0] + 1) % SMALL.vocab_size
    np.testing.assert_array_equal(before, model.forward(ids)[-1])
    ids[0, 1] = (ids[0, 1] + 1) % SMALL.vocab_size
    assert (before != model.forward(ids)[-1]).any()


def test_blocks_have_weights_of_their_own_and_are_gone_through_in_order():
    """Two blocks with the same weights are one block with twice the passes, forward and backward."""
    one = small_model(config=dataclasses.replace(SMALL, n_passes=4))
    two = small_model(config=dataclasses.replace(SMALL, n_blocks=2, n_passes=2))
    for name, value in two.parameters.items():
        value[...] = one.parameters[name.replace("blocks.1.", "blocks.0.")]
    ids, targets = batch(7, 2, 30)
    weights = np.full(60, 1 / 60, np.float32)
    for model in (one, two):
        model.sync_weights()
        model.loss_and_grad(ids, targets, weights, accumulate=False)
    np.testing.assert_array_equal(one.forward(ids), two.forward(ids))
    for name, value in one.gradients.items():
        other = two.gradients[name] + (two.gradients[name.replace("blocks.0.", "blocks.1.")] if "blocks" in name else 0)
        np.testing.assert_allclose(other, value, atol=1e-6 + 1e-5 * np.abs(value).max(), err_msg=name)
    two.parameters["blocks.1.glu.up.weight"][...] *= -1
    two.sync_weights()
    assert not np.array_equal(one.forward(ids), two.forward(ids))


def test_a_leaky_average_fades_within_the_receptive_field():
    model = small_model(config=dataclasses.replace(SMALL, leaky_decay=0.5))
    model.parameters["blocks.0.mixer.leaky.weight"][:] = 1
    model.sync_weights()
    field = model.config.receptive_field
    assert field == SMALL.receptive_field + 2 * 24  # 0.5**24 = 2**-24
    ids, _ = batch(3, 1, field + 1)
    before = model.forward(ids)[-1].copy()
    ids[0, 0] = (ids[0, 0] + 1) % SMALL.vocab_size
    np.testing.assert_allclose(model.forward(ids)[-1], before, rtol=0, atol=1e-5)
    ids[0, -SMALL.receptive_field - 1] = (ids[0, -SMALL.receptive_field - 1] + 1) % SMALL.vocab_size
    assert (model.forward(ids)[-1] != before).any()


def test_a_follower_is_looked_up_within_the_receptive_field():
    config = dataclasses.replace(SMALL, ngram_copy_orders=(2,), ngram_copy_reach=9)
    model = small_model(config=config)
    field = config.receptive_field
    assert field == SMALL.receptive_field + 9 + 1
    rng = np.random.default_rng(4)
    for name, value in model.parameters.items():
        if name.startswith("ngram_copy."):
            value[:] = rng.standard_normal(value.shape)
    model.sync_weights()
    ids = np.arange(field + 1, dtype=np.int32)[None] % 90
    # the first token that the last hidden state reads is looked up: the pair that ends there was there 9 tokens before
    at = 1 + 10
    ids[0, at - 1 : at + 1] = ids[0, at - 10 : at - 8]
    before = model.forward(ids)[-1].copy()
    changed = ids.copy()
    changed[0, 0] = 91
    np.testing.assert_array_equal(model.forward(changed)[-1], before)
    changed[0, 0], changed[0, 1] = ids[0, 0], 91  # the pair differs now
    assert (model.forward(changed)[-1] != before).any()


def test_buffers_of_another_shape_are_freed_before_new_ones_are_made(monkeypatch):
    net = small_model()
    net.forward(batch(1, 2, 8)[0])
    old, alive = weakref.ref(net._buffers.free[0]), []

    class Watched(trunks.TrunkBuffers):
        def __init__(self, *args):
            alive.append(old())
            super().__init__(*args)

    monkeypatch.setattr(trunks, "TrunkBuffers", Watched)
    net.forward(batch(1, 2, 8)[0])
    assert not alive  # the same shape: the same buffers
    net.forward(batch(1, 1, 9)[0])
    assert alive == [None]


def test_weights_of_zero_leave_positions_out():
    model = small_model()
    ids, targets = batch(4, 2, 9)
    weights = np.zeros(18, np.float32)
    weights[[3, 11]] = 0.5
    loss, nll, _ = model.loss_and_grad(ids, targets, weights)
    kept = {name: value.copy() for name, value in model.gradients.items()}
    model.zero_grad()
    h = model.forward(ids)
    all_loss, _, dh = model.head.forward_backward(h, targets.reshape(-1), weights)
    model.backward(dh)
    np.testing.assert_allclose(loss, all_loss[[3, 11]], rtol=1e-5)
    assert nll.shape == (2,)
    for name, value in kept.items():
        np.testing.assert_allclose(model.gradients[name], value, rtol=1e-3, atol=1e-6, err_msg=name)


def test_gradients_add_up_over_micro_batches():
    model = small_model()
    ids, targets = batch(5, 4, 11)
    weights = np.full(44, 1 / 44, np.float32)
    model.loss_and_grad(ids, targets, weights)
    whole = {name: value.copy() for name, value in model.gradients.items()}
    model.zero_grad()
    assert not any(value.any() for value in model.gradients.values())
    for half in (slice(0, 2), slice(2, 4)):
        model.loss_and_grad(ids[half], np.ascontiguousarray(targets[half]), weights[:22])
    for name, value in whole.items():
        np.testing.assert_allclose(model.gradients[name], value, rtol=1e-3, atol=1e-6, err_msg=name)


def tree_head(weight, dweight):
    return TreeHead(build_tree("two-level", np.arange(SMALL.vocab_size)), weight, dweight)


def sampled_head(weight, dweight):
    return SampledHead(weight, dweight, counts=np.arange(SMALL.vocab_size), candidates=20)


@pytest.mark.parametrize("make_head", [DenseHead, tree_head, sampled_head])
def test_the_first_micro_batch_can_take_the_place_of_what_was_there(make_head):
    model = Model(SMALL, initial_parameters(SMALL, 0), make_head)
    ids, targets = batch(5, 4, 11)
    for weights in (np.full(44, 1 / 44, np.float32), np.zeros(44, np.float32)):  # the second: no position counts
        model.zero_grad()
        model.loss_and_grad(ids, targets, weights)
        want = {name: value.copy() for name, value in model.gradients.items()}
        for value in model.gradients.values():
            value[...] = np.nan
        model.loss_and_grad(ids, targets, weights, accumulate=False)
        for name, value in want.items():
            np.testing.assert_allclose(model.gradients[name], value, rtol=1e-4, atol=1e-7, err_msg=name)


def test_the_same_step_gives_the_same_bits():
    first, second = small_model(), small_model()
    ids, targets = batch(6, 3, 20)
    weights = np.full(60, 1 / 60, np.float32)
    results = [model.loss_and_grad(ids, targets, weights)[0] for model in (first, second)]
    np.testing.assert_array_equal(*results)
    for name in first.gradients:
        np.testing.assert_array_equal(first.gradients[name], second.gradients[name], err_msg=name)


def test_packed_weights_are_the_ones_training_evaluates():
    model = small_model()
    for name in (
        "blocks.0.mixer.out.weight",
        "blocks.0.glu.gate.weight",
        "blocks.0.glu.up.weight",
        "blocks.0.glu.down.weight",
    ):
        weight = model.parameters[name]
        packed = ternary.pack_ternary(ternary.ternarize(weight))
        used = {
            "blocks.0.mixer.out.weight": model._weights.mixer.matrices["out.weight"].values[0],
            "blocks.0.glu.gate.weight": model._weights.gate[0],
            "blocks.0.glu.up.weight": model._weights.up[0],
            "blocks.0.glu.down.weight": model._weights.down_values[0],
        }[name]
        np.testing.assert_array_equal(ternary.unpack_ternary(packed, weight.shape[1]), used)


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"ids must be in \[0, 97\), got 97 at index 2; the data use another"):
        small_model().forward(np.array([[0, 1, 97]], np.int32))


def test_empty_batch_gives_no_hidden_states():
    assert small_model().forward(np.zeros((0, 5), np.int32)).shape == (0, 24)


def test_weights_of_another_size_are_refused():
    ids, targets = batch(7, 2, 10)
    with pytest.raises(ValueError, match=r"weights must have shape \(20\), got \(7,\)"):
        small_model().loss_and_grad(ids, targets, np.ones(7, np.float32))


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="plain Python has one thread")
def test_a_thread_with_several_tiles_loses_no_gradient():
    """16 x 128 tokens are two tiles a thread: the same gradients as sequence by sequence."""
    model = small_model()
    ids, targets = batch(8, 16, 128)
    weights = np.full(ids.size, 1 / ids.size, np.float32)
    model.loss_and_grad(ids, targets, weights)
    whole = {name: value.copy() for name, value in model.gradients.items()}
    model.zero_grad()
    for row in range(16):
        model.loss_and_grad(ids[row : row + 1], targets[row : row + 1], weights[:128])
    for name, value in whole.items():
        scale = np.abs(value).max() or 1.0
        assert np.abs(model.gradients[name] - value).max() <= 1e-4 * scale, name


def test_initial_parameters_have_the_recipes_spread():
    config = ModelConfig(vocab_size=500)
    parameters = initial_parameters(config, 3)
    expected = {
        "blocks.0.mixer.out.weight": 0.01,
        "blocks.0.glu.down.weight": 0.01,
        "blocks.0.glu.gate.weight": 256**-0.5,
        "blocks.0.glu.up.weight": 256**-0.5,
    }
    expected |= {
        "embedding.weight": 0.02,
        "blocks.0.mixer.gates.0.weight": 64**-0.5,
        "blocks.0.mixer.values.2.weight": 64**-0.5,
    }
    for name, std in expected.items():
        assert parameters[name].std() == pytest.approx(std, rel=0.03), name
