"""The tree head: exactly normalised, right in loss, gradient and sampling, for any tree."""

import numba
import numpy as np
import pytest
from helpers import assert_as_accurate, numeric_gradient
from hypothesis import example, given
from hypothesis import strategies as st

from flashlm_numba.heads.label_tree import tree_from_lists
from flashlm_numba.heads.sampling import sample_rows
from flashlm_numba.heads.tree import TreeHead
from flashlm_numba.heads.tree_nodes import init_nodes
from flashlm_numba.heads.tree_shapes import SHAPES, build_tree
from flashlm_numba.kernels import reference_tree, tree_head, tree_plan

shapes = st.sampled_from([name for name in SHAPES if name != "default"])
options = st.fixed_dictionaries(
    {
        "label_smoothing": st.sampled_from([0.0, 0.1]),
        "z_loss": st.sampled_from([0.0, 1e-2]),
        "soft_cap": st.sampled_from([None, 5.0]),
    }
)
PLAIN = {"label_smoothing": 0.0, "z_loss": 0.0, "soft_cap": None}
ALL = {"label_smoothing": 0.1, "z_loss": 1e-2, "soft_cap": 3.0}


def make_head(seed, shape, vocab, dim, scale=1.0, prior=False, **settings):
    rng = np.random.default_rng(seed)
    counts = (rng.pareto(0.8, vocab) * 20).astype(np.int64)
    weight = rng.standard_normal((vocab, dim)).astype(np.float32) * np.float32(scale)
    tree = build_tree(shape, counts, rows=weight if shape == "clustered" else None)
    log_prior = np.log((counts + 1) / (counts + 1).sum()).astype(np.float32) if prior else None
    nodes = rng.standard_normal((tree.n_nodes - 1, dim)).astype(np.float32) * np.float32(scale)
    return TreeHead(tree, weight, nodes=nodes, log_prior=log_prior, **settings)


def problem(seed, head, rows):
    rng = np.random.default_rng(seed)
    h = rng.standard_normal((rows, head.weight.shape[1])).astype(np.float32)
    # half of the targets from a few tokens, so that nodes hold several positions
    targets = np.where(
        rng.random(rows) < 0.5,
        rng.integers(0, head.vocab_size, rows),
        rng.integers(0, min(5, head.vocab_size), rows),
    )
    return h, targets.astype(np.int32), rng.uniform(0, 1, rows).astype(np.float32)


def run(head, h, targets, weights):
    """loss, nll, dh, dweight, dnodes; the last two added to ones and taken off again."""
    head.dweight[...], head.dnodes[...] = 1, 1
    return *head.forward_backward(h, targets, weights), head.dweight - 1, head.dnodes - 1


def run_in_place(head, h, targets, weights):
    """The same, the gradients in place of what was there."""
    head.dweight[...], head.dnodes[...] = np.nan, np.nan
    return *head.forward_backward(h, targets, weights, accumulate=False), head.dweight.copy(), head.dnodes.copy()


def run_reference(dtype, head, h, targets, weights):
    dweight, dnodes = np.zeros(head.weight.shape, dtype), np.zeros(head.nodes.shape, dtype)
    first = reference_tree.tree_head_forward_backward(
        *(a.astype(dtype) for a in (h, head.weight, head.nodes)),
        head.tree.spans,
        head.row_of_token[targets],
        weights.astype(dtype),
        dweight,
        dnodes,
        **reference_settings(head, dtype),
        label_smoothing=head.label_smoothing,
        z_loss=head.z_loss,
    )
    return *first, dweight, dnodes


def reference_settings(head, dtype):
    prior = tuple(head._prior[name].astype(dtype) for name in ("log_prior", "node_log_prior")) if head._prior else None
    return {"soft_cap": head.soft_cap, "prior": prior}


