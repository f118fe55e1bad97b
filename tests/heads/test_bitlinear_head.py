"""The BitLinear head against its NumPy twin, central differences and autograd."""

import json
import shutil

import numpy as np
import pytest
from helpers import TINY, command, import_torch, numeric_gradient
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from flashlm_numba.heads import BitLinearHead, DenseHead
from flashlm_numba.kernels import _ternary_dots, reference, reference_mmf
from flashlm_numba.kernels.bitlinear import absmean_ternary
from flashlm_numba.kernels.bitlinear_head import bit_inputs, bit_logits, bit_rows
from flashlm_numba.kernels.ternary import pack_ternary
from flashlm_numba.model import checkpoint
from flashlm_numba.model.build import load_model
from flashlm_numba.system.threads import available_cores

options = st.fixed_dictionaries(
    {
        "label_smoothing": st.sampled_from([0.0, 0.1]),
        "z_loss": st.sampled_from([0.0, 1e-2]),
        "soft_cap": st.sampled_from([None, 5.0]),
    }
)


def problem(seed, rows, vocab, dim, scale=1.0, prior=False):
    """h, weight, norm, targets, loss weights, log prior."""
    rng = np.random.default_rng(seed)
    h = rng.standard_normal((rows, dim)).astype(np.float32) * np.float32(scale)
    weight = rng.standard_normal((vocab, dim)).astype(np.float32) * np.float32(0.5)
    norm = (1 + 0.3 * rng.standard_normal(dim)).astype(np.float32)
    targets = rng.integers(0, vocab, rows).astype(np.int32)
    weights = rng.uniform(0, 1, rows).astype(np.float32)
    log_prior = np.log(rng.dirichlet(np.ones(vocab)) + 1e-6).astype(np.float32) if prior else None
    return h, weight, norm, targets, weights, log_prior


def twin(dtype, h, weight, norm, targets, weights, log_prior, settings, *, rounded=True):
    """loss, nll, dh, dweight, dnorm of sum(weights * loss), with gradients straight through both roundings."""
    h, weight, norm, weights = (array.astype(dtype) for array in (h, weight, norm, weights))
    prior = None if log_prior is None else log_prior.astype(dtype)
    _, saved = reference_mmf.bitlinear_forward(h, norm, weight, rounded=rounded)
    y, rows = saved[:2]
    loss, nll, _ = reference.dense_head_forward(y, rows, targets, prior, **settings)
    dy, dweight = reference.dense_head_backward(weights, y, rows, targets, prior, **settings)
    dh, dnorm = reference.rmsnorm_backward(dy, h, norm, saved[4])
    return loss, nll, dh, dweight, dnorm


