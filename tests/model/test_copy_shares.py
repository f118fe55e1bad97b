"""A model whose n-gram copies have shares beside the head: causal, and the same in training, scoring and decoding."""

import dataclasses

import numpy as np
import pytest
from helpers import command
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.heads import DenseHead, TreeHead
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.inference.evaluate import score, token_nll
from flashlm_numba.inference.generate import generate_ids
from flashlm_numba.kernels import reference
from flashlm_numba.kernels.ngram_copy import all_copies, copy_kinds, last_copies
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import COPY_SHARES, initial_parameters
from flashlm_numba.model.recipes import from_recipe
from flashlm_numba.training.optimizer import ADAMW_PLAIN, parameter_groups

CONFIG = ModelConfig(
    30,
    16,
    24,
    4,
    dilations=(1, 2),
    mixer_residual_scale=0.25,
    ffn_residual_scale=2**-7,
    ngram_copy_orders=(1, 2, 1),
    ngram_copy_reach=20,
    ngram_copy_output="mixture",
)
MMF = ModelConfig(
    30,
    16,
    24,
    mixer="mlgru",
    linear="bitlinear",
    n_blocks=2,
    n_passes=1,
    ngram_copy_orders=(1, 2, 1),
    ngram_copy_reach=20,
    ngram_copy_output="mixture",
)


def make_model(head="dense", config=CONFIG, seed=0):
    parameters = initial_parameters(config, seed, embedding_std=0.5)
    rng = np.random.default_rng(seed)
    for name, value in parameters.items():
        if name.startswith("ngram_copy."):
            value += rng.standard_normal(value.shape).astype(np.float32)
    counts = rng.integers(0, 50, config.vocab_size)
    tree = build_tree("adaptive", counts)
    return Model(config, parameters, DenseHead if head == "dense" else lambda w, dw: TreeHead(tree, w, dw))


def text(seed, length, tokens=5):
    """Few different tokens, so that much is copied."""
    return np.random.default_rng(seed).integers(0, tokens, length).astype(np.int32)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 3),
    st.integers(0, 60),
    st.sampled_from([1, 2, 3, 30]),
    st.lists(st.integers(1, 4), max_size=5),
    st.sampled_from([1, 2, 7, 90]),
)
def test_one_search_finds_what_one_for_each_order_finds(seed, batch, time, tokens, orders, reach):
    rows = np.random.default_rng(seed).integers(0, tokens, (batch, time)).astype(np.int32)
    found = all_copies(rows, orders, reach)
    assert found.shape == (batch, time, len(orders))
    for o, (order, skip) in enumerate(copy_kinds(orders)):
        np.testing.assert_array_equal(found[:, :, o], reference.ngram_copies(rows, order, reach, skip))
    for b in range(batch):
        for t in range(0, time, 7):
            np.testing.assert_array_equal(last_copies(rows[b, : t + 1], orders, reach), found[b, t])


def test_wrong_orders_and_no_text_are_refused():
    with pytest.raises(ValueError, match=r"orders and reach must be at least 1, got \[0\] and 4"):
        all_copies(np.zeros((1, 3), np.int32), [0], 4)
    with pytest.raises(ValueError, match="rows must hold a token"):
        last_copies(np.zeros(0, np.int32), [1], 4)


@pytest.mark.parametrize("head", ["dense", "tree"])
@pytest.mark.parametrize("config", [CONFIG, MMF], ids=["conv", "mlgru"])
def test_a_later_token_changes_no_earlier_probability(head, config):
    model, ids = make_model(head, config), text(1, 60)[None]
    targets = text(2, 60)

    def found(ids):
        return model.log_prob(model.forward(ids), targets, model.copied(ids))

    before = found(ids)
    for at in (1, 17, 40, 59):
        changed = ids.copy()
        changed[0, at:] = text(at, 60 - at, 30)
        np.testing.assert_array_equal(found(changed)[:at], before[:at])


@pytest.mark.parametrize("head", ["dense", "tree"])
@pytest.mark.parametrize("config", [CONFIG, MMF], ids=["conv", "mlgru"])
def test_decoding_predicts_what_the_whole_pass_predicts(head, config):
    model, ids = make_model(head, config), text(3, 90)
    logits = model.logits(ids[None])[0]
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    assert np.abs(p - model.head.distribution(model.forward(ids[None]))).max() > 0.1  # the copies matter
    state, h = model.prefill(ids[:50])
    for t in range(49, 89):
        after = model.head_after(ids[: t + 1])
        np.testing.assert_allclose(after.distribution(h)[0], p[t], atol=1e-5)
        only = ids[max(0, t + 1 - model.remembered) : t + 1]
        np.testing.assert_array_equal(model.head_after(only).distribution(h), after.distribution(h))
        h = model.decode_step(state, int(ids[t + 1]))