@given(
    st.integers(0, 2**32 - 1),
    shapes,
    st.sampled_from([1, 2, 3, 50, 251]),
    st.sampled_from([0, 1, 3, 65, 130]),
    st.sampled_from([1, 8, 33, 70]),
    st.booleans(),
    options,
)
@example(3, "balanced", 251, 65, 134, False, PLAIN)
@example(1, "two-level", 251, 130, 8, True, ALL)
@example(2, "huffman", 50, 65, 33, False, ALL)
@example(310, "adaptive", 3, 1, 33, False, PLAIN)
def test_tree_head_matches_reference(seed, shape, vocab, rows, dim, prior, settings):
    head = make_head(seed, shape, vocab, dim, 0.7, prior, **settings)
    arrays = problem(seed, head, rows)
    got, in_place = run(head, *arrays), run_in_place(head, *arrays)
    np.testing.assert_array_equal(head.log_prob(*arrays[:2]), -got[1])
    ref32, ref64 = (run_reference(dtype, head, *arrays) for dtype in (np.float32, np.float64))
    names = ("loss", "nll", "dh", "dweight", "dnodes")
    for name, a, b, r32, r64 in zip(names, got, in_place, ref32, ref64, strict=True):
        # a gradient is (p - 1) * h at the target, so p near 1 leaves an absolute error; dweight and dnodes in `got`
        # were rounded once more, when they were added to one
        rounded = 1 / max(np.abs(r64).max(), 1e-3) if r64.size and name[0] == "d" else 0
        assert_as_accurate(a, r32, r64, 8 + 2 * rounded, name)
        assert_as_accurate(b, r32, r64, 8 + rounded, name)
        if name in ("dweight", "dnodes"):  # rows off the paths: nothing of what was there
            np.testing.assert_array_equal(b[~r64.any(axis=1)], 0)


@pytest.mark.parametrize("settings", [PLAIN, ALL])
def test_tree_head_reference_backward_is_the_derivative(settings):
    rng = np.random.default_rng(5)
    tree = tree_from_lists([[0], [3, 1], [], [2], [4, 5, 6]], [[1, 2], [], [3, 4], [], []])
    h, weight, nodes = (rng.standard_normal(shape) for shape in ((4, 3), (7, 3), (4, 3)))
    weights, targets = rng.uniform(0, 1, 4), np.array([0, 2, 6, 6])
    prior = rng.standard_normal(7), rng.standard_normal(4)

    def backward():
        dweight, dnodes = np.zeros_like(weight), np.zeros_like(nodes)
        loss, _, dh = reference_tree.tree_head_forward_backward(
            h, weight, nodes, tree.spans, targets, weights, dweight, dnodes, prior=prior, **settings
        )
        return float((loss * weights).sum()), (dh, dweight, dnodes)

    for got, array in zip(backward()[1], (h, weight, nodes), strict=True):
        want = numeric_gradient(lambda: backward()[0], array)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


@given(
    st.integers(0, 1000),
    shapes,
    st.sampled_from([1, 2, 10, 251]),
    st.sampled_from([1.0, 30.0]),
    st.booleans(),
)
def test_tree_head_probabilities_sum_to_one(seed, shape, vocab, scale, prior):
    head = make_head(seed, shape, vocab, 8, scale, prior, soft_cap=4.0 if seed % 2 else None)
    h = problem(seed, head, 3)[0]
    p = head.distribution(h)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5 * max(1, scale))
    want = reference_tree.tree_head_log_distribution(
        *(a.astype(np.float64) for a in (h, head.weight, head.nodes)),
        head.tree.spans,
        **reference_settings(head, np.float64),
    )
    np.testing.assert_allclose(p[:, head.tree.token_of_row], np.exp(want), atol=1e-5 * scale)
    # the probability of a token is the product over its path, whichever function is asked
    tokens = np.arange(vocab, dtype=np.int32)
    for x, row in zip(h, want, strict=True):
        log_p = head.log_prob(np.ascontiguousarray(np.broadcast_to(x, (vocab, 8))), tokens)
        np.testing.assert_allclose(log_p[head.tree.token_of_row], row, atol=1e-4 * scale, rtol=1e-5)


def test_tree_head_starts_at_the_prior():
    counts = np.array([50, 7, 0, 3, 900, 1, 2, 40, 11, 0, 6])
    p = (counts + 1) / (counts + 1).sum()
    for shape in ("huffman", "two-level", "balanced"):
        tree = build_tree(shape, counts)
        head = TreeHead(tree, np.zeros((11, 4), np.float32), log_prior=np.log(p).astype(np.float32))
        np.testing.assert_allclose(head.distribution(np.ones((1, 4), np.float32))[0], p, rtol=1e-5)


def test_init_nodes_is_the_weighted_mean_of_the_rows_below():
    rng = np.random.default_rng(2)
    counts = rng.integers(0, 50, 60)
    tree, weight = build_tree("huffman", counts), rng.standard_normal((60, 40)).astype(np.float32)
    nodes = init_nodes(tree, weight, counts)
    for m in range(1, tree.n_nodes):
        below = slice(tree.token_start[m], tree.leaf_end[m])
        share = counts[tree.token_of_row[below]] + 1.0
        np.testing.assert_allclose(nodes[m - 1], share @ weight[below] / share.sum(), rtol=1e-5, atol=1e-6)


