"""The MatMul-free LM as a choice of settings: training, resuming, scoring, generating, exporting, refusals."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
from helpers import TINY, command

from flashlm_numba.heads import DenseHead
from flashlm_numba.inference.evaluate import score, token_nll
from flashlm_numba.kernels.bitlinear import absmean_ternary
from flashlm_numba.model import packed
from flashlm_numba.model.build import load_model, read_trained
from flashlm_numba.model.config import ModelConfig, RunConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters, model_parameters, ternary_names
from flashlm_numba.model.recipes import from_recipe
from flashlm_numba.model.settings import run_from_json
from flashlm_numba.model.trained import first_model
from flashlm_numba.training.optimizer import Optimizer

MMF = ("mixer=mlgru", "linear=bitlinear")
SHARED = [setting for setting in TINY if not setting.startswith(("groups", "dilations"))]  # what mlgru reads too
OWN = (*SHARED, *MMF, "dim=18", "ffn_dim=23", "n_blocks=2", "n_passes=1")  # multiples of nothing
CONFIG = ModelConfig(60, dim=50, ffn_dim=134, mixer="mlgru", linear="bitlinear", n_blocks=3, n_passes=1)


def sets(settings):
    return [part for setting in settings for part in ("--set", setting)]


def train(corpus, folder, *arguments, settings=OWN):
    done = command("train", corpus, "--out", folder, "--threads", 1, *arguments, *sets(settings))
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A trained run: its folder."""
    return train(corpus, tmp_path_factory.mktemp("runs") / "mmf", "--steps", 8)


def some_model(config=CONFIG, seed=0):
    return Model(config, initial_parameters(config, seed, embedding_std=1.0), DenseHead)


@pytest.mark.parametrize("head", ["dense", "sampled"])
def test_the_default_recipe_trains_with_every_head(corpus, tmp_path, head):
    """With the recipe's own n-gram copies, residual scales and passes; run is with the tree."""
    folder = train(corpus, tmp_path / "run", "--steps", 3, "--head", head, settings=(*SHARED, *MMF))
    assert load_model(folder).model.config.ngram_copy_orders


def test_training_lowers_the_loss():
    config = dataclasses.replace(CONFIG, n_blocks=2)
    model, rng = some_model(config), np.random.default_rng(0)
    optimizer = Optimizer(model.parameters, model.gradients)
    losses = []
    for _ in range(60):
        text = np.cumsum(rng.integers(1, 3, (4, 33)), 1).astype(np.int32) % 60  # the next token is one of two
        ids, targets = np.ascontiguousarray(text[:, :-1]), np.ascontiguousarray(text[:, 1:])
        loss, _, _ = model.loss_and_grad(ids, targets, np.full(ids.size, 1 / ids.size, np.float32), accumulate=False)
        losses.append(float(loss.mean()))
        optimizer.step(0.02, 0.01, 1.0)
        model.sync_weights()
    assert losses[0] > 4
    assert losses[-1] < 1.5  # ln 2 is the least; the path there depends on the processor


def test_a_resumed_run_has_the_bits_of_one_without_a_pause(run, corpus, tmp_path):
    folder = train(corpus, tmp_path / "run", "--steps", 8)
    shutil.rmtree(folder / "checkpoints" / "step-8")
    assert command("train", "--resume", folder).exit_code == 0
    ours, theirs = (read_trained(path).tensors for path in (folder, run))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_an_exported_model_is_exact(run, corpus, tmp_path):
    """The file holds ternary values and a scale, and the model computes the same bits from them."""
    path = tmp_path / "model.safetensors"
    assert command("export", run, path, "--rows", "float").exit_code == 0
    trained, exported = load_model(run), load_model(path)
    for name in ternary_names(trained.run.model):
        for got, want in zip(
            absmean_ternary(exported.model.parameters[name]),
            absmean_ternary(trained.model.parameters[name]),
            strict=True,
        ):
            np.testing.assert_array_equal(got, want, err_msg=name)
    ids = np.random.default_rng(0).integers(0, 1000, (2, 30)).astype(np.int32)
    np.testing.assert_array_equal(exported.model.forward(ids), trained.model.forward(ids))
    own, other = (json.loads(command("eval", model, corpus, "--json").stdout) for model in (run, path))
    assert own == other
    texts = [
        command("generate", m, "--prompt", "The people", "--max-tokens", 20, "--seed", 3).stdout for m in (run, path)
    ]
    assert texts[0] == texts[1] != ""
    infos = [json.loads(command("info", model, "--json").stdout) for model in (run, path)]
    assert infos[0]["receptive_field"] is infos[1]["receptive_field"] is None
    assert infos[0]["parameters_by_group"] == infos[1]["parameters_by_group"]


def test_training_goes_on_from_an_exported_model(run, corpus, tmp_path):
    path = tmp_path / "model.safetensors"
    assert command("export", run, path).exit_code == 0
    done = command("train", corpus, "--out", tmp_path / "run", "--steps", 1, "--init", path, "--set", "phases=2x16")
    assert done.exit_code == 0, done.output
    exported, config = read_trained(path), load_model(run).run
    first = first_model(dataclasses.replace(config, init=str(path)), np.ones(config.model.vocab_size, np.int64))
    for name in ternary_names(config.model):
        values, scale = absmean_ternary(first.parameters[name])
        want, want_scale = absmean_ternary(exported.tensors[name])
        np.testing.assert_array_equal(values, want, err_msg=name)
        assert scale == pytest.approx(want_scale, rel=1e-6)


