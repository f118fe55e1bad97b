"""Label trees: every token is reached once, damaged trees are refused, costs are right."""

import textwrap
from pathlib import Path

import numpy as np
import pytest
from helpers import some_counts
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.heads.label_tree import Tree, tree_from_lists
from flashlm_numba.heads.tree_shapes import SHAPES, build_tree
from flashlm_numba.system.errors import UserError

SIZES = [1, 2, 3, 4, 5, 7, 10, 37, 99, 250]


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


def test_tree_page_shows_what_its_example_prints(capsys):
    page = (Path(__file__).parents[2] / "docs" / "tree.md").read_text()
    code, after = page.split("```python\n")[1].split("```\n", 1)
    exec(code, {})
    printed = capsys.readouterr().out
    assert printed.startswith("adaptive tree of 50,257 tokens")
    assert textwrap.indent(printed, "    ") in after
