"""The PyTorch baseline of the benchmarks; its gradients: test_against_torch.py."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import assert_as_accurate, import_torch

from flashlm_numba.heads.label_tree import tree_from_lists
from flashlm_numba.heads.tree_shapes import SHAPES, build_tree
from flashlm_numba.kernels.reference_tree import tree_head_forward_backward
from flashlm_numba.model.config import ModelConfig

torch = import_torch()

from tools.baseline import evaluate, heads, optimizer, tree_head  # noqa: E402  all need torch
from tools.baseline.__main__ import main  # noqa: E402
from tools.baseline.model import BaselineModel  # noqa: E402
from tools.baseline.step import training_step  # noqa: E402

SMALL = ModelConfig(vocab_size=50_257, dim=8, ffn_dim=12, groups=2, kernel_size=3, dilations=(1, 3))  # field 17


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    """Small shapes: torch's threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def test_the_baseline_counts_are_those_of_flashlm_v3():
    model = BaselineModel()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == 13_555_969
    groups = optimizer.parameter_groups(model)
    assert {group: sum(sizes[n] for n in names) for group, names in groups.items()} == {
        "normuon": 590_336,
        "decay": 12_964_096,
        "no_decay": 1_537,
    }
    assert len(groups["normuon"]) == 5
    assert sorted(n for names in groups.values() for n in names) == sorted(sizes)


def test_dense_loss_is_its_definition_in_float64():
    h, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    targets, prior = torch.randint(0, 11, (7,)), torch.randn(11, dtype=torch.float64)
    loss, nll = heads.dense_loss(h, weight, targets, label_smoothing=0.1, z_loss=0.01, soft_cap=2.0, log_prior=prior)
    logits = 2 * np.tanh(h.numpy() @ weight.numpy().T / 2) + prior.numpy()
    log_z = np.log(np.exp(logits).sum(axis=1))
    log_p = logits - log_z[:, None]
    expected = -log_p[np.arange(7), targets.numpy()]
    np.testing.assert_allclose(nll.numpy(), expected)
    smoothed = 0.9 * expected - 0.1 * log_p.mean(axis=1) + 0.01 * log_z**2
    np.testing.assert_allclose(loss.numpy(), smoothed)


