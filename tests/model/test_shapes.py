"""Named shapes: the numbers they promise, what overrides what, and widths that are multiples of nothing."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import some_counts

from flashlm_numba.data.vocabularies import vocabulary_named
from flashlm_numba.heads import HEADS, head_class
from flashlm_numba.heads.config import HeadConfig
from flashlm_numba.model import sizes
from flashlm_numba.model.build import model_from
from flashlm_numba.model.config import ModelConfig, RunConfig
from flashlm_numba.model.parameters import initial_parameters, parameter_shapes
from flashlm_numba.model.recipes import RECIPES, from_recipe
from flashlm_numba.model.shapes import BUDGETS, SHAPES
from flashlm_numba.system.errors import UserError

TOKEN_BYTES = 8  # mean length of a token; of the built-in text's 8,192 tokens it is below 7


def new_model(config, head="dense", seed=0):
    """A model with random weights, and a head for counts of no text."""
    counts = some_counts(seed, config.vocab_size)
    run = RunConfig(model=config, head=HeadConfig(name=head, num_sampled=50))
    rows = np.random.default_rng(seed).standard_normal((config.vocab_size, config.dim), np.float32)
    constants = head_class(head).constants_from_data(run.head, counts, rows)
    return model_from(run, initial_parameters(config, seed) | constants, counts)


def test_v3_is_exact():
    assert SHAPES["v3"] == RECIPES["v3"].model == ModelConfig()
    parts = sizes.parameters_by_part(parameter_shapes(SHAPES["v3"]))
    assert parts == {"embedding": 12_865_792, "norms": 768, "mixer": 164_608, "glu": 524_544, "router": 257}
    assert sum(parts.values()) == 13_555_969


def test_recipe_then_shape_then_settings():
    run = from_recipe("v3", ["ffn_dim=77"], "nano")
    assert run.model == replace(SHAPES["nano"], ffn_dim=77)
    assert run.optimizer == RECIPES["v3"].optimizer
    assert from_recipe("default").model == SHAPES["default"]
    with pytest.raises(UserError, match="There is no model 'pico'; the models are v3, default, nano, micro, mini"):
        from_recipe("default", shape="pico")


@pytest.mark.parametrize("head", ["dense", "tree"])
@pytest.mark.parametrize("name", BUDGETS)
def test_a_small_shape_keeps_its_budget(name, head):
    budget = BUDGETS[name]
    model = new_model(replace(SHAPES[name], vocab_size=budget.vocab_size), head)
    shapes = {name: value.shape for name, value in model.parameters.items()}
    constants = sum(value.nbytes for value in model.head.constants().values())
    tables = sizes.tokenizer_bytes([b"x" * TOKEN_BYTES] * budget.vocab_size)
    ternary = [name for name in shapes if name.endswith(("gate.weight", "up.weight", "down.weight", "out.weight"))]
    weights = sizes.packed_bytes(shapes, ternary) + constants
    if (name, head) != ("nano", "tree"):  # a vocabulary of 1,024 tokens has the dense head
        assert weights + tables <= budget.weights
    if budget.state is not None:
        assert sizes.state_bytes(model.config) <= budget.state


def test_the_sizes_of_info_are_those_of_the_arrays():
    model = new_model(replace(SHAPES["nano"], vocab_size=1_000), "tree")
    found = sizes.device_bytes(model, vocabulary_named("gpt2"))
    plain = sum(value.nbytes for name, value in model.parameters.items() if name.startswith("head."))
    plain += sum(value.nbytes for value in model.head.constants().values())
    rows = 1_000 * (96 + 2)
    ternary = (96 * 96 + 3 * 96 * 256) // 4
    convolutions, norms = 4 * 3 * 2 * 96 * 8 * 4, 4 * (3 + 3 + 1) * 96  # of the block, of the mixer, the leaky average
    copies = 4 * 6 * (96 + 96 + 2)  # gains at the input, and what shares are computed with
    assert found["packed"] == plain + rows + ternary + convolutions + norms + copies
    rings = 2 * sum((3 * dilation + 1) * (96 + 4) for dilation in (1, 4, 12))
    assert found["decoding_state_int8"] > rings + 2 * 4 * 96 + 2 * 1_027 + 4 * 1_000


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("vocab", [2, 3, 257, 1_000, 2_500])
def test_every_head_works_at_every_vocabulary(head, vocab):
    config = ModelConfig(vocab_size=vocab, dim=24, ffn_dim=40, groups=4, dilations=(1, 2))
    model = new_model(config, head)
    ids = np.random.default_rng(1).integers(0, vocab, (2, 12)).astype(np.int32)
    model.head.begin(np.random.default_rng(0), full=False)
    weights = np.full(24, 1 / 24, np.float32)
    loss, _, _ = model.loss_and_grad(ids, ids, weights, accumulate=False)
    assert np.isfinite(loss).all()
    h = model.forward(ids)
    p = model.head.distribution(h)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    targets = ids.reshape(-1)
    np.testing.assert_allclose(model.head.log_prob(h, targets), np.log(p[np.arange(24), targets]), atol=1e-4)
    assert 0 <= int(model.head.sample(h, np.random.default_rng(0)).min()) < vocab


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize(
    ("dim", "ffn_dim", "groups", "blocks", "passes"), [(50, 134, 2, 2, 1), (7, 5, 1, 3, 2), (1, 1, 1, 2, 2)]
)
def test_widths_that_are_multiples_of_nothing(dim, ffn_dim, groups, blocks, passes, activations):
    config = replace(
        SHAPES["nano"],
        vocab_size=60,
        dim=dim,
        ffn_dim=ffn_dim,
        groups=groups,
        n_blocks=blocks,
        n_passes=passes,
        activations=activations,
        ffn_residual_scale=0.1,
    )
    model = new_model(config)
    rng = np.random.default_rng(3)
    for name, value in model.parameters.items():
        if name.startswith(("ngram_copy", "blocks")) and ("leaky" in name or "ngram" in name):
            value[...] = rng.standard_normal(value.shape) * 0.3
    model.sync_weights()
    ids = rng.integers(0, 9, (1, 40)).astype(np.int32)
    weights = np.full(40, 1 / 40, np.float32)
    loss, _, _ = model.loss_and_grad(ids, ids, weights, accumulate=False)
    assert np.isfinite(loss).all()
    assert all(np.isfinite(gradient).all() for gradient in model.gradients.values())
    h = model.forward(ids)
    state, last = model.prefill(ids[0, :20])
    steps = [last[0]] + [model.decode_step(state, int(token))[0].copy() for token in ids[0, 20:]]
    # a rounded activation can differ by one step of 1 / 127 between the two paths
    np.testing.assert_allclose(steps, h[19:], atol=2e-4 if activations == "float" else 0.2)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("n_blocks=0", "model.n_blocks must be at least 1, got 0."),
        ("n_passes=0", "model.n_passes must be at least 1, got 0."),
        ("dim=100", "model.groups must divide model.dim, got 16 and 100."),
        ("mixer=mamba", "model.mixer must be one of conv, mlgru, got 'mamba'."),
    ],
)
def test_impossible_shapes_are_one_sentence(setting, sentence):
    with pytest.raises(UserError) as error:
        from_recipe("default", [setting], "default")
    assert str(error.value) == sentence
