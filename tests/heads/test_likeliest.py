"""The likeliest tokens of every head are those of its distribution."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.heads import BitLinearHead, DenseHead, SampledHead, TreeHead
from flashlm_numba.heads.base import likeliest_of_logits
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.packed_model import random_packed_model

V, C = 61, 12
WEIGHT = np.random.default_rng(0).standard_normal((V, C), np.float32)
HEADS = {
    "dense": DenseHead(WEIGHT, soft_cap=5.0, log_prior=np.log(np.arange(1, V + 1, dtype=np.float32))),
    "sampled": SampledHead(WEIGHT, counts=np.arange(V), candidates=20),
    "tree": TreeHead(build_tree("two-level", np.arange(V)), WEIGHT),
    "huffman": TreeHead(build_tree("huffman", np.arange(V)), WEIGHT),
    "bitlinear": BitLinearHead(WEIGHT.copy()),
    "packed": random_packed_model(
        ModelConfig(V, C, 10, 1, mixer="mlgru", linear="bitlinear", ngram_copy_orders=()), 0
    ).head,
}


@pytest.mark.parametrize("name", HEADS)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.sampled_from([1, 5, V, V + 9]))
def test_they_are_those_of_the_distribution(name, seed, rows, count):
    head, h = HEADS[name], np.random.default_rng(seed).standard_normal((rows, C), np.float32)
    ids, log_p = head.likeliest(h, count)
    assert (ids.shape, ids.dtype) == ((rows, min(count, V)), np.int32)
    assert (log_p.shape, log_p.dtype) == (ids.shape, np.float64)
    if rows:
        wanted = np.log(head.distribution(h).astype(np.float64))
        np.testing.assert_allclose(log_p, np.sort(wanted)[:, ::-1][:, :count], atol=2e-5)
        np.testing.assert_allclose(log_p, np.take_along_axis(wanted, ids.astype(int), 1), atol=2e-5)
        assert all(len(set(row)) == len(row) for row in ids.tolist())
        np.testing.assert_allclose(head.log_prob(h, np.ascontiguousarray(ids[:, 0])), log_p[:, 0], atol=2e-5)
        np.testing.assert_allclose(head.log_prob_of(h[0], ids[0]), log_p[0], atol=2e-5)


def test_impossible_tokens_come_last_and_what_is_not_finite_is_refused():
    ids, log_p = likeliest_of_logits(np.array([[-np.inf, 0, 0]], np.float32), 3)
    assert ids[0, 2] == 0
    np.testing.assert_allclose(log_p, [[np.log(0.5), np.log(0.5), -1e30]], rtol=1e-6)
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match="must be finite"):
            likeliest_of_logits(np.array([[wrong, 0]], np.float32), 1)
