"""Numbers stay sound: along two thousand steps, and between ways to compute the same NLL that share nothing."""

import dataclasses

import numpy as np
import pytest
from helpers import assert_as_accurate, command, numeric_gradient

from flashlm_numba.data.shards import open_tokens
from flashlm_numba.heads import DenseHead, TreeHead
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.inference.evaluate import score
from flashlm_numba.kernels import reference, reference_tree
from flashlm_numba.kernels.reference_trunk import is_ternary, trunk_backward, trunk_forward
from flashlm_numba.model import build as assemble
from flashlm_numba.model.config import ModelConfig, OptimizerConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import COPY_SHARES, initial_parameters
from flashlm_numba.training.optimizer import Optimizer

SHAPE = ModelConfig(vocab_size=61, dim=16, ffn_dim=24, groups=4, dilations=(1, 3), n_passes=2, leaky_decay=0.8)
SHAPE = dataclasses.replace(SHAPE, ternary_threshold=0.5, ngram_copy_orders=(1, 2, 1), ngram_copy_reach=15)
STEPS, EVERY = 2_000, 50
MOST = 32  # times what plain float32 NumPy errs, in any one step; NumPy is lucky in some


def layout(config):
    return {
        "groups": config.groups,
        "dilations": config.dilations,
        "n_passes": config.n_passes,
        "mixer_residual_scale": config.mixer_residual_scale,
        "ffn_residual_scale": config.ffn_residual_scale,
        "leaky_decay": config.leaky_decay,
        "ternary_threshold": config.ternary_threshold,
        "ngram_copy_orders": config.ngram_copy_orders,
        "ngram_copy_reach": config.ngram_copy_reach,
    }


def recompute(model, ids, targets, weights, dtype):
    """Loss (N,) and gradients by name from the same weights, by NumPy alone."""
    parameters = {name: value.astype(dtype) for name, value in model.parameters.items()}
    head = model.head
    rows = ids if head.row_of_token is None else head.row_of_token[ids]
    own = {name: value for name, value in parameters.items() if not name.startswith("head.")}
    h, saved = trunk_forward(own, rows, **layout(model.config))
    weight, shares = parameters["embedding.weight"], weights.astype(dtype)
    if isinstance(head, TreeHead):
        nodes = parameters["head.nodes.weight"]
        dweight, dnodes = np.zeros_like(weight), np.zeros_like(nodes)
        targets_at = head.row_of_token[targets.reshape(-1)]
        loss, _, dh = reference_tree.tree_head_forward_backward(
            h, weight, nodes, head.tree.spans, targets_at, shares, dweight, dnodes
        )
        gradients = trunk_backward(dh, saved) | {"head.nodes.weight": dnodes}
    else:
        loss, _, _ = reference.dense_head_forward(h, weight, targets.reshape(-1))
        dh, dweight = reference.dense_head_backward(shares, h, weight, targets.reshape(-1))
        gradients = trunk_backward(dh, saved)
    gradients["embedding.weight"] = gradients["embedding.weight"] + dweight
    return loss, gradients


def text(rng, rows, length):
    """Ids of a language that can be learnt: each token is followed by one of three."""
    ids = np.empty((rows, length + 1), np.int32)
    ids[:, 0] = rng.integers(0, SHAPE.vocab_size, rows)
    for t in range(length):
        ids[:, t + 1] = (7 * ids[:, t] + rng.integers(0, 3, rows)) % SHAPE.vocab_size
    return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])


@pytest.mark.parametrize(
    ("kind", "n_blocks"), [*(pytest.param("dense", n, marks=pytest.mark.slow) for n in (1, 2)), ("tree", 1)]
)
def test_errors_do_not_grow_along_a_trajectory(kind, n_blocks):
    config = dataclasses.replace(SHAPE, n_blocks=n_blocks)
    tree = build_tree("adaptive", np.arange(SHAPE.vocab_size)[::-1])

    def make_head(weight, dweight):
        return TreeHead(tree, weight, dweight) if kind == "tree" else DenseHead(weight, dweight)

    model = Model(config, initial_parameters(config, 0), make_head)
    optimizer = Optimizer(model.parameters, model.gradients, OptimizerConfig(weight_decay=0.1))
    rng = np.random.default_rng(0)
    weights = np.full(2 * 24, 1 / 48, np.float32)
    errors, plain_errors, losses = [], [], []
    for step in range(STEPS + 1):
        ids, targets = text(rng, 2, 24)
        model.sync_weights()
        loss, _, _ = model.loss_and_grad(ids, targets, weights, accumulate=False)
        losses.append(float(loss.mean()))
        if step % EVERY == 0:
            loss64, truth = recompute(model, ids, targets, weights, np.float64)
            loss32, plain = recompute(model, ids, targets, weights, np.float32)
            assert_as_accurate(loss, loss32, loss64, MOST, f"loss of step {step}")
            for name, want in truth.items():
                if not name.startswith("router"):
                    assert_as_accurate(model.gradients[name], plain[name], want, MOST, f"{name} of step {step}")
            whole = np.sqrt(sum(np.square(truth[name]).sum() for name in truth))
            for found, record in ((model.gradients, errors), (plain, plain_errors)):
                off = np.sqrt(sum(np.square(found[name] - truth[name]).sum() for name in truth))
                record.append(off / whole)
        optimizer.step(0.01, 2e-3, 1.0)
    assert np.mean(losses[-100:]) < 0.5 * np.mean(losses[:20])  # it went somewhere
    quarter = len(errors) // 4
    assert max(errors) < 1e-4
    assert np.median(errors) < 2 * np.median(plain_errors)
    assert np.median(errors[-quarter:]) < 3 * np.median(errors[:quarter]), errors


