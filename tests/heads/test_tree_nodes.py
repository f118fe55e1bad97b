"""A tree's node rows kept as a product: where they start, their gradients, and which trees have them."""

import numpy as np
import pytest

from flashlm_numba.heads import TreeHead
from flashlm_numba.heads.label_tree import tree_from_lists
from flashlm_numba.heads.tree_nodes import default_rank, factor_nodes, init_nodes
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.system.errors import UserError


def small_tree(rank, **options):
    rng = np.random.default_rng(3)
    vocab, dim = 120, 12
    counts = 1000 // np.arange(1, vocab + 1)
    by_id = rng.standard_normal((vocab, dim)).astype(np.float32)
    tree = build_tree("clustered", counts, rows=by_id)
    weight = np.ascontiguousarray(by_id[tree.token_of_row])
    return TreeHead(tree, weight, counts=counts, rank=rank, **options), rng


def test_full_rank_starts_as_the_full_rows_and_a_lower_one_nearest_to_them():
    head, _ = small_tree(12)
    full = init_nodes(head.tree, head.weight, 1000 // np.arange(1, 121))
    np.testing.assert_allclose(head.nodes, full, atol=1e-5)
    u, s, v = np.linalg.svd(full.astype(np.float64), full_matrices=False)
    for rank in (1, 3, 7):
        coords, basis = factor_nodes(full, rank)
        np.testing.assert_allclose(coords @ basis, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-5)


def test_a_change_of_the_parameters_takes_effect_when_prepared():
    head, rng = small_tree(3)
    assert {name: value.shape[1] for name, value in head.parameters.items()} == {"nodes.weight": 3, "nodes.basis": 12}
    h = rng.standard_normal((5, 12)).astype(np.float32)
    before = head.distribution(h)
    head.parameters["nodes.basis"][...] *= 2
    head.prepare()
    after = head.distribution(h)
    assert np.abs(after - before).max() > 1e-4
    np.testing.assert_allclose(after.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(head.nodes, head.parameters["nodes.weight"] @ head.parameters["nodes.basis"], atol=1e-5)


@pytest.mark.parametrize("accumulate", [True, False])
def test_gradients_agree_with_finite_differences_and_add_up(accumulate):
    """Two batches: their gradients add up, or the second's stand alone, in the shared rows and in both factors."""
    head, rng = small_tree(3)
    batches = [
        (rng.standard_normal((9, 12)).astype(np.float32), rng.integers(0, 120, 9).astype(np.int32)) for _ in range(2)
    ]
    weights = rng.random(9).astype(np.float32)
    for h, targets in batches:
        head.forward_backward(h, targets, weights, accumulate=accumulate)

    def loss():
        head.prepare()
        counted = batches if accumulate else batches[1:]
        return sum(-(head.log_prob(h, targets).astype(np.float64) @ weights) for h, targets in counted)

    for name, value in head.parameters.items():
        gradient = head.gradients[name]
        assert gradient.any(), name
        for _ in range(6):
            at = tuple(rng.integers(0, size) for size in value.shape)
            old, step = value[at], np.float32(2e-2)
            value[at] = old + step
            up = loss()
            value[at] = old - step
            down = loss()
            value[at] = old
            assert (up - down) / (2 * step) == pytest.approx(gradient[at], rel=0.05, abs=3e-3), name


def test_factors_that_do_not_fit_are_refused():
    head, _ = small_tree(3)
    with pytest.raises(ValueError, match="TreeHead: nodes must have shape"):
        TreeHead(
            head.tree, head.weight, nodes=head.parameters["nodes.weight"][:-1].copy(), basis=np.zeros((3, 12), "f")
        )
    with pytest.raises(ValueError, match="TreeHead: basis must have shape"):
        TreeHead(head.tree, head.weight, nodes=head.parameters["nodes.weight"], basis=np.zeros((4, 12), np.float32))
    with pytest.raises(ValueError, match="rank must be"):
        small_tree(0)


def test_a_rank_above_the_channels_is_that_of_whole_rows_and_a_lone_root_has_none():
    head, _ = small_tree(99)
    assert head.parameters["nodes.basis"].shape == (12, 12)
    alone = TreeHead(tree_from_lists([[0, 1, 2]], [[]]), np.zeros((3, 4), np.float32), rank=2)
    assert alone.parameters == {}
    alone.prepare()
    loss, _, _ = alone.forward_backward(np.ones((1, 4), "f"), np.array([1], np.int32), np.ones(1, "f"))
    assert loss[0] == pytest.approx(np.log(3))


def test_drawing_and_searching_see_the_rows_as_prepared():
    head, rng = small_tree(3)
    head.parameters["nodes.weight"] *= -3
    head.prepare()
    h = rng.standard_normal((1, 12)).astype(np.float32)
    p = head.distribution(h)[0]
    ids, log_p = head.top(h[0], 5)
    assert ids.tolist() == np.argsort(-p, kind="stable")[:5].tolist()
    np.testing.assert_allclose(np.exp(log_p), p[ids], rtol=1e-4)
    drawn = np.bincount([head.sample(h, rng)[0] for _ in range(3_000)], minlength=120) / 3_000
    assert np.abs(drawn - p).max() < 0.04


def test_only_the_default_tree_by_meaning_has_a_rank():
    counts, rows = 1000 // np.arange(1, 121), np.random.default_rng(0).standard_normal((120, 16)).astype(np.float32)
    default = build_tree("default", counts, rows=rows)
    assert default.shape == "clustered"
    assert default_rank("default", default, 16) == 3
    assert default_rank("clustered", default, 16) is None
    for options in ({}, {"rows": rows, "root_tokens": 5}, {"rows": rows, "clusters": 7}):
        other = build_tree("default", counts, **options)
        assert other.shape == "adaptive"
        assert default_rank("default", other, 16) is None
    with pytest.raises(UserError, match="either arity, or root_tokens and clusters"):
        build_tree("default", counts, rows=rows, arity=4, clusters=7)
