"""Label trees: every builder reaches every token once, damaged trees are refused, costs are right."""

import heapq
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.heads.label_tree import Tree, tree_from_lists
from flashlm_numba.heads.tree_shapes import SHAPES, balanced_kmeans, build_tree
from flashlm_numba.system.errors import UserError

SIZES = [1, 2, 3, 4, 5, 7, 10, 37, 99, 250]


def some_counts(seed, vocab):
    rng = np.random.default_rng(seed)
    counts = (rng.pareto(0.8, vocab) * 20).astype(np.int64)
    counts[rng.integers(0, vocab)] = 0  # a token never seen
    return counts


def some_tree(shape, seed, vocab):
    rows = np.random.default_rng(seed).standard_normal((vocab, 6)).astype(np.float32)
    use_rows = shape == "clustered" or (shape in ("adaptive", "two-level") and seed % 2 == 1)
    return build_tree(shape, some_counts(seed, vocab), rows=rows if use_rows else None)


def leaves_by_walking(tree):
    """(token, path) of every leaf, by plain recursion over the ranges."""
    found, work = [], [(0, [])]
    while work:
        n, path = work.pop()
        tokens = range(tree.token_start[n], tree.token_end[n])
        found += [(int(tree.token_of_row[row]), [*path, (n, k)]) for k, row in enumerate(tokens)]
        kids = range(tree.child_start[n], tree.child_end[n])
        work += [(kid, [*path, (n, len(tokens) + k)]) for k, kid in enumerate(kids)]
    return found


@given(st.sampled_from(list(SHAPES)), st.integers(0, 1000), st.sampled_from(SIZES))
def test_tree_reaches_every_token_exactly_once(shape, seed, vocab):
    tree = some_tree(shape, seed, vocab)
    leaves = leaves_by_walking(tree)
    assert sorted(token for token, _ in leaves) == list(range(vocab))
    assert all(tree.path(token) == path for token, path in leaves)
    assert tree.arity.min() > 1 or vocab == 1  # a node with one child would decide nothing
    assert tree.depth == max(len(path) for _, path in leaves)
    counts = some_counts(seed, vocab)
    share = (counts if counts.any() else np.ones(vocab)) / max(counts.sum(), 1 if counts.any() else vocab)
    expected = tree.expected(counts)
    cost = sum(share[token] * tree.arity[[n for n, _ in path]].sum() for token, path in leaves)
    assert expected["path_cost"] == pytest.approx(cost)
    assert expected["depth"] == pytest.approx(sum(share[token] * len(path) for token, path in leaves))


@given(st.sampled_from(list(SHAPES)), st.integers(0, 1000), st.sampled_from(SIZES))
def test_tree_survives_saving(shape, seed, vocab):
    tree = some_tree(shape, seed, vocab)
    tensors = tree.to_tensors()
    back = Tree.from_tensors(tensors)
    assert back.shape == tree.shape == {"default": "adaptive"}.get(shape, shape)
    for name, value in back.to_tensors().items():
        np.testing.assert_array_equal(value, tensors[name])


@given(st.sampled_from(list(SHAPES)), st.integers(0, 1000), st.sampled_from([3, 10, 99]), st.data())
def test_tree_refuses_any_damaged_number(shape, seed, vocab, data):
    tensors = {name: value.copy() for name, value in some_tree(shape, seed, vocab).to_tensors().items()}
    name = data.draw(st.sampled_from([name for name in tensors if name != "tree.shape"]))
    at = data.draw(st.integers(0, tensors[name].size - 1))
    wrong = data.draw(st.integers(-(2**31), 2**31 - 1) | st.integers(-2, vocab + 1))
    if wrong == tensors[name][at]:
        return
    tensors[name][at] = wrong
    with pytest.raises(UserError, match=r"The label tree is damaged: .*reach every token exactly once"):
        Tree.from_tensors(tensors)


def test_tree_names_what_is_damaged():
    tensors = build_tree("two-level", np.ones(9)).to_tensors()
    doubled = {**tensors, "tree.token_of_row": np.array([0, 0, 2, 3, 4, 5, 6, 7, 8], np.int32)}
    with pytest.raises(UserError, match="token 0 is not in it exactly once"):
        Tree.from_tensors(doubled)
    with pytest.raises(UserError, match=r"tree\.leaf_end is missing"):
        Tree.from_tensors({name: value for name, value in tensors.items() if name != "tree.leaf_end"})
    with pytest.raises(UserError, match=r"parent is int64 \(4,\), expected int32"):
        Tree.from_tensors({**tensors, "tree.parent": tensors["tree.parent"].astype(np.int64)})
    with pytest.raises(UserError, match="cycle"):
        tree_from_lists([[0], [1], [2]], [[1], [2], [1]])
    with pytest.raises(UserError, match="1 nodes cannot be reached"):
        tree_from_lists([[0, 1], [2, 3]], [[], []])
    # two nodes that hold each other, and a root that does not
    loop = dict(tensors)
    loop["tree.child_start"] = np.array([1, 3, 3, 4], np.int32)
    loop["tree.child_end"] = np.array([3, 3, 4, 4], np.int32)
    loop["tree.parent"] = np.array([-1, 0, 0, 3], np.int32)
    with pytest.raises(UserError, match="damaged"):
        Tree.from_tensors(loop)


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
    with pytest.raises(UserError, match="one count per token"):
        build_tree("huffman", np.array([1, -1]))
    with pytest.raises(UserError, match="as many finite rows"):
        build_tree("adaptive", counts, rows=np.zeros((8, 3)))


def test_clusters_beyond_the_memory_are_refused(monkeypatch):
    rows = np.random.default_rng(0).standard_normal((100, 3)).astype(np.float32)
    assert build_tree("clustered", np.ones(100), rows=rows, arity=2).vocab_size == 100
    monkeypatch.setattr("flashlm_numba.heads.tree_shapes.MOST_SIMILARITIES", 150)
    with pytest.raises(UserError, match="2 clusters of 100 tokens would need too much memory; ask for at most 1"):
        build_tree("clustered", np.ones(100), rows=rows, arity=2)


def test_tree_page_shows_what_its_example_prints(capsys):
    page = (Path(__file__).parents[2] / "docs" / "tree.md").read_text()
    code, after = page.split("```python\n")[1].split("```\n", 1)
    exec(code, {})
    printed = capsys.readouterr().out
    assert printed.startswith("adaptive tree of 50,257 tokens")
    assert textwrap.indent(printed, "    ") in after


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
