"""Checkpoints: whole or not at all, damage found, the lock."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from flashlm_numba.model import checkpoint
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.tensors import read_tensors, write_tensors


def _tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "mask": rng.random(5) < 0.5,
        "e.weight": rng.standard_normal((7, 3), np.float32),
        "rows": np.arange(4, dtype=np.int32),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5, np.float32),
    }


def _save(run, step, **state):
    return checkpoint.save(run, step, {"model": _tensors(step), "optimizer": _tensors(step + 100)}, state)


@given(
    st.lists(st.sampled_from(["float32", "float64", "int32", "uint8", "bool", "uint16"]), max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_write_safetensors_is_read_by_the_package(tmp_path_factory, dtypes, seed):
    rng = np.random.default_rng(seed)
    tensors = {
        f"t{i}": rng.integers(0, 2, tuple(rng.integers(0, 5, rng.integers(0, 4)))).astype(dtype)
        for i, dtype in enumerate(dtypes)
    }
    path = tmp_path_factory.mktemp("safetensors") / "x.safetensors"
    write_tensors(path, tensors)
    read = load_file(path)
    assert set(read) == set(tensors)
    for name, want in tensors.items():
        assert read[name].dtype == want.dtype
        assert np.array_equal(read[name], want)
        assert read[name].shape == want.shape


def test_save_and_load_give_the_same_bits_and_keep_three(tmp_path):
    for step in (1, 2, 10, 20):
        _save(tmp_path, step, seconds=1.5 * step)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-10", "step-2", "step-20"]
    found = checkpoint.find(tmp_path)
    assert found.name == "step-20"
    state = checkpoint.load_state(found)
    assert (state["step"], state["seconds"]) == (20, 30.0)
    tensors = read_tensors(found / "model.safetensors")
    for name, want in _tensors(20).items():
        assert tensors[name].tobytes() == want.tobytes()
    assert checkpoint.find(tmp_path, "10").name == checkpoint.find(tmp_path, "step-10").name == "step-10"


def test_saving_the_same_step_again_replaces_it(tmp_path):
    _save(tmp_path, 5, seconds=1.0)
    _save(tmp_path, 5, seconds=2.0)
    assert checkpoint.load_state(checkpoint.find(tmp_path))["seconds"] == 2.0
    assert os.listdir(tmp_path / "checkpoints") == ["step-5"]


def test_a_checkpoint_that_is_marked_stays(tmp_path):
    for step in range(1, 8):
        checkpoint.save(tmp_path, step, {}, {"keep": step == 2})
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-2", "step-5", "step-6", "step-7"]


@pytest.mark.parametrize("when", ["model.safetensors", "state.json", "rename"])
def test_interrupted_save_leaves_the_last_checkpoint(tmp_path, monkeypatch, when):
    """A kill at any point: the half-written folder is no checkpoint, and the next save clears it."""
    _save(tmp_path, 1)

    class Killed(BaseException):
        pass

    if when == "rename":
        real = os.replace

        def replace(source, target):
            if os.path.basename(target) == "step-2":
                raise Killed
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
    else:
        function = "write_tensors" if when == "model.safetensors" else "write_text"

        def die(path, *rest):
            path.write_bytes(b"half")
            raise Killed

        monkeypatch.setattr(checkpoint, function, die)
    with pytest.raises(Killed):
        _save(tmp_path, 2)
    monkeypatch.undo()
    assert checkpoint.find(tmp_path).name == "step-1"
    _save(tmp_path, 3)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-1", "step-3"]


def test_full_disk_is_a_sentence_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    _save(tmp_path, 1)

    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(UserError, match=r"step 2 could not be written .* No space left on device"):
        _save(tmp_path, 2)
    assert os.listdir(tmp_path / "checkpoints") == ["step-1"]


def _flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def _spoil_state(path):
    state = json.loads(path.read_text())
    state["seconds"] = 99.0
    path.write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda c: _flip(c / "model.safetensors", -1), "model.safetensors does not match"),
        (lambda c: _flip(c / "optimizer.safetensors", 9), "optimizer.safetensors does not match"),
        (lambda c: (c / "model.safetensors").write_bytes(b""), "model.safetensors does not match"),
        (lambda c: (c / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (lambda c: (c / "state.json").unlink(), "state.json is missing"),
        (lambda c: (c / "state.json").write_text("{"), "state.json cannot be read"),
        (lambda c: (c / "state.json").write_text("[]"), "state.json cannot be read"),
        (lambda c: (c / "state.json").write_bytes(b"\xff\xfe"), "state.json cannot be read"),
        (lambda c: _spoil_state(c / "state.json"), "state.json does not match"),
    ],
)
def test_damaged_newest_checkpoint_is_refused_with_the_last_intact_one(tmp_path, spoil, reason):
    for step in (10, 20, 30):
        _save(tmp_path, step, seconds=1.0)
    spoil(tmp_path / "checkpoints" / "step-30")
    with pytest.raises(UserError) as caught:
        checkpoint.find(tmp_path)
    message = str(caught.value)
    assert "The newest checkpoint" in message
    assert "step-30" in message
    assert reason in message
    assert "--checkpoint step-20" in message
    spoil(tmp_path / "checkpoints" / "step-20")
    with pytest.raises(UserError, match="--checkpoint step-10"):
        checkpoint.find(tmp_path)
    assert checkpoint.find(tmp_path, "step-10").name == "step-10"
    with pytest.raises(UserError, match=r"The checkpoint .*step-20 is damaged"):
        checkpoint.find(tmp_path, "step-20")


def test_find_explains_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="There is no run at"):
        checkpoint.find(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        checkpoint.find(tmp_path)
    _save(tmp_path, 3)
    with pytest.raises(UserError, match=r"no checkpoint 'step-4'; it has step-3\."):
        checkpoint.find(tmp_path, "step-4")


def test_set_aside_after_keeps_later_checkpoints_out_of_the_way(tmp_path):
    for step in (1, 2, 3):
        _save(tmp_path, step)
    assert checkpoint.set_aside_after(tmp_path, 1) == ["set-aside-step-2", "set-aside-step-3"]
    assert checkpoint.find(tmp_path).name == "step-1"


def test_set_aside_after_destroys_nothing_that_was_set_aside_before(tmp_path):
    _save(tmp_path, 1)
    for number in ("", "-2", "-3"):
        path = _save(tmp_path, 2)
        (path / "number").write_text(number)
        assert checkpoint.set_aside_after(tmp_path, 1) == [f"set-aside-step-2{number}"]
    for number in ("", "-2", "-3"):
        assert (tmp_path / "checkpoints" / f"set-aside-step-2{number}" / "number").read_text() == number


def test_lock_refuses_a_second_process_and_outlives_no_process(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from flashlm_numba.model import checkpoint; from flashlm_numba.system.errors import UserError\n"
        "try:\n"
        "    with checkpoint.lock(Path(sys.argv[1])): print('got it')\n"
        "except UserError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with checkpoint.lock(tmp_path):
        second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Another process is training in" in second.stdout
    after = subprocess.run(command, capture_output=True, text=True, check=True)
    assert after.stdout.strip() == "got it"