@pytest.mark.parametrize("head", ["dense", "tree"])
def test_generated_tokens_follow_the_mixture(head):
    """Copies of a share near one are what is generated."""
    model = make_model(head)
    model.parameters[f"{COPY_SHARES}hidden"][...] = 0
    model.parameters[f"{COPY_SHARES}match"][...] = 0
    model.parameters[f"{COPY_SHARES}bias"][...] = [-30, 30, -30]
    context = [7, 8, 9, 7, 8]
    for options in ({}, {"temperature": 0.0}, {"top_k": 3}, {"temperature": 0.5}):
        tokens = generate_ids(model, context, rng=np.random.default_rng(0), **options)
        assert [token for token, _ in zip(tokens, range(6), strict=False)] == [9, 7, 8, 9, 7, 8]


@pytest.mark.parametrize("config", [CONFIG, MMF], ids=["conv", "mlgru"])
def test_a_score_depends_on_neither_window_nor_batch(config):
    model, documents = make_model("tree", config), [text(seed, 3 + 150 * seed) for seed in range(4)]
    nll = sum(token_nll(model, document, eot=29).sum() for document in documents)
    field = model.config.receptive_field or 40
    for window, batch in ((field, 1), (2 * field + 3, 200), (1024, 4096)):
        found = score(model, documents, eot=29, window=window, batch=batch)
        np.testing.assert_allclose(found.nll, nll, rtol=1e-6)
    found = score(model, documents, eot=29, smoothed=True)
    ids = np.concatenate([[29], documents[2][:-1]]).astype(np.int32)[None]
    spread = sum(
        -model.logits(np.concatenate([[29], document[:-1]]).astype(np.int32)[None])[0].mean(1).sum(dtype=np.float64)
        for document in documents
    )
    np.testing.assert_allclose(found.spread, spread, rtol=1e-4)
    assert model.copied(ids).max() >= 0


def test_gradients_of_two_batches_are_added():
    model, ids = make_model("tree"), text(1, 40).reshape(2, 20)
    targets, weights = text(2, 40).reshape(2, 20), np.full(40, 1 / 40, np.float32)
    model.loss_and_grad(ids, targets, weights, accumulate=False)
    once = {name: gradient.copy() for name, gradient in model.gradients.items()}
    model.loss_and_grad(ids, targets, weights)
    for name, gradient in model.gradients.items():
        np.testing.assert_allclose(gradient, 2 * once[name], atol=1e-5, err_msg=name)
        assert name.startswith("router") or once[name].any(), name


def test_names_shapes_and_groups_of_the_parameters():
    model = make_model()
    names = [name for name in model.parameters if name.startswith("ngram_copy.")]
    assert names == [
        *(f"ngram_copy.inputs.{o}.weight" for o in range(3)),
        *(COPY_SHARES + name for name in ("bias", "hidden", "match")),
    ]
    assert set(names) <= set(parameter_groups(model.parameters)[ADAMW_PLAIN])
    assert initial_parameters(CONFIG, 0)[f"{COPY_SHARES}bias"].tolist() == [-4, -4, -4]
    none = dataclasses.replace(CONFIG, ngram_copy_orders=())
    assert make_model(config=none).copied(text(0, 5)[None]) is None


def test_recipes_that_have_it():
    assert from_recipe("default").model.copy_shares
    assert not from_recipe("v3").model.copy_shares
    assert ModelConfig().ngram_copy_output == "add"  # of runs that do not name it


def test_a_run_is_trained_resumed_scored_exported_and_continued(tmp_path):
    """The default recipe, which has the shares, through the commands."""
    source = tmp_path / "text.txt"
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]
    source.write_text("\n".join(" ".join(rng.choice(words, 12)) for _ in range(400)))
    settings = ("dim=16", "ffn_dim=24", "groups=4", "dilations=1,2", "phases=2x32", "embedding_init=random")
    more = ("warmup_steps=2", "validate_every=0", "sample_tokens=3", "checkpoint_every=4", "validation_tokens=60")
    options = [part for setting in settings + more for part in ("--set", setting)]
    tokens, whole, parts = tmp_path / "tokens", tmp_path / "whole", tmp_path / "parts"
    assert command("prepare", source, "--out", tokens, "--vocab", "bytes").exit_code == 0
    train = "train", tokens, "--head", "tree", "--threads", 1, *options
    assert command(*train, "--steps", 8, "--out", whole).exit_code == 0
    assert command(*train, "--steps", 8, "--out", parts).exit_code == 0
    done = command("train", "--resume", parts, "--checkpoint", "step-4", "--steps", 8)
    assert done.exit_code == 0, done.output
    file = tmp_path / "model.safetensors"
    assert command("export", whole, file, "--rows", "float").exit_code == 0
    results = [command("eval", of, *where, "--json").output for of, *where in ((whole,), (parts,), (file, tokens))]
    found = [float(result.split('"nll": ')[1].split(",")[0]) for result in results]
    assert found[0] == found[1] == found[2]
    made = command("generate", file, "--prompt", "alpha beta alpha", "--max-tokens", 5, "--seed", 1)
    assert made.exit_code == 0, made.output
    assert (
        made.output == command("generate", whole, "--prompt", "alpha beta alpha", "--max-tokens", 5, "--seed", 1).output
    )
    assert "ngram_copy" in command("info", whole).output