def undecided(h, norm):
    """Whether an input is so near to a half that a last bit decides how it is rounded."""
    y, _ = reference_mmf.rmsnorm(h.astype(np.float64), norm.astype(np.float64), 1e-6)
    steps = y * (127 / np.maximum(np.abs(y).max(1, keepdims=True, initial=0), 1e-5))
    return np.abs(np.abs(steps - np.floor(steps)) - 0.5).min(initial=1) < 1e-4


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 3, 13]),
    st.sampled_from([1, 2, 50, 513]),
    st.sampled_from([1, 8, 33, 257]),
    st.sampled_from([1e-9, 0.3, 1e4]),
    st.booleans(),
    options,
)
def test_head_matches_its_twin(seed, rows, vocab, dim, scale, prior, settings):
    arrays = problem(seed, rows, vocab, dim, scale, prior)
    h, weight, norm, targets, weights, log_prior = arrays
    head = BitLinearHead(weight, np.ones_like(weight), norm=norm, log_prior=log_prior, **settings)
    loss, nll, dh = head.forward_backward(h, targets, weights)
    if not rows:
        assert (head.dweight == 1).all()
        assert not head.gradients["norm.weight"].any()
        return
    np.testing.assert_array_equal(head.log_prob(h, targets), -nll)
    if undecided(h, norm):
        return
    truth = twin(np.float64, *arrays, settings)
    logits = float(np.abs(head.logits(h)).max())  # a loss is a difference of numbers as large as these
    steepest = float(weights.max() * max(1, reference_mmf.rmsnorm(h, norm, 1e-6)[1].max()))
    found = loss, nll, dh, head.dweight - 1, head.gradients["norm.weight"]
    for name, got, want in zip(("loss", "nll", "dh", "dweight", "dnorm"), found, truth, strict=True):
        # an error of a logit is one of a probability, relative to the row's whole weight
        size = max(1.0, logits) * max(1.0, 2 * settings["z_loss"] * logits)
        most = 1.0 if name in ("loss", "nll") else float(np.abs(want).max()) + 3e-2 * steepest
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5 * size * most, err_msg=name)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1, "z_loss": 0.01, "soft_cap": 3.0}])
def test_twins_gradients_are_the_derivatives_without_rounding(settings):
    h, weight, norm, targets, weights, prior = problem(5, 3, 6, 4, prior=True)
    arrays = [array.astype(np.float64) for array in (h, weight, norm)]

    def loss():
        found = twin(np.float64, *arrays, targets, weights, prior, settings, rounded=False)[0]
        return float((found * weights.astype(np.float64)).sum())

    gradients = twin(np.float64, *arrays, targets, weights, prior, settings, rounded=False)[2:]
    for got, array in zip(gradients, arrays, strict=True):
        np.testing.assert_allclose(got, numeric_gradient(loss, array), rtol=1e-5, atol=1e-8)


def test_gradients_agree_with_autograd():
    torch = import_torch()
    from torch_mmf import BitLinear

    h, weight, norm, targets, weights, _ = problem(2, 9, 70, 24)
    assert not undecided(h, norm)
    layer = BitLinear(24, 70).double()
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.norm.weight.copy_(torch.from_numpy(norm))
    x = torch.from_numpy(h).double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        layer(x), torch.from_numpy(targets).long(), label_smoothing=0.1, reduction="none"
    )
    (loss * torch.from_numpy(weights)).sum().backward()
    head = BitLinearHead(weight, norm=norm, label_smoothing=0.1)
    got, _, dh = head.forward_backward(h, targets, weights)
    np.testing.assert_allclose(got, loss.detach().numpy(), rtol=1e-5)
    for found, truth in (
        (dh, x.grad),
        (head.dweight, layer.weight.grad),
        (head.gradients["norm.weight"], layer.norm.weight.grad),
    ):
        np.testing.assert_allclose(found, truth.numpy(), rtol=1e-4, atol=1e-5 * np.abs(truth.numpy()).max())


@given(
    st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 5]), st.sampled_from([1, 3, 70]), st.sampled_from([1, 64, 300])
)
def test_logits_of_packed_weights_have_the_same_bits_in_every_variant(seed, rows, vocab, dim):
    h, weight, norm, *_ = problem(seed, rows, vocab, dim)
    values, scale = absmean_ternary(weight)
    packed = pack_ternary(values)
    q, scales, _ = bit_inputs(h, norm, scale)
    expected = (q[:, :dim].astype(np.int64) @ values.astype(np.int64).T).astype(np.float32) * scales[:, None]
    for variant in _ternary_dots.available():
        np.testing.assert_array_equal(bit_logits(h, norm, packed, scale, variant=variant), expected)