def test_the_baseline_takes_its_state_from_numpy_and_weighs_positions():
    first, second = BaselineModel(SMALL), BaselineModel(SMALL)
    second.state_from_numpy(first.params_to_numpy())
    ids, targets = np.random.default_rng(0).integers(0, 50_257, (2, 2, 5), dtype=np.int32)
    weights = np.linspace(0, 0.2, 10, dtype=np.float32)
    loss, _ = first.loss_and_grad(ids, targets, weights)
    again, _ = second.loss_and_grad(ids, targets, weights)
    np.testing.assert_array_equal(loss, again)
    gradients = second.grads_to_numpy()
    assert not gradients["router.weight"].any()
    second.loss_and_grad(ids, targets, weights)  # adds
    np.testing.assert_allclose(
        second.grads_to_numpy()["blocks.0.mixer.out.weight"], 2 * gradients["blocks.0.mixer.out.weight"]
    )
    halved = {name: a[:1] for name, a in first.params_to_numpy().items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        second.state_from_numpy(halved)


def test_adaptive_head_scores_the_frequency_rank_of_a_token():
    counts = np.random.default_rng(0).integers(0, 1000, SMALL.vocab_size)
    ranks = heads.frequency_ranks(counts)
    assert counts[np.argsort(ranks)][:-1].tolist() == sorted(counts, reverse=True)[:-1]
    model = BaselineModel(SMALL, ranks=ranks, div_value=2.0)
    h, targets = torch.randn(6, 8), torch.tensor([0, 5, 1_000, 20_000, 50_256, 7])
    _, nll = model.losses(h, targets)
    everything = model.adaptive.log_prob(h)
    np.testing.assert_allclose(everything.exp().sum(dim=1).detach(), 1, rtol=1e-4)
    expected = -everything[torch.arange(6), torch.as_tensor(ranks)[targets]]
    np.testing.assert_allclose(nll, expected.detach(), rtol=1e-5)
    with pytest.raises(ValueError, match="the adaptive head knows no"):
        model.losses(h, targets, label_smoothing=0.1)


def some_tree(shape, vocab):
    counts = 10_000 // np.arange(1, vocab + 1)
    if shape == "uneven":  # tokens at every level, and a node with a single child
        return tree_from_lists([[0], [1, 2], [], [3, 4, 5], [6]], [[1, 2], [3], [4], [], []])
    rows = np.random.default_rng(1).standard_normal((vocab, 4)) if shape == "clustered" else None
    return build_tree(shape, counts, rows=rows)


@pytest.mark.parametrize(
    ("shape", "vocab"), [(s, 300) for s in SHAPES] + [("uneven", 7), ("balanced", 5), ("huffman", 2)]
)
@pytest.mark.parametrize("n", [1, 40])
def test_tree_head_by_hand_agrees_with_the_reference(monkeypatch, shape, vocab, n):
    monkeypatch.setattr(tree_head, "SHARED_FLOP", 6.0 * 6 * 20 * 20)  # some nodes on either side
    tree = some_tree(shape, vocab)
    rng = np.random.default_rng(0)
    h, weight, nodes = (rng.standard_normal((rows, 6)) for rows in (n, vocab, tree.n_nodes - 1))
    rows = tree.row_of_token[rng.integers(0, vocab, n)]
    expected = {}
    for dtype in (np.float32, np.float64):
        x, w, m = (array.astype(dtype) for array in (h, weight, nodes))
        dw, dm = np.zeros_like(w), np.zeros_like(m)
        weights = np.full(n, 1 / n, dtype)
        loss, _, dx = tree_head_forward_backward(x, w, m, tree.spans, rows, weights, dw, dm)
        expected[dtype] = (loss.mean(), dx, dw, dm)
        call = tree_head.tree_head(x, w, m, tree.spans, rows, threads=1)
        for _ in range(2):  # the second call starts from a clean gradient too
            got = [tensor.numpy() for tensor in call()]
        if dtype is np.float64:
            for found, truth in zip(got, expected[dtype], strict=True):
                np.testing.assert_allclose(found, truth, rtol=1e-9, atol=1e-12)
        else:
            got32 = got
    for name, found, ref32, ref64 in zip(("loss", "dh", "dw", "dnodes"), got32, *expected.values(), strict=True):
        assert_as_accurate(found, ref32, ref64, name=name)


@pytest.mark.parametrize("variant", ["v3", "published"])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_normuon_steps_have_the_norm_of_their_variant(variant, shape):
    parameter = torch.nn.Parameter(torch.randn(shape))
    normuon = optimizer.NorMuon([parameter], lr=0.5, variant=variant)
    for _ in range(3):
        before = parameter.detach().clone()
        parameter.grad = torch.randn(shape)
        normuon.step()
        norm = float((parameter.detach() - before).norm()) / 0.5
        if variant == "v3":
            assert norm == pytest.approx(0.2 * math.sqrt(shape[0] * shape[1]), rel=1e-4)
        else:  # all singular values of the orthogonalised momentum lie near one
            expected = math.sqrt(min(shape)) * math.sqrt(max(1, shape[0] / shape[1]))
            assert norm == pytest.approx(expected, rel=0.35)


def test_newton_schulz_gives_singular_values_near_one():
    for shape in ((20, 6), (6, 20)):
        s = torch.linalg.svdvals(optimizer.newton_schulz(torch.randn(shape)))
        assert 0.6 < float(s.min()) <= float(s.max()) < 1.3


def test_schedule_warms_up_holds_and_decays():
    rates = [optimizer.schedule(step, warmup=4, total=20, decay=5) for step in range(20)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose(rates[14:], [1, 1, 0.8, 0.6, 0.4, 0.2])


class Documents:
    """What score() needs of a split."""

    n_bytes = 1_000

    def __init__(self, *documents):
        self.list = [np.asarray(d, np.int32) for d in documents]

    def documents(self, max_tokens=None):
        assert max_tokens is None
        return iter(self.list)


def test_score_counts_every_token_once_whatever_the_windows():
    rng = np.random.default_rng(0)
    split = Documents(*(rng.integers(0, 50_256, n) for n in (1, 16, 17, 18, 70, 131)))
    model = BaselineModel(SMALL, embedding_std=0.5).double()
    total = 0.0
    for document in split.list:  # one pass over each whole document
        inputs = np.concatenate([[29], document[:-1]])
        total += model.loss_and_grad(inputs[None], document[None])[1].sum()
    expected = total / 253
    for length, rows in ((32, 1), (33, 4), (200, 8)):
        got = evaluate.score(model, split, eot=29, length=length, rows=rows)
        assert got["tokens"] == 253
        assert got["nll"] == pytest.approx(expected, abs=1e-9)
    assert got["bits_per_byte"] == pytest.approx(total / math.log(2) / 1_000)
    with pytest.raises(ValueError, match="leave none to score"):
        next(evaluate.scored_windows(split.list[0], context=16, length=16, eot=29))


def test_training_step_at_a_share_of_the_positions_trains():
    model = BaselineModel(SMALL)
    optimizers = optimizer.Optimizers(model, adamw_lr=0.02)
    ids = torch.randint(0, 30, (2, 4, 16))
    clock = {}
    losses = [
        training_step(model, optimizers, [(ids[0], ids[0]), (ids[1], ids[1])], positions=0.5, clock=clock, z_loss=1e-4)
        for _ in range(30)
    ]
    assert losses[-1] < losses[0] - 2
    assert set(clock) == {"trunk", "head", "optimizer"}


def run(*arguments):
    """Lines of JSON that a command prints."""
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.output.splitlines()]


@pytest.mark.slow
def test_train_command_reads_our_shards_and_validates(corpus):
    for head in ("dense", "adaptive"):
        lines = run(
            "train",
            corpus,
            "--head",
            head,
            "--steps",
            2,
            "--batch",
            "1:2x8x2,2:1x16",
            "--no-final",
            "--validate-tokens",
            30,
            "--validate-every",
            0,
            "--normuon",
            "published",
            "--threads",
            1,
        )
        assert lines[0]["versions"]["torch"]
        marks = lines[2:]
        assert [(m["step"], m["tokens"]) for m in marks] == [(0, 0), (1, 32), (2, 48)]
        assert all(6 < m["val_nll"] < 13 and m["val_tokens"] == 30 for m in marks)
        assert marks[-1]["loss"] > 0
    lines = run(
        "train",
        corpus,
        "--steps",
        3,
        "--batch",
        "2x8",
        "--validate-tokens",
        30,
        "--validate-every",
        1e9,
        "--mark",
        1e-9,
        "--mark",
        2e-9,
        "--mark",
        60,
        "--threads",
        1,
    )[2:]
    # a mark is due at the end of the first step that passes it; one that the end comes before is left out
    assert [(m["step"], "mark" in m) for m in lines] == [(1, True), (2, True), (3, False)]
    assert all(m["val_tokens"] > 30 for m in lines)
