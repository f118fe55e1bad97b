"""The estimate of training's memory against what the arrays take, and the refusal of a model that is too large."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import command

from flashlm_numba.heads import HEADS, head_class
from flashlm_numba.kernels.normuon import NorMuonWorkspace
from flashlm_numba.model import training_memory
from flashlm_numba.model.build import model_from
from flashlm_numba.model.parameters import initial_parameters
from flashlm_numba.model.recipes import from_recipe
from flashlm_numba.system import memory as machine
from flashlm_numba.system.errors import UserError
from flashlm_numba.training.optimizer import Optimizer


def bytes_of(value, seen):
    """Bytes of the arrays in an object, each counted once."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        base = value
        while isinstance(base.base, np.ndarray):
            base = base.base
        if base is not value:
            return bytes_of(base, seen)
        return value.nbytes
    if isinstance(value, dict):
        return sum(bytes_of(item, seen) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(bytes_of(item, seen) for item in value)
    return bytes_of(vars(value), seen) if hasattr(value, "__dict__") and not callable(value) else 0


@pytest.mark.parametrize("recipe", ["default", "v3", "mmf"])
@pytest.mark.parametrize(
    "changed",
    [(), ("dim=512", "ffn_dim=1366"), ("n_blocks=3", "n_passes=1"), ("phases=32x256",), ("embedding_dim=64",)],
)
def test_the_estimate_is_what_the_arrays_take(recipe, changed, threads):
    threads(2)
    run = replace(from_recipe(recipe, [*changed, "head.name=dense", "vocab_size=3000"]), threads=2)
    phase = max(run.training.phases, key=lambda phase: phase.batch_size * phase.seq_len)
    model = model_from(run, initial_parameters(run.model, 0))
    optimizer = Optimizer(model.parameters, model.gradients, run.optimizer)
    state = sum(
        int(np.prod(shape)) * np.dtype(kind).itemsize
        for name in model.parameters
        for shape, kind in optimizer._entries(name).values()
    )
    names = [name for name in optimizer.groups["normuon"] if not name.startswith("router")]
    seen: set[int] = set()
    buffers = model._trunk.new_buffers(phase.batch_size, phase.seq_len)
    if run.model.linear == "bitlinear":  # whose backward pass makes what only it needs
        assert buffers.gradients
        assert buffers.scratch(backward=True)
        assert model._weights.read(backward=True)
    found = bytes_of(buffers, seen)
    found += (
        bytes_of(model._rows, seen)
        + bytes_of(model._weights, seen)
        + bytes_of(model.parameters, seen)
        + bytes_of(model.gradients, seen)
    )
    found += (
        bytes_of(NorMuonWorkspace([model.parameters[name].shape for name in names]), seen) if names else 0
    ) + state
    found += sum(value.nbytes for value in model.parameters.values()) if run.training.ema else 0
    head = head_class("dense").training_bytes(run.head, 3000, run.model.dim, phase.batch_size * phase.seq_len)
    assert training_memory.training_bytes(run) - training_memory.PROGRAM - head == pytest.approx(found, rel=0.17)


@pytest.mark.parametrize("head", HEADS)
def test_a_model_that_is_too_large_is_refused_before_anything_is_made(head, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(training_memory, "machine_bytes", lambda: 16_000_000_000)
    for name in ("new_session", "open_run_tokens"):
        monkeypatch.setattr(f"flashlm_numba.training.run.{name}", None)  # calling it would be a TypeError
    out = tmp_path / "run"
    size = ("--set", "dim=16384", "--set", "ffn_dim=43690")
    done = command("train", corpus, "--head", head, "--steps", 1, "--out", out, *size)
    assert done.exit_code == 1
    assert "Error: Training this model takes about " in done.stderr
    assert "GB of memory, and this machine has 16.00 GB; choose a smaller model" in done.stderr
    assert not out.exists()


def test_a_resumed_run_is_refused_too(run, monkeypatch):
    monkeypatch.setattr(training_memory, "machine_bytes", lambda: 1_000_000)
    done = command("train", "--resume", run, "--steps", 9)
    assert done.exit_code == 1
    assert "and this machine has 1.0 MB;" in done.stderr


def test_a_text_whose_ngrams_do_not_fit_is_refused(corpus, tmp_path, monkeypatch):
    run = from_recipe("default", ["memory=ngrams"])
    monkeypatch.setattr(training_memory, "machine_bytes", lambda: 16_000_000_000)
    training_memory.check_memory(run, 100_000_000)
    with pytest.raises(UserError, match=r"Counting the n-grams of 1,000,000,000 tokens takes about .* leave out --mem"):
        training_memory.check_memory(run, 1_000_000_000)
    training_memory.check_memory(from_recipe("default"), 1_000_000_000)
    monkeypatch.setattr(training_memory, "COUNTING", 10**12)
    done = command("train", corpus, "--memory", "ngrams", "--steps", 1, "--out", tmp_path / "run")
    assert done.exit_code == 1
    assert "Counting the n-grams of" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_machine_that_does_not_say_refuses_nothing(monkeypatch):
    monkeypatch.setattr(training_memory, "machine_bytes", lambda: None)
    run = from_recipe("default", ["dim=16384"])
    assert training_memory.check_memory(run) == training_memory.training_bytes(run)


def test_the_machine_has_what_the_system_says():
    assert machine.machine_bytes() > 100_000_000