@pytest.mark.parametrize(("n_blocks", "tolerance"), [(1, 1e-6), (2, 2e-5)])  # more layers: a larger third derivative
def test_the_references_gradients_are_the_derivatives(n_blocks, tolerance):
    """Central differences of the whole trunk in float64, for every weight that is not made ternary."""
    config = ModelConfig(
        7, 6, 5, 2, kernel_size=2, dilations=(1, 2), n_passes=2, mixer_residual_scale=0.3, ffn_residual_scale=0.2
    )
    config = dataclasses.replace(config, leaky_decay=0.7, ngram_copy_orders=(1, 2, 1), ngram_copy_reach=4)
    config = dataclasses.replace(config, n_blocks=n_blocks)
    parameters = {n: v.astype(np.float64) for n, v in initial_parameters(config, 0, embedding_std=0.5).items()}
    rng = np.random.default_rng(1)
    for name, gains in parameters.items():
        if ".mixer.leaky." in name or name.startswith("ngram_copy."):
            gains[:] = rng.standard_normal(6)
    ids, dout = rng.integers(0, 3, (2, 8)), rng.standard_normal((16, 6))

    def value():
        return float((dout * trunk_forward(parameters, ids, **layout(config))[0]).sum())

    found = trunk_backward(dout, trunk_forward(parameters, ids, **layout(config))[1])
    for name, gradient in found.items():
        if not is_ternary(name):
            want = numeric_gradient(value, parameters[name])
            assert np.abs(want).max() > 1e-3, name
            np.testing.assert_allclose(gradient, want, atol=tolerance * np.abs(want).max() + 1e-8, err_msg=name)


def test_a_wrong_gradient_of_the_trunk_would_be_seen():
    """The check above fails where a gradient is off by a thousandth."""
    model = Model(SHAPE, initial_parameters(SHAPE, 0), DenseHead)
    ids, targets = (part % 6 for part in text(np.random.default_rng(0), 2, 24))  # so that some repeat
    weights = np.full(48, 1 / 48, np.float32)
    model.loss_and_grad(ids, targets, weights, accumulate=False)
    _, truth = recompute(model, ids, targets, weights, np.float64)
    _, plain = recompute(model, ids, targets, weights, np.float32)
    for name, gradient in model.gradients.items():
        if name.startswith("router"):
            continue
        assert_as_accurate(gradient, plain[name], truth[name], MOST, name)
        with pytest.raises(AssertionError):
            assert_as_accurate(gradient * np.float32(1.001), plain[name], truth[name], MOST, name)


def with_copies(model, parameters, ids, document, h, nll):
    """nll (N,) of the head's mixture with the n-gram copies, for the head's own."""
    orders, reach = model.config.ngram_copy_orders, model.config.ngram_copy_reach
    kinds = [(order, orders[:o].count(order)) for o, order in enumerate(orders)]
    copies = np.stack([reference.ngram_copies(ids, order, reach, skip)[0] for order, skip in kinds], axis=1)
    rows = copies if model.head.row_of_token is None else np.where(copies < 0, -1, model.head.row_of_token[copies])
    weights = (parameters[COPY_SHARES + name] for name in ("bias", "hidden", "match"))
    shares = reference.copy_shares(reference.copy_scores(h, parameters["embedding.weight"], rows, *weights))
    return -np.log(shares[:, 0] * np.exp(-nll) + (shares[:, 1:] * (copies == document[:, None])).sum(1))


@pytest.mark.parametrize("head", ["tree", "dense"])
def test_three_ways_to_the_nll_of_a_trained_run_agree(corpus, tmp_path, head):
    """By `eval`; by every probability of every token; and by NumPy in float64, document by document."""
    from helpers import TINY

    chosen = (*TINY, f"head.name={head}", "activations=float", "log_prior=true")
    words = [word for setting in chosen for word in ("--set", setting)]
    done = command("train", corpus, "--out", tmp_path / "run", "--steps", 8, "--threads", 1, *words)
    assert done.exit_code == 0, done.output
    model = assemble.load_model(tmp_path / "run").model
    data = open_tokens(corpus)
    documents, eot = list(data.validation.documents()), data.vocabulary.eot
    by_rule = score(model, documents, eot=eot).nll
    brute = exact = 0.0
    parameters = {name: value.astype(np.float64) for name, value in model.parameters.items() if name[:5] != "head."}
    for document in documents:
        ids = np.concatenate([[eot], document[:-1]]).astype(np.int32)[None]
        h = model.forward(ids)
        p = model.head_at(model.copied(ids)).distribution(h).astype(np.float64)
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
        brute -= np.log(p[np.arange(len(document)), document]).sum()
        rows = ids if model.head.row_of_token is None else model.head.row_of_token[ids]
        wide, _ = trunk_forward(parameters, rows, **layout(model.config))
        if isinstance(model.head, TreeHead):
            prior = tuple(model.head._prior[name].astype(np.float64) for name in ("log_prior", "node_log_prior"))
            columns = model.head.row_of_token[document]
            log_p = reference_tree.tree_head_log_distribution(
                wide,
                parameters["embedding.weight"],
                model.head.nodes.astype(np.float64),
                model.head.tree.spans,
                prior=prior,
            )
            nll = -log_p[np.arange(len(document)), columns]
        else:
            _, nll, _ = reference.dense_head_forward(
                wide, parameters["embedding.weight"], document, model.head.log_prior.astype(np.float64)
            )
        exact += with_copies(model, parameters, ids, document, wide, nll).sum()
    assert by_rule == pytest.approx(exact, rel=1e-6)
    assert brute == pytest.approx(exact, rel=1e-5)