def test_tree_head_extreme_logits_stay_finite():
    head = make_head(3, "adaptive", 251, 8, scale=300.0)
    arrays = problem(3, head, 40)
    got = run(head, *arrays)
    ref = run_reference(np.float64, head, *arrays)
    assert all(np.isfinite(a).all() for a in got)
    np.testing.assert_allclose(got[1], ref[1], rtol=1e-4, atol=0.1)
    h = arrays[0].copy()
    h[7] = np.nan  # a poisoned position must show, and only there
    nll = -head.log_prob(h, arrays[1])
    assert np.flatnonzero(np.isnan(nll)).tolist() == [7]


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="plain Python allocates the same and takes long")
def test_tree_head_holds_what_its_scratch_says():
    """The default tree of GPT-2's vocabulary at N = 8,192: at most 128 MB, all buffers of a call."""
    counts = np.floor(1e7 / np.arange(1, 50_258))
    head = TreeHead(dim=64, counts=counts)
    h, targets, weights = problem(0, head, 8192)
    head.forward_backward(h, targets, weights)
    (scratch,) = head._scratch.free
    used = scratch.nbytes
    assert {"hs", "dhs", "split_logits", "task_logits", "roots"} <= scratch.buffers.keys()
    assert scratch.buffers["roots"].size > 0
    # with 256 channels what belongs to positions and rows is four times as large, the logits are not
    by_dim = sum(scratch.buffers[name].nbytes for name in ("hs", "dhs", "roots"))
    assert used + 3 * by_dim <= 128 << 20


@pytest.mark.parametrize("shape", ["huffman", "two-level", "adaptive", "balanced"])
def test_tree_head_threads_rounds_and_bits(shape, monkeypatch):
    head = make_head(6, shape, 700, 24, prior=True, **ALL)
    arrays = problem(6, head, 333)
    before, threads = numba.get_num_threads(), min(2, numba.config.NUMBA_NUM_THREADS)
    results = []
    # one thread; two; two with kept logits of a few positions, so that there are many rounds and small chunks; and the
    # rows of the root not copied together
    usual = 1 << 23, 1 << 22, 1024
    for count, split, own, joined in (
        (1, *usual),
        (threads, *usual),
        (threads, 500, 3000, 1024),
        (threads, 500, 3000, 0),
    ):
        monkeypatch.setattr(tree_head, "JOINED", joined)
        monkeypatch.setattr(tree_plan, "SPLIT_FLOATS", split)
        monkeypatch.setattr(tree_plan, "TASK_FLOATS", own)
        numba.set_num_threads(count)
        try:
            results.append(run(head, *arrays))
            again = run(head, *arrays)
            in_place = run_in_place(head, *arrays)
        finally:
            numba.set_num_threads(before)
        for a, b, c in zip(results[-1], again, in_place, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_allclose(c, a, rtol=1e-4, atol=2e-5)
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


def test_tree_head_plan_gives_every_position_and_row_one_owner():
    rng = np.random.default_rng(0)
    for shape in ("huffman", "adaptive", "balanced"):
        tree = build_tree(shape, np.floor(1e5 / np.arange(1, 3001)))
        rows = np.sort((3000 * rng.random(2000) ** 3).astype(np.int32))
        spans, threads = tree.spans, 3
        kernel_tree = tree_head.make_tree(np.zeros((3000, 1), np.float32), np.zeros((len(spans) - 1, 1), "f"), spans)
        plan = tree_plan.make_plan(rows, kernel_tree, threads)
        assert kernel_tree.depth == tree.depth
        covered = np.concatenate([np.arange(a, b) for a, b in zip(plan.task_begin, plan.task_end, strict=True)])
        assert sorted(covered) == list(range(2000))
        assert sorted(plan.tasks) == list(range(len(plan.task_begin)))
        # a node is split or in one task, with exactly the positions whose target lies below it
        visited = [
            *zip(plan.visit_node, plan.visit_begin, plan.visit_end, strict=True),
            *zip(plan.piece_node, plan.piece_begin, plan.piece_end, strict=True),
        ]
        assert len({node for node, _, _ in visited}) == len(visited)
        for node, begin, end in visited:
            below = (rows >= spans[node, 0]) & (rows < spans[node, 4])
            assert np.array_equal(np.flatnonzero(below), np.arange(begin, end))
        paths = sum(len(tree.path(token)) for token in tree.token_of_row[rows])
        assert sum(end - begin for _, begin, end in visited) == paths
        assert len(plan.piece_node)
        assert (np.diff(plan.bounds) >= 0).all()
        assert plan.bounds[0, -1] == 2000


def test_tree_head_scratch_is_bounded():
    # the worst tree: all tokens in the root, the logits of 8,192 positions would take 1.6 GB
    widest, threads, n, dim = 50_257, numba.get_num_threads(), 8192, 256
    for width in (widest, 416):
        spans = np.array([[0, width, 1, 1, width]], np.int32)
        rows = np.sort(np.random.default_rng(0).integers(0, width, n).astype(np.int32))
        tree = tree_head.make_tree(np.zeros((width, 1), np.float32), np.zeros((0, 1), np.float32), spans)
        plan = tree_plan.make_plan(rows, tree, threads)
        floats = plan.split_floats + threads * plan.task_floats + threads * width + 2 * n * dim + 2 * n
        assert 4 * floats <= 128 << 20
        assert (plan.piece_end - plan.piece_begin).sum() in (n, 0)


@pytest.mark.parametrize(("shape", "prior"), [("adaptive", True), ("huffman", False)])
def test_tree_head_sampling_agrees_with_the_distribution(shape, prior):
    head = make_head(4, shape, 40, 8, scale=0.5, prior=prior)
    h = problem(4, head, 1)[0]
    p, draws = head.distribution(h)[0].astype(np.float64), 20_000
    rng = np.random.default_rng(0)
    many = np.ascontiguousarray(np.broadcast_to(h[0], (draws, 8)))
    found = np.bincount(head.sample(many, rng), minlength=40)
    likely = draws * p > 5
    chi2 = ((found - draws * p)[likely] ** 2 / (draws * p)[likely]).sum()
    # mean d, standard deviation sqrt(2 d): six of them is a chance below 1e-6
    assert chi2 < likely.sum() + 6 * np.sqrt(2 * likely.sum())


@given(st.integers(0, 1000), shapes, st.sampled_from([1, 2, 50]))
def test_tree_head_top_is_exact(seed, shape, vocab):
    head = make_head(seed, shape, vocab, 8, 0.5, prior=seed % 2 == 0, soft_cap=3.0 if seed % 3 == 0 else None)
    h = problem(seed, head, 1)[0]
    log_p = head.log_distribution(h)[0]
    for count in (1, 7, vocab + 1):
        ids, found = head.top(h[0], count)
        assert len(set(ids.tolist())) == min(count, vocab)
        np.testing.assert_allclose(found, np.sort(log_p)[::-1][:count], atol=1e-5)
        np.testing.assert_allclose(found, log_p[ids], atol=1e-5)


def test_tree_head_sampling_options_agree_with_the_dense_rule():
    head = make_head(8, "adaptive", 60, 8, scale=0.7)
    h = problem(8, head, 5)[0]
    p = head.distribution(h)
    for setting in (
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3},
        {"top_k": 1},
        {"temperature": 1.0, "top_k": 7, "top_p": 0.6},
        {"temperature": 0.8, "top_p": 0.5},
    ):
        for seed in range(20):
            got = head.sample(h, np.random.default_rng(seed), **setting)
            want = sample_rows(p, np.random.default_rng(seed), **setting)
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="top_k must be a whole number of at least 1"):
        head.sample(h, np.random.default_rng(0), top_k=0)


