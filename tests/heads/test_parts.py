"""How a token's probability comes about: the parts of a mixture, and the nodes of a tree."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.heads import DenseHead, TreeHead
from flashlm_numba.heads.copy_mixture import CopyMixture, CopyShares
from flashlm_numba.heads.tree_shapes import SHAPES, build_tree
from flashlm_numba.kernels.copy_mixture import CopyWeights
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.packed_model import random_packed_model

V, C = 53, 8


def tree_head(rng, shape, **options):
    weight = rng.standard_normal((V, C), np.float32)
    tree = build_tree(shape, np.arange(V), rows=weight if shape == "clustered" else None)
    nodes = rng.standard_normal((tree.n_nodes - 1, C), np.float32)
    return TreeHead(tree, weight, nodes=nodes, **options)


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "default"])
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 2.0]), st.booleans(), st.sampled_from([0.1, 1.0, 30.0]))
def test_a_descent_is_the_whole_distribution(shape, seed, soft_cap, prior, scale):
    """The chosen children give every token's probability, and every node's children add up to one."""
    rng = np.random.default_rng(seed)
    log_prior = np.log((1 + np.arange(V)) / (1 + np.arange(V)).sum()).astype(np.float32) if prior else None
    head = tree_head(rng, shape, soft_cap=soft_cap, log_prior=log_prior)
    h = rng.standard_normal((1, C), np.float32) * np.float32(scale)
    wanted = head.log_distribution(h)[0]
    for token in range(V):
        steps = head.descent(h[0], token)
        assert [(step.node, step.chosen) for step in steps] == head.tree.path(token)
        for step in steps:
            assert len(step.log_p) == head.tree.arity[step.node]
            assert np.exp(step.log_p).sum() == pytest.approx(1)
        total = sum(step.log_p[step.chosen] for step in steps)
        assert total == pytest.approx(wanted[token], rel=1e-5, abs=1e-4)


def heads(rng):
    yield tree_head(rng, "two-level")
    yield DenseHead(rng.standard_normal((V, C), np.float32))
    config = ModelConfig(V, C, 10, 1, mixer="mlgru", linear="bitlinear", ngram_copy_orders=())
    yield random_packed_model(config, 0).head


@given(st.integers(0, 2**32 - 1))
def test_a_head_alone_is_one_part(seed):
    rng = np.random.default_rng(seed)
    h = rng.standard_normal((1, C), np.float32)
    for head in heads(rng):
        p = head.distribution(h)[0]
        for token in range(V):
            ((name, share, probability),) = head.parts(h, token)
            assert (name, share) == ("head", 1)
            assert probability == pytest.approx(p[token], rel=1e-4, abs=1e-7)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(-1, 5), min_size=1, max_size=4))
def test_parts_of_a_mixture_with_copies_add_up(seed, copies):
    rng = np.random.default_rng(seed)
    ways = len(copies)
    weights = CopyWeights(*(rng.standard_normal(s).astype(np.float32) for s in ((ways,), (ways, C), (ways,))))
    embedding = rng.standard_normal((V, C), np.float32)
    shares = CopyShares(weights, weights, embedding, embedding)
    h = rng.standard_normal((1, C), np.float32)
    mixture = CopyMixture(tree_head(rng, "balanced"), shares, np.array([copies], np.int32))
    p = mixture.distribution(h)[0]
    for token in range(V):
        parts = mixture.parts(h, token)
        assert [part.name for part in parts] == ["head", "copies"]
        assert sum(part.share for part in parts) == pytest.approx(1)
        assert sum(part.share * part.probability for part in parts) == pytest.approx(p[token], rel=1e-4, abs=1e-7)
        if token not in copies:
            assert parts[1].probability == 0
