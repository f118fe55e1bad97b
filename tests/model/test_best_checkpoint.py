"""The best checkpoint on the validation text is kept, and is what other commands use."""

import json

import numpy as np
import pytest
from helpers import TINY, command

import flashlm_numba as fl
from flashlm_numba.model import checkpoint
from flashlm_numba.model.checkpoint import Validation
from flashlm_numba.training import loop

SETTINGS = [part for setting in (*TINY, "validate_every=2", "checkpoint_every=3") for part in ("--set", setting)]
SILENT = fl.Progress()


@pytest.fixture
def validated(monkeypatch):
    """Sets the NLL of the validations to come."""

    def set_nll(*values):
        left = list(values)
        monkeypatch.setattr(loop, "_validation_nll", lambda session: left.pop(0))

    return set_nll


@pytest.fixture
def train(corpus, tmp_path):
    """Trains a run; returns its folder and what was printed."""

    def run(steps, *more):
        folder = tmp_path / "run"
        first = ["train", corpus, "--out", folder, "--threads", 1, *SETTINGS]
        done = command(*(more or first), "--steps", steps)
        assert done.exit_code == 0, done.output
        return folder, done.output

    return run


def names(folder):
    return sorted((path.name for path in (folder / "checkpoints").iterdir()), key=lambda name: int(name[5:]))


def weights(folder, name):
    return checkpoint.load(folder / "checkpoints" / name, "model")["final_norm.weight"]


def test_a_loss_that_falls_chooses_the_last(validated, train):
    validated(5.0, 4.0, 3.0, 2.0)
    folder, output = train(7)
    assert "predicted best" not in output
    assert checkpoint.find_best(folder).name == "step-7"
    assert fl.load(folder).trained["step"] == 7


def test_the_best_is_kept_and_used(validated, train, tmp_path):
    validated(5.0, 4.0, 4.5, 4.4, 4.3, 4.2, 4.1)
    folder, output = train(14)
    assert "predicted best after step 4 (NLL 4.0000)" in output
    assert "--checkpoint step-14" in output
    # a checkpoint of each step that was the best, then every three steps, of which three are left
    assert names(folder) == ["step-4", "step-9", "step-12", "step-14"]
    assert checkpoint.find(folder).name == "step-14"
    assert checkpoint.find_best(folder).name == "step-4"
    loaded = fl.load(folder)
    assert loaded.trained["step"] == 4
    np.testing.assert_array_equal(loaded.parameters["final_norm.weight"], weights(folder, "step-4"))
    assert json.loads(command("info", folder, "--json").stdout)["checkpoint"] == "step-4"
    assert json.loads(command("info", folder, "--json", "--checkpoint", "step-14").stdout)["checkpoint"] == "step-14"
    done = command("export", folder, tmp_path / "out.safetensors", "--rows", "float")
    assert done.exit_code == 0
    assert "Using step-4, the best on the validation text" in done.stderr
    exported = fl.load(tmp_path / "out.safetensors")
    np.testing.assert_array_equal(exported.parameters["final_norm.weight"], weights(folder, "step-4"))
    texts = [command("generate", folder, "--seed", 1, *more).stdout for more in ([], ["--checkpoint", "step-4"])]
    assert texts[0] == texts[1]


def test_a_damaged_best_one_is_refused_by_name(validated, train):
    validated(5.0, 4.0, 4.5, 4.4)
    folder, _ = train(7)
    path = folder / "checkpoints" / "step-4" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    done = command("eval", folder)
    assert done.exit_code == 1
    assert "step-4 is damaged" in done.output
    assert "--checkpoint step-7" in done.output
    assert command("eval", folder, "--checkpoint", "step-7").exit_code == 0


def test_resuming_continues_from_the_newest_and_remembers_the_best(validated, train):
    validated(5.0, 4.0, 4.5, 4.4, 4.3, 4.2)
    folder, _ = train(7)
    _, output = train(10, "train", "--resume", folder)
    assert "Resuming from step 7" in output
    assert "predicted best after step 4" in output
    assert checkpoint.find_best(folder).name == "step-4"
    validated(3.0)
    train(12, "train", "--resume", folder)
    assert checkpoint.find_best(folder).name == "step-12"
    assert "step-4" not in names(folder)


def test_weights_later_than_the_last_validation_count_while_the_loss_falls(validated, train):
    validated(5.0, 4.0)
    folder, _ = train(4)
    state = checkpoint.load_state(folder / "checkpoints" / "step-4")
    assert Validation(**state["validation"]) == Validation(4, 4.0, 4)
    files = {"model": {"x": np.zeros(1, np.float32)}}
    checkpoint.save(folder, 5, files, {"validation": {"best_step": 4, "best_nll": 4.0, "last_step": 4}})
    assert checkpoint.find_best(folder).name == "step-5"


@pytest.mark.parametrize("state", ["{", '{"validation": 3}', '{"validation": {"best_step": "x"}}'])
def test_a_damaged_state_names_the_newest(validated, train, state):
    validated(5.0, 4.0)
    folder, _ = train(4)
    (folder / "checkpoints" / "step-4" / "state.json").write_text(state)
    done = command("eval", folder)
    assert done.exit_code == 1
    assert "newest checkpoint" in done.output
    assert "step-4 is damaged" in done.output


def test_a_forged_state_is_no_path(validated, train):
    validated(5.0, 4.0)
    folder, _ = train(4)
    path = folder / "checkpoints" / "step-4" / "state.json"
    state = json.loads(path.read_text())
    del state["sha256"]
    state["validation"] = {"best_step": "../../x", "best_nll": 1.0, "last_step": 4}
    path.write_text(json.dumps(state | {"sha256": checkpoint._hash(state)}))
    done = command("eval", folder)
    assert done.exit_code == 1
    assert "has no checkpoint 'step-../../x'" in done.output


def test_a_run_without_validation_has_no_best(corpus, tmp_path):
    settings = [part for setting in (*TINY, "validation_tokens=0") for part in ("--set", setting)]
    done = command("train", corpus, "--out", tmp_path / "run", "--threads", 1, "--steps", 3, *settings)
    if done.exit_code == 0:
        assert checkpoint.validation_of(checkpoint.find(tmp_path / "run")) is None
        assert checkpoint.find_best(tmp_path / "run").name == "step-3"
    else:
        assert "validation_tokens" in done.output
