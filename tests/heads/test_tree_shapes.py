"""The builders of label trees: each has the property that it is there for, and says what it cannot do."""

import heapq

import numpy as np
import pytest
from helpers import some_counts
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.heads.tree_shapes import balanced_kmeans, build_tree
from flashlm_numba.system.errors import UserError


@given(st.integers(0, 1000), st.sampled_from([2, 3, 10, 99]))
def test_huffman_has_the_least_expected_depth(seed, vocab):
    counts = some_counts(seed, vocab)
    # the sum of a Huffman tree's inner weights is its expected depth, whatever the ties
    heap = (counts + 1).tolist()
    heapq.heapify(heap)
    best = 0
    while len(heap) > 1:
        pair = heapq.heappop(heap) + heapq.heappop(heap)
        best += pair
        heapq.heappush(heap, pair)
    tree = build_tree("huffman", counts)
    assert tree.n_nodes == vocab - 1
    assert tree.expected(counts + 1)["depth"] == pytest.approx(best / (counts + 1).sum())


def test_adaptive_keeps_the_most_frequent_tokens_in_the_root():
    counts = np.random.default_rng(0).permutation(5000)
    tree = build_tree("adaptive", counts, root_tokens=40, clusters=30)
    top = set(np.argsort(-counts)[:40].tolist())
    assert set(tree.token_of_row[: tree.token_end[0]].tolist()) == top
    assert tree.n_nodes == 31
    two = build_tree("two-level", counts)
    assert abs(two.n_nodes - 71) <= 5
    assert two.arity.max() <= 3 * 71


def test_trees_of_gpt2_size_have_bounded_nodes():
    counts = np.floor(2e6 / np.arange(1, 50_258) ** 1.1).astype(np.int64)
    for shape, most_cost in (("two-level", 450), ("adaptive", 650), ("balanced", 112)):
        tree = build_tree(shape, counts)
        assert tree.arity.max() <= 500
        assert tree.expected(counts)["path_cost"] < most_cost
    assert build_tree("huffman", counts).n_nodes == 50_256


def test_balanced_kmeans_finds_directions_and_respects_the_capacity():
    rng = np.random.default_rng(1)
    directions = np.eye(4, 8)
    truth = np.repeat(np.arange(4), 10)
    rows = directions[truth] * rng.uniform(0.1, 10, (40, 1)) + 0.01 * rng.standard_normal((40, 8))
    # wherever it starts, no cluster holds more than its capacity; from a good start the directions are found
    labels = [balanced_kmeans(rows, 4, 10, seed=seed) for seed in range(8)]
    assert all(np.bincount(label, minlength=4).max() <= 10 for label in labels)
    pure = [all(len(set(label[truth == t])) == 1 for t in range(4)) for label in labels]
    assert any(pure)
    with pytest.raises(ValueError, match="cannot hold"):
        balanced_kmeans(rows, 3, 13)


def test_build_tree_says_what_it_cannot_do():
    counts = np.ones(9)
    with pytest.raises(UserError, match="no tree shape 'bush'; choose one of default, adaptive"):
        build_tree("bush", counts)
    with pytest.raises(UserError, match="huffman has no option arity; it takes none"):
        build_tree("huffman", counts, arity=3)
    with pytest.raises(UserError, match="arity must be at least 2, got 1"):
        build_tree("balanced", counts, arity=1)
    with pytest.raises(UserError, match="needs embedding rows"):
        build_tree("clustered", counts)
    with pytest.raises(UserError, match="one non-negative count per token"):
        build_tree("huffman", np.array([1, -1]))
    with pytest.raises(UserError, match="the same number of finite rows"):
        build_tree("adaptive", counts, rows=np.zeros((8, 3)))


def test_clusters_beyond_the_memory_are_refused(monkeypatch):
    rows = np.random.default_rng(0).standard_normal((100, 3)).astype(np.float32)
    assert build_tree("clustered", np.ones(100), rows=rows, arity=2).vocab_size == 100
    monkeypatch.setattr("flashlm_numba.heads.tree_shapes.MOST_SIMILARITIES", 150)
    with pytest.raises(UserError, match="2 clusters of 100 tokens would need too much memory; request at most 1"):
        build_tree("clustered", np.ones(100), rows=rows, arity=2)


@pytest.mark.parametrize("shape", ["two-level", "adaptive"])
def test_groups_by_meaning_keep_the_frequent_tokens_in_small_nodes(shape):
    vocab = 3_000
    counts = (1e6 / np.arange(1, vocab + 1)).astype(np.int64)
    rows = np.random.default_rng(0).standard_normal((vocab, 8)).astype(np.float32)
    tree = build_tree(shape, counts, rows=rows)
    leaves = range(1, tree.n_nodes)
    mean_rank = np.array([np.mean(tree.token_of_row[tree.token_start[n] : tree.token_end[n]]) for n in leaves])
    size = tree.arity[leaves]
    frequent = mean_rank < np.median(mean_rank)
    assert size[frequent].max() < size[~frequent].min()


@pytest.mark.parametrize("vocab", [2, 3, 5, 17])
@pytest.mark.parametrize("flat", [True, False])
def test_groups_by_meaning_of_small_vocabularies(vocab, flat):
    counts = np.zeros(vocab, int) if flat else 10 ** np.arange(vocab)[::-1] % (1 << 40)
    rows = np.random.default_rng(0).standard_normal((vocab, 3)).astype(np.float32)
    for shape, option in (("two-level", "classes"), ("adaptive", "clusters")):
        for count in range(1, vocab + 2):
            tree = build_tree(shape, counts, rows=rows, **{option: count})
            assert sorted(tree.token_of_row.tolist()) == list(range(vocab))