def test_both_activations_are_the_same_arithmetic(run, corpus):
    found = [
        json.loads(command("eval", run, corpus, "--json", "--activations", kind).stdout) for kind in ("int8", "float")
    ]
    assert found[0]["nll"] == found[1]["nll"]


def test_prefill_steps_and_a_whole_text_have_the_same_bits():
    model, rng = some_model(), np.random.default_rng(0)
    ids = rng.integers(0, 60, 1_100).astype(np.int32)  # more than one piece
    h = model.forward(ids[None])
    state, last = model.prefill(ids[:700])
    np.testing.assert_array_equal(last[0], h[699])
    for t in range(700, 720):
        np.testing.assert_array_equal(model.decode_step(state, int(ids[t]))[0], h[t])
    np.testing.assert_array_equal(model.read(state, ids[720:]), h[720:])


def test_a_long_document_is_scored_with_one_state():
    model = some_model()
    documents = [np.random.default_rng(n).integers(0, 60, n).astype(np.int32) for n in (5, 300, 40, 2_500)]
    whole = score(model, documents, eot=0, window=4_096)
    pieces = score(model, documents, eot=0, window=64)
    assert whole.tokens == pieces.tokens == 2_845
    assert pieces.nll == pytest.approx(whole.nll, rel=1e-6)
    single = np.concatenate([token_nll(model, document, eot=0) for document in documents])
    assert single.sum() == pytest.approx(whole.nll, rel=1e-6)


def test_lower_bounds_are_no_matrix_of_the_optimizer():
    parameters = {name: np.zeros(p.shape, np.float32) for name, p in model_parameters(CONFIG).items()}
    groups = Optimizer(parameters, parameters).groups
    assert "lower_bounds" in groups["adamw without decay"]
    assert sorted(groups["normuon"]) == sorted(ternary_names(CONFIG))


def test_the_decoding_state_is_one_vector_per_block():
    for tokens in (1, 900):
        state, _ = some_model().prefill(np.zeros(tokens, np.int32))
        assert state.state.states.shape == (3, 50)
        assert state.state.history.size == 0


def test_a_state_that_another_thread_uses_is_refused():
    model, ids = some_model(), np.zeros(5, np.int32)
    state, _ = model.prefill(ids)
    state.calls.append(object())  # a call in flight
    for call in (lambda: model.read(state, ids), lambda: model.decode_step(state, 0)):
        with pytest.raises(RuntimeError, match="another thread is using this state"):
            call()
    state.calls.clear()
    assert model.read(state, ids).shape == (5, 50)


# --- what is refused ---


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ("mixer=mlgru",),
            "model.mixer mlgru and model.linear bitlinear work with each other only, got mixer mlgru with",
        ),
        (("linear=bitlinear",), "got mixer conv with linear bitlinear."),
        ((*MMF, "n_blocks=0"), "model.n_blocks must be at least 1, got 0."),
        (("linear=matmul",), "model.linear must be one of ternary, bitlinear, got 'matmul'."),
        ((*MMF, "norm_eps=0"), "model.norm_eps must be at least 1e-12 and at most 1, got 0."),
    ],
)
def test_settings_that_do_not_fit_are_refused(corpus, tmp_path, settings, sentence):
    done = command("train", corpus, "--out", tmp_path / "run", "--steps", 1, *sets(settings))
    assert done.exit_code != 0
    assert sentence in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_mixer_is_refused(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model"] |= {"mixer": "conv", "linear": "ternary", "groups": 3}
    (folder / "config.json").write_text(json.dumps(config))
    done = command("eval", folder)
    assert done.exit_code == 1
    assert "The model settings in config.json are not the ones that" in done.stderr


def test_an_exported_file_of_another_mixer_is_refused(run, tmp_path):
    path, forged = tmp_path / "model.safetensors", tmp_path / "forged.safetensors"
    assert command("export", run, path).exit_code == 0
    config, tensors, state, tokenizer = packed.read(path)
    changed = json.loads(config)
    changed["model"] |= {"mixer": "conv", "linear": "ternary", "groups": 3}
    packed.write(forged, tensors, [], json.dumps(changed), state, tokenizer, "float")
    done = command("info", forged)
    assert done.exit_code == 1
    assert f"{forged} cannot be used: The weights do not fit the stored settings (Model: parameter" in done.stderr
    done = command(
        "train",
        "--init",
        path,
        "--out",
        tmp_path / "run",
        "--steps",
        1,
        *sets(("mixer=conv", "linear=ternary", "groups=3")),
    )
    assert done.exit_code == 1
    assert "fix model.groups, model.mixer, model.linear; leave that setting out." in done.stderr


# --- runs of earlier versions ---


def test_settings_of_earlier_versions_are_read_and_keep_their_hash():
    config = from_recipe("default")
    values = json.loads(config.to_json())
    for section, names in (("model", ("linear", "norm_eps", "embedding_dim")), ("optimizer", ("matrices", "schedule"))):
        for name in names:
            del values[section][name]
    assert run_from_json(json.dumps(values)) == config
    model_and_head = {"model": values["model"], "head": values["head"]}
    before = hashlib.sha256(json.dumps(model_and_head, sort_keys=True).encode()).hexdigest()
    assert config.model_hash == before
    other = dataclasses.replace(config.model, mixer="mlgru", linear="bitlinear")
    assert RunConfig(model=other).model_hash != RunConfig(model=dataclasses.replace(other, norm_eps=1e-5)).model_hash