def test_training_scoring_and_generation_agree():
    """Generation's logits are exact sums of integers; training's are float32 products of the same rounded numbers."""
    h, weight, norm, targets, weights, prior = problem(3, 40, 900, 50, prior=True)
    head = BitLinearHead(weight, norm=norm, log_prior=prior, soft_cap=20.0)
    p = head.distribution(h)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    expected = np.log(p[np.arange(40), targets])
    np.testing.assert_allclose(head.log_prob(h, targets), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(-head.forward_backward(h, targets, weights)[1], expected, rtol=1e-5, atol=1e-5)
    logits = head.logits(h)
    for n in range(5):
        ids, values = head.top(h[n], 900)
        np.testing.assert_array_equal(logits[n][ids], values.astype(np.float32))
        assert (np.diff(values) <= 0).all()
    greedy = head.sample(h, np.random.default_rng(0), 0)
    np.testing.assert_array_equal(greedy, logits.argmax(1))


def test_it_is_the_dense_head_on_rounded_rows():
    h, weight, norm, targets, weights, _ = problem(4, 30, 600, 32)
    head = BitLinearHead(weight, norm=norm, z_loss=1e-3)
    values, scale = absmean_ternary(weight)
    dense = DenseHead(values * scale, z_loss=1e-3)
    rounded, _ = bit_rows(h, norm)
    loss, nll, _ = head.forward_backward(h, targets, weights)
    want = dense.forward_backward(rounded, targets, weights)
    np.testing.assert_array_equal(loss, want[0])
    np.testing.assert_array_equal(nll, want[1])
    np.testing.assert_array_equal(head.dweight, dense.dweight)


def test_changed_rows_count_after_prepare():
    h, weight, norm, targets, *_ = problem(6, 5, 40, 16)
    head = BitLinearHead(weight.copy(), norm=norm)
    before = head.log_prob(h, targets), head.logits(h)
    head.weight[:] = -weight
    head.prepare()
    other = BitLinearHead(-weight, norm=norm)
    for got, want, old in zip(
        (head.log_prob(h, targets), head.logits(h)), (other.log_prob(h, targets), other.logits(h)), before, strict=True
    ):
        np.testing.assert_array_equal(got, want)
        assert not np.array_equal(got, old)


def test_gradients_accumulate_and_are_replaced():
    h, weight, norm, targets, weights, _ = problem(7, 5, 40, 16)
    shared = np.ones_like(weight)
    head = BitLinearHead(weight, norm=norm, embedding_gradient=shared)
    head.forward_backward(h, targets, weights)
    once = [gradient.copy() for gradient in head.gradients.values()]
    assert (shared == 1).all()
    head.forward_backward(h, targets, weights)
    for gradient, one in zip(head.gradients.values(), once, strict=True):
        np.testing.assert_allclose(gradient, 2 * one, rtol=1e-5)
    head.forward_backward(h, targets, weights, accumulate=False)
    for gradient, one in zip(head.gradients.values(), once, strict=True):
        np.testing.assert_array_equal(gradient, one)
    assert not shared.any()


def test_results_do_not_depend_on_threads(threads):
    h, weight, norm, targets, *_ = problem(8, 50, 1300, 24)
    results = []
    for count in {1, available_cores()}:
        threads(count)
        head = BitLinearHead(weight, norm=norm)
        results.append((head.logits(h), head.sample(h, np.random.default_rng(0)), head.log_prob(h, targets)))
    for result in results[1:]:
        np.testing.assert_array_equal(result[0], results[0][0])
        np.testing.assert_array_equal(result[1], results[0][1])
        np.testing.assert_allclose(result[2], results[0][2], rtol=1e-5)


def test_what_does_not_fit_is_refused():
    weight = np.ones((9, 4), np.float32)
    with pytest.raises(ValueError, match=r"norm must have shape \(4\), got \(5,\)"):
        BitLinearHead(weight, norm=np.ones(5, np.float32))
    head = BitLinearHead(weight)
    with pytest.raises(ValueError, match="norm must have shape"):
        head.log_prob(np.ones((2, 5), np.float32), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="packed must have shape"):
        bit_logits(np.ones((1, 300), np.float32), np.ones(300, np.float32), np.zeros((4, 64), np.uint8), 1.0)


# --- a run with this head ---

OWN = "phases=6:2x16x2", "ngram_copy_output=add"  # the loss is the head's alone
SETTINGS = [part for setting in (*TINY[:4], *OWN, *TINY[5:]) for part in ("--set", setting)]


@pytest.fixture(scope="module")
def bitlinear_run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "bitlinear"
    done = command("train", corpus, "--head", "bitlinear", "--steps", 4, "--out", folder, "--threads", 1, *SETTINGS)
    assert done.exit_code == 0, done.output
    return folder


def test_it_trains_and_resumes_bit_for_bit(bitlinear_run, corpus, tmp_path):
    lines = [json.loads(line) for line in (bitlinear_run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(bitlinear_run, run)
    assert command("train", "--resume", run, "--steps", 6).exit_code == 0
    train = ("train", corpus, "--head", "bitlinear", "--steps", 6, "--threads", 1, *SETTINGS)
    assert command(*train, "--out", whole).exit_code == 0
    once, twice = (checkpoint.load(folder / "checkpoints" / "step-6", "model") for folder in (whole, run))
    assert once.keys() == twice.keys()
    for name, value in once.items():
        np.testing.assert_array_equal(value, twice[name], err_msg=name)


def test_an_exported_file_packs_the_head_and_computes_the_same(bitlinear_run, corpus, tmp_path):
    file = tmp_path / "model.safetensors"
    assert command("export", bitlinear_run, file, "--rows", "float").exit_code == 0
    with safe_open(file, framework="numpy") as stored:
        assert stored.get_tensor("head.weight.base3").shape == (50_257, 4)  # 16 weights, five per byte
        scale = stored.get_tensor("head.weight.scale")
    own, other = load_model(bitlinear_run), load_model(file)
    values, expected = absmean_ternary(own.model.parameters["head.weight"])
    assert scale == [expected]
    np.testing.assert_array_equal(other.model.parameters["head.weight"], values * expected)
    again, same = absmean_ternary(other.model.parameters["head.weight"])  # of what is a scale times ternary values
    np.testing.assert_array_equal(again, values)
    assert same == expected
    ids = np.random.default_rng(0).integers(0, 50_257, (2, 9))
    np.testing.assert_array_equal(own.model.logits(ids), other.model.logits(ids))
    scores = [json.loads(command("eval", path, corpus, "--json").stdout)["nll"] for path in (bitlinear_run, file)]
    assert scores[0] == scores[1]
    texts = [
        command("generate", path, "--prompt", "The people", "--seed", 3, "--max-tokens", 9).stdout
        for path in (bitlinear_run, file)
    ]
    assert texts[0] == texts[1]
    infos = [json.loads(command("info", path, "--json").stdout) for path in (bitlinear_run, file)]
    for info in infos:
        assert info["ternary_parameters"] == 50_257 * 16 + 16 * 16 + 3 * 16 * 24
        assert info["parameters_by_group"]["head"] == 50_257 * 16 + 16
    assert infos[0]["bytes"]["packed"] == infos[1]["bytes"]["packed"]
    assert command("generate", file, "--int8-head").exit_code != 0


def test_training_starts_from_an_exported_head(bitlinear_run, corpus, tmp_path):
    file, out = tmp_path / "model.safetensors", tmp_path / "tuned"
    assert command("export", bitlinear_run, file, "--rows", "float").exit_code == 0
    settings = [part for text in TINY if text.startswith(("phases", "validat", "sample")) for part in ("--set", text)]
    rates = ("--set", "adamw_lr=1e-9", "--set", "normuon_lr=0")
    done = command("train", corpus, "--init", file, "--steps", 1, "--out", out, *settings, *rates)
    assert done.exit_code == 0, done.output
    before, after = (load_model(path).model.parameters["head.weight"] for path in (file, out))
    (values, scale), (again, other) = absmean_ternary(before), absmean_ternary(after)
    np.testing.assert_array_equal(values, again)
    assert other == pytest.approx(scale, rel=1e-5)
