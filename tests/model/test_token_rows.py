"""An embedding of its own width: its gradients, decoding, and every place that stores or counts it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers import TINY, assert_as_accurate, command
from safetensors.numpy import load_file

import flashlm_numba as fl
from flashlm_numba.heads import BitLinearHead, DenseHead, TreeHead
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import EMBEDDING, PROJECTION, initial_parameters
from flashlm_numba.model.recipes import from_recipe
from flashlm_numba.model.sizes import packed_bytes
from flashlm_numba.system.errors import UserError

V, E, C = 60, 7, 24
CONV = ModelConfig(V, C, 20, 4, embedding_dim=E, dilations=(1, 3), mixer_residual_scale=0.3, ffn_residual_scale=0.01)
COPIES = {"ngram_copy_orders": (1, 2), "ngram_copy_reach": 30}
CONFIGS = {
    "plain": CONV,
    "add": replace(CONV, **COPIES),
    "mixture": replace(CONV, **COPIES, ngram_copy_output="mixture"),
    "mlgru": replace(CONV, mixer="mlgru", linear="bitlinear", n_blocks=2, n_passes=1),
}
HEADS = {
    "dense": DenseHead,
    "tree": lambda weight, dweight: TreeHead(weight=weight, dweight=dweight, counts=np.arange(V)[::-1]),
    "bitlinear": lambda weight, dweight: BitLinearHead(weight.copy(), embedding_gradient=dweight),
}


def parameters_of(config, seed=0):
    parameters = initial_parameters(config, seed, embedding_std=0.5)
    rng = np.random.default_rng(seed)
    for name, value in parameters.items():
        if name.startswith(("ngram", "leaky")) or name == PROJECTION:
            value += rng.standard_normal(value.shape).astype(np.float32) * np.float32(0.2)
    return parameters


def batch(seed, rows=2, length=30):
    ids = np.random.default_rng(seed).integers(0, V, (rows, length + 1)).astype(np.int32)
    return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])


def with_rows(config, parameters):
    """The same model with the product as an embedding of full width."""
    own = {name: value.copy() for name, value in parameters.items() if name != PROJECTION}
    own[EMBEDDING] = parameters[EMBEDDING] @ parameters[PROJECTION]
    return replace(config, embedding_dim=None), own


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_computes_with_the_product_and_learns_by_the_chain_rule(kind, head):
    config, parameters, (ids, targets) = CONFIGS[kind], parameters_of(CONFIGS[kind]), batch(1)
    weights = np.full(ids.size, 1 / ids.size, np.float32)
    wide_config, wide_parameters = with_rows(config, parameters)
    own, wide = Model(config, parameters, HEADS[head]), Model(wide_config, wide_parameters, HEADS[head])
    for accumulate in (False, True):  # two micro-batches
        losses = [model.loss_and_grad(ids, targets, weights, accumulate=accumulate)[0] for model in (own, wide)]
        assert np.array_equal(*losses)
    drows = wide.gradients[EMBEDDING].astype(np.float64)
    table, projection = (parameters[name].astype(np.float64) for name in (EMBEDDING, PROJECTION))
    order = np.arange(V) if own.head.row_of_token is None else slice(None)
    for name, truth in ((EMBEDDING, drows @ projection.T), (PROJECTION, table.T @ drows)):
        plain = truth.astype(np.float32)
        assert_as_accurate(
            own.gradients[name][order] if name == EMBEDDING else own.gradients[name], plain, truth, 64, name
        )
    for name, gradient in wide.gradients.items():
        if name != EMBEDDING:
            assert np.array_equal(own.gradients[name], gradient), name
    own.zero_grad()
    assert not any(gradient.any() for gradient in own.gradients.values())
    again = own.loss_and_grad(ids, targets, weights)[0]
    assert np.array_equal(again, losses[0])
    np.testing.assert_allclose(own.gradients[PROJECTION], truth / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [EMBEDDING, PROJECTION])
@pytest.mark.parametrize("kind", ["plain", "add", "mixture"])
def test_gradients_are_those_of_central_differences(kind, name):
    config, parameters, (ids, targets) = CONFIGS[kind], parameters_of(CONFIGS[kind], 3), batch(4)
    model = Model(config, parameters, DenseHead)
    weights = np.full(ids.size, 1 / ids.size, np.float32)
    model.loss_and_grad(ids, targets, weights)
    direction = np.random.default_rng(5).standard_normal(parameters[name].shape).astype(np.float32)
    found = float((model.gradients[name].astype(np.float64) * direction).sum())
    before, losses = parameters[name].copy(), []
    for step in (1e-3, -1e-3):
        model.parameters[name][...] = before + np.float32(step) * direction
        model.sync_weights()
        losses.append(float(model.loss_and_grad(ids, targets, weights)[0].mean(dtype=np.float64)))
    assert found == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=2e-2, abs=1e-3)


def test_gradients_are_those_of_autograd():
    torch = pytest.importorskip("torch")
    from tools.baseline.model import BaselineModel

    config, parameters, (ids, targets) = CONV, parameters_of(CONV, 6), batch(7)
    weights = np.full(ids.size, 1 / ids.size, np.float32)
    model = Model(config, {name: value.copy() for name, value in parameters.items()}, DenseHead)
    model.loss_and_grad(ids, targets, weights)
    found = {}
    for dtype in (torch.float32, torch.float64):
        table, projection = (
            torch.tensor(parameters[name], dtype=dtype, requires_grad=True) for name in (EMBEDDING, PROJECTION)
        )
        rows = table @ projection
        wide_config, wide_parameters = with_rows(config, parameters)
        theirs = BaselineModel(wide_config).to(dtype)
        theirs.state_from_numpy(wide_parameters)
        theirs.embedding.weight.data = rows.detach().clone()
        theirs.loss_and_grad(ids, targets, weights)
        rows.backward(theirs.embedding.weight.grad)
        found[dtype] = {EMBEDDING: table.grad.numpy(), PROJECTION: projection.grad.numpy()}
    for name in (EMBEDDING, PROJECTION):
        assert_as_accurate(model.gradients[name], found[torch.float32][name], found[torch.float64][name], 16, name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_decoding_a_token_at_a_time_gives_the_hidden_states_of_forward(kind):
    model = Model(CONFIGS[kind], parameters_of(CONFIGS[kind], 8), DenseHead)
    ids = batch(9, 1, 25)[0]
    h = model.forward(ids)
    state, last = model.prefill(ids[0, :10])
    np.testing.assert_allclose(last[0], h[9], rtol=1e-4, atol=1e-4)
    for t in range(10, ids.shape[1]):
        np.testing.assert_allclose(model.decode_step(state, int(ids[0, t]))[0], h[t], rtol=1e-4, atol=1e-4)


SETTINGS = [part for setting in (*TINY, "embedding_dim=5", "ema=0.5") for part in ("--set", setting)]


@pytest.fixture(scope="module")
def narrow(corpus, tmp_path_factory):
    """A trained run whose embedding has five channels of sixteen."""
    folder = tmp_path_factory.mktemp("narrow") / "run"
    done = command("train", corpus, "--out", folder, "--steps", 4, "--threads", 1, *SETTINGS)
    assert done.exit_code == 0, done.output
    return folder


def test_a_run_is_stored_counted_and_resumed(narrow, corpus, tmp_path):
    tensors = load_file(narrow / "checkpoints" / "step-4" / "model.safetensors")
    assert tensors[EMBEDDING].shape == (50_257, 5)
    assert tensors[PROJECTION].shape == (5, 16)
    info = json.loads(command("info", narrow, "--json").stdout)
    assert info["parameters_by_group"]["embedding"] == 50_257 * 5 + 5 * 16
    shapes = {EMBEDDING: (50_257, 5), PROJECTION: (5, 16)}
    assert packed_bytes(shapes, ()) == 50_257 * (5 + 2) + 4 * 5 * 16
    cut = tmp_path / "cut"
    words = ("train", corpus, "--out", cut, "--steps", 2, "--threads", 1, *SETTINGS)
    assert command(*words, "--set", "phases=4:2x16x2").exit_code == 0
    assert command("train", "--resume", cut, "--steps", 4).exit_code == 0


@pytest.mark.parametrize("rows", ["float", "int8", "int4"])
def test_an_export_computes_as_the_run_does(narrow, corpus, tmp_path, rows):
    file = tmp_path / "model.safetensors"
    assert command("export", narrow, file, "--rows", rows).exit_code == 0
    run, exported = fl.load(narrow), fl.load(file)
    scores = [model.score("the people of this nation").token_nll for model in (run, exported)]
    if rows == "float":
        assert np.array_equal(*scores)
        assert exported.generate("the", max_tokens=4, seed=1) == run.generate("the", max_tokens=4, seed=1)
    else:
        np.testing.assert_allclose(*scores, atol=0.1)
    folder = tmp_path / "hub"
    assert command("export", narrow, "--hub", folder, "--rows", rows).exit_code == 0
    assert np.array_equal(fl.load(folder).score("the people of this nation").token_nll, scores[1])
    start = ("train", corpus, "--init", file, "--steps", 1, "--out", tmp_path / "next", "--set", "phases=2x16")
    assert command(*start).exit_code == 0


def test_a_matmul_free_lm_with_one_is_read_as_a_whole(corpus, tmp_path):
    small = ("dim=16", "embedding_dim=5", "ffn_dim=24", "n_blocks=1", "phases=2x16", "sample_tokens=2")
    words = [part for setting in small for part in ("--set", setting)]
    run, file = tmp_path / "run", tmp_path / "model.safetensors"
    done = command("train", corpus, "--recipe", "mmf", "--steps", 1, "--out", run, "--threads", 1, *words)
    assert done.exit_code == 0, done.output
    assert command("export", run, file, "--rows", "float").exit_code == 0
    texts = [
        command("generate", path, "--prompt", "the", "--max-tokens", 3, "--seed", 1).stdout for path in (run, file)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("width", ["16", "17", "0"])
def test_a_width_that_is_none_is_refused(width):
    with pytest.raises(UserError, match=r"model.embedding_dim must be (below model.dim|at least 1)"):
        from_recipe("default", ["dim=16", "groups=4", f"embedding_dim={width}"])