def test_tree_head_learns_a_token_never_seen_when_built():
    head = TreeHead(vocab_size=300, dim=8, counts=np.where(np.arange(300) == 123, 0, 50), shape="huffman")
    h = np.ones((1, 8), np.float32)
    target, one = np.array([123], np.int32), np.ones(1, np.float32)
    first = head.forward_backward(h, target, one)[1]
    assert set(head.parameters) == {"weight", "nodes.weight"} == set(head.gradients)
    for name, value in head.parameters.items():
        value -= 0.1 * head.gradients[name]
    assert head.forward_backward(h, target, one)[1] < first


def test_tree_head_sorts_more_leaves_than_16_bits_count():
    # sorted as 16-bit numbers, leaf row 65,536 would come before row 5
    vocab, dim = (1 << 16) + 1, 2
    rng = np.random.default_rng(7)
    width, starts = 512, range(0, vocab, 512)
    tree = tree_from_lists(
        [[], *(list(range(start, min(start + width, vocab))) for start in starts)],
        [list(range(1, len(starts) + 1)), *([] for _ in starts)],
    )
    weight = rng.standard_normal((vocab, dim)).astype(np.float32)
    head = TreeHead(tree, weight, nodes=rng.standard_normal((tree.n_nodes - 1, dim)).astype(np.float32))
    x = rng.standard_normal(dim).astype(np.float32)
    rows = np.array([vocab - 1, 5, 0, vocab - 1, 40_000, vocab - 2, 300], np.int32)
    targets = tree.token_of_row[rows]
    h = np.ascontiguousarray(np.broadcast_to(x, (len(rows), dim)))
    _, nll, dh = head.forward_backward(h, targets, np.ones(len(rows), np.float32))
    want = reference_tree.tree_head_log_distribution(x[None], weight, head.nodes, tree.spans)[0]
    np.testing.assert_allclose(-nll, want[rows], rtol=1e-5, atol=1e-4)
    for a, b in ((1, 0), (3, 0)):  # the same h and target: the same gradient; another target: another
        assert np.array_equal(dh[a], dh[b]) == (rows[a] == rows[b])


