"""The draw of a token from a tree mixed with copies: the rows that NumPy draws with the same random numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.heads import TreeHead
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.kernels import reference, reference_tree
from flashlm_numba.kernels.copy_mixture import CopyWeights
from flashlm_numba.kernels.tree_draw import CopyModel, draw_row, likeliest_drawing, plain_drawing
from flashlm_numba.kernels.tree_node import make_tree

problems = st.tuples(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["adaptive", "huffman", "two-level"]),
    st.sampled_from([1, 2, 3, 40]),  # leaves
    st.sampled_from([1, 3, 16, 33]),  # channels
    st.integers(0, 4),  # ways of copying
    st.booleans(),  # whether there is a prior
    st.sampled_from([None, 2.0]),  # soft cap
)


def problem(drawn, scale=1.0):
    """A tree, the copies' model, x (1, C), copies (O,), and the options of the reference."""
    seed, shape, vocab, dim, ways, prior, soft_cap = drawn
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 50, vocab)
    head = TreeHead(build_tree(shape, counts), (scale * rng.standard_normal((vocab, dim))).astype(np.float32))
    priors = {}
    if prior:
        sizes = vocab, head.tree.n_nodes - 1
        names = "log_prior", "node_log_prior"
        priors = {name: rng.standard_normal(size).astype(np.float32) for name, size in zip(names, sizes, strict=True)}
    tree = make_tree(head.weight, head.nodes, head.tree.spans, soft_cap=soft_cap, **priors)
    shapes = (ways,), (ways, dim), (ways,)
    weights = CopyWeights(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))
    x = rng.standard_normal((1, dim)).astype(np.float32)
    options = {"prior": tuple(priors.values()) or None, "soft_cap": soft_cap}
    return tree, CopyModel(head.weight, weights), x, rng.integers(-1, vocab, ways).astype(np.int32), options


def mixture(tree, model, x, copies, options):
    """The shares (O + 1,) and the probabilities (V,) of the rows, in float64."""
    wide = [array.astype(np.float64) for array in (x, model.embedding, *model.weights)]
    scores = reference.copy_scores(wide[0], wide[1], copies[None], *wide[2:])[0]
    exponents = np.concatenate([[0.0], scores])
    shares = np.exp(exponents - exponents.max())
    shares /= shares.sum()
    log_p = reference_tree.tree_head_log_distribution(wide[0], wide[1], tree.nodes, tree.spans, **options)[0]
    p = shares[0] * np.exp(log_p)
    for copy, share in zip(copies, shares[1:], strict=True):
        if copy >= 0:
            p[copy] += share
    return shares, p


@given(problems, st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=5))
def test_a_draw_is_the_references(drawn, first):
    tree, model, x, copies, options = problem(drawn)
    shares, _ = mixture(tree, model, x, copies, options)
    drawing, rng = plain_drawing(tree, model), np.random.default_rng(drawn[0])
    for uniform in first:
        uniforms = np.concatenate([[uniform], rng.random(tree.depth)])
        borders = np.cumsum(shares)
        if np.abs(borders - uniform).min() < 1e-5:
            continue  # rounding decides
        chosen = int(np.searchsorted(borders, uniform, side="right"))
        if chosen == 0 or copies[chosen - 1] < 0:
            want = reference_tree.tree_head_sample(
                x, tree.weight, tree.nodes, tree.spans, uniforms[None, 1:], **options
            )
            near = [
                reference_tree.tree_head_sample(
                    x, tree.weight, tree.nodes, tree.spans, np.clip(uniforms[None, 1:] + shift, 0, 1 - 1e-9), **options
                )[0]
                for shift in (-1e-5, 1e-5)
            ]
            assert draw_row(drawing, x, copies, uniforms) in {int(want[0]), *map(int, near)}
        else:
            assert draw_row(drawing, x, copies, uniforms) == copies[chosen - 1]


@given(problems, st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([1, 2, 7, 50]), st.sampled_from([None, 0.5]))
def test_a_draw_among_the_likeliest_is_the_references(drawn, temperature, count, top_p):
    tree, model, x, copies, options = problem(drawn)
    _, p = mixture(tree, model, x, copies, options)
    order = np.argsort(-p)[:count]
    kept = p[order] ** (1 / temperature) if temperature else np.eye(len(order))[0]
    if top_p:
        kept = kept * (np.cumsum(kept) - kept < top_p * kept.sum())
    borders = np.cumsum(kept) / kept.sum()
    drawing = likeliest_drawing(tree, count, temperature, top_p, model)
    for uniform in np.random.default_rng(drawn[0]).random(5):
        row = draw_row(drawing, x, copies, np.array([uniform]))
        low, high = np.searchsorted(borders, [uniform - 1e-4, uniform + 1e-4], side="right")
        likely = order[low : high + 1]
        # of rows of equal probability any may stand in a place
        assert np.abs(p[likely] - p[row]).min() < 1e-5 * p.max()


@given(problems)
def test_without_copies_it_is_the_tree_alone(drawn):
    tree, _, x, _, options = problem((*drawn[:4], 0, *drawn[5:]))
    none, uniforms = np.empty(0, np.int32), np.random.default_rng(0).random((4, 1 + tree.depth))
    for row in uniforms:
        assert 0 <= draw_row(plain_drawing(tree), x, none, row) < len(tree.weight)
    log_p = reference_tree.tree_head_log_distribution(x, tree.weight, tree.nodes, tree.spans, **options)[0]
    row = draw_row(likeliest_drawing(tree, 1, 0.0), x, none, uniforms[0, :1])
    assert log_p[row] >= log_p.max() - 1e-4


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["x", "weight", "nodes"])
def test_numbers_that_are_not_finite_are_an_error(value, where):
    tree, model, x, copies, _ = problem((0, "two-level", 40, 16, 2, False, None))
    for array in {"x": [x], "weight": [tree.weight], "nodes": [tree.nodes]}[where]:
        array[...] = value
    for drawing in (plain_drawing(tree, model), likeliest_drawing(tree, 5, 0.8, None, model)):
        with pytest.raises(ValueError, match="must be finite"):
            draw_row(drawing, x, copies, np.full(drawing.uniforms, 0.001))


def test_wrong_arguments_are_named():
    tree, model, x, copies, _ = problem((0, "adaptive", 40, 16, 2, False, None))
    drawing = plain_drawing(tree, model)
    uniforms = np.zeros(drawing.uniforms)
    for bad, match in (
        ((x[0], copies, uniforms), "x must have shape"),
        ((x, copies[:1], uniforms), "copies must have shape"),
        ((x, np.array([40, 0], np.int32), uniforms), r"copies must be in \[-1, 40\)"),
        ((x, copies, uniforms[1:]), "uniforms must have shape"),
    ):
        with pytest.raises(ValueError, match=match):
            draw_row(drawing, *bad)
    with pytest.raises(ValueError, match="count must be at least 1"):
        likeliest_drawing(tree, 0, 1.0)
    with pytest.raises(ValueError, match="temperature"):
        likeliest_drawing(tree, 1, -1.0)
    with pytest.raises(ValueError, match="embedding must have shape"):
        plain_drawing(tree, CopyModel(model.embedding[:-1].copy(), model.weights))
