"""The index of decoding finds what a search through the history finds, for any text and from any place in it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.heads import DenseHead
from flashlm_numba.kernels import reference
from flashlm_numba.kernels.ngram_copy import copy_kinds
from flashlm_numba.kernels.ngram_index import buckets
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters


def copies_while_decoding(rows, first, orders, reach, vocabulary):
    """What decoding finds to copy at rows[first], rows[first + 1], ...; the rows before are read in one pass."""
    config = ModelConfig(
        vocabulary, 4, 4, 1, dilations=(1,), n_passes=1, ngram_copy_orders=orders, ngram_copy_reach=reach
    )
    model = Model(config, initial_parameters(config, 0), DenseHead)
    state, _ = model.prefill(rows[:first])
    found = []
    for row in rows[first:]:
        model.decode_step(state, int(row))
        found.append(state.state.copies.copy())
    return np.array(found).T


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 3, 40]),
    st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    st.sampled_from([1, 2, 5, 17, 60]),
    st.sampled_from([1, 2, 30, 90]),
)
def test_decoding_copies_what_the_reference_copies(seed, vocabulary, orders, reach, first):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, vocabulary, first + 150).astype(np.int32)
    again = int(rng.integers(first, first + 100))
    rows[again : again + 30] = rows[:30]  # long repetitions, too, not only those of a small vocabulary
    found = copies_while_decoding(rows, first, orders, reach, vocabulary)
    for (order, skip), got in zip(copy_kinds(orders), found, strict=True):
        want = reference.ngram_copies(rows[None], order, reach, skip)[0, first:]
        np.testing.assert_array_equal(got, want, err_msg=f"order {order}, skip {skip}")


def test_a_chain_is_followed_past_other_tokens_of_its_bucket():
    """With more tokens than buckets, some share one."""
    rng = np.random.default_rng(0)
    rows = rng.permutation(np.repeat(np.arange(500, dtype=np.int32), 2))
    found = copies_while_decoding(rows, 1, (1, 1, 2), 100, 500)
    assert buckets(102) < 500
    for (order, skip), got in zip(copy_kinds((1, 1, 2)), found, strict=True):
        np.testing.assert_array_equal(got, reference.ngram_copies(rows[None], order, 100, skip)[0, 1:])


@pytest.mark.parametrize("history", [0, 1, 2, 3, 1024, 1026])
def test_there_are_as_many_buckets_as_tokens(history):
    assert history <= buckets(history) < max(2 * history, 2)