@pytest.mark.parametrize("threads", range(1, min(2, numba.config.NUMBA_NUM_THREADS) + 1))
def test_tree_head_splits_a_node_of_several_chunks(threads, monkeypatch):
    """A thread takes its share of a split node's positions CHUNK at a time; here 2 or 3 times."""
    rng = np.random.default_rng(9)
    below = [list(range(start, start + 5)) for start in (40, 45, 50)]
    tree = tree_from_lists([list(range(40)), *below], [[1, 2, 3], [], [], []])
    weight, nodes = (rng.standard_normal((rows, 8)).astype(np.float32) for rows in (55, 3))
    head = TreeHead(tree, weight, nodes=nodes, **ALL)
    # a root wider than a thread's own buffer is split on one thread too
    monkeypatch.setattr(tree_plan, "TASK_FLOATS", 20 * threads)
    arrays = problem(9, head, 2 * tree_plan.CHUNK + 200)
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        got = run(head, *arrays)
    finally:
        numba.set_num_threads(before)
    ref32, ref64 = (run_reference(dtype, head, *arrays) for dtype in (np.float32, np.float64))
    for name, a, r32, r64 in zip(("loss", "nll", "dh", "dweight", "dnodes"), got, ref32, ref64, strict=True):
        assert_as_accurate(a, r32, r64, 8, name)


def test_tree_head_functions_all_apply_the_cap_and_the_prior():
    """log_prob, distribution, the nodes' search and descent, each against float64 with cap and prior."""
    head = make_head(11, "adaptive", 60, 8, scale=1.5, prior=True, soft_cap=2.0)
    h, targets, weights = problem(11, head, 50)
    arrays = [a.astype(np.float64) for a in (h, head.weight, head.nodes)]
    both = reference_settings(head, np.float64)

    def log_p(**settings):
        by_row = reference_tree.tree_head_log_distribution(*arrays, head.tree.spans, **settings)
        return by_row[:, head.row_of_token]

    want = log_p(**both)
    for without in (log_p(soft_cap=head.soft_cap), log_p(**both | {"soft_cap": None})):
        assert np.abs(want - without).max() > 0.5  # the case can tell
        assert np.abs(want - without)[np.arange(50), targets].max() > 0.5
    np.testing.assert_allclose(head.log_prob(h, targets), want[np.arange(50), targets], atol=1e-4)
    np.testing.assert_allclose(head.forward_backward(h, targets, weights)[1], -want[np.arange(50), targets], atol=1e-4)
    np.testing.assert_allclose(head.log_distribution(h), want, atol=1e-4)
    np.testing.assert_allclose(head.distribution(h), np.exp(want), atol=1e-5)
    found = dict(zip(*head.top(h[0], 60), strict=True))
    np.testing.assert_allclose([found[token] for token in range(60)], want[0], atol=1e-4)
    draws = 20_000
    drawn = head.sample(np.ascontiguousarray(np.broadcast_to(h[0], (draws, 8))), np.random.default_rng(0))
    share = np.bincount(drawn, minlength=60) / draws
    assert np.abs(share - np.exp(want[0])).max() < 0.02 < np.abs(share - np.exp(log_p()[0])).max()


def test_tree_head_says_what_is_wrong():
    head = make_head(0, "adaptive", 50, 8)
    h = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 50\), got 50 at index 1; check the tokenizer"):
        head.log_prob(h, np.array([0, 50], np.int32))
    with pytest.raises(ValueError, match=r"h must have shape \(any, 8\), got \(2, 7\)"):
        head.log_prob(np.zeros((2, 7), np.float32), np.array([0, 5], np.int32))
    with pytest.raises(ValueError, match="weight must have shape"):
        TreeHead(head.tree, np.zeros((49, 8), np.float32))
    with pytest.raises(ValueError, match="give a tree, the tokens' counts or vocab_size"):
        TreeHead(dim=3)
    spans = head.tree.spans
    with pytest.raises(ValueError, match="the tree has 50 leaves, but weight has 49 rows"):
        tree_head.make_tree(head.weight[:49], head.nodes, spans)
