"""A run in progress: its model, data, optimiser and clock, created new or restored from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flashlm_numba.data.shards import TokenData
from flashlm_numba.inference.evaluate import validation_subset
from flashlm_numba.memory.counting import count_tokens
from flashlm_numba.model import build, checkpoint, trained
from flashlm_numba.model.checkpoint import Validation
from flashlm_numba.model.config import RunConfig
from flashlm_numba.system.compiled import Compilation
from flashlm_numba.system.display import Progress
from flashlm_numba.system.errors import UserError
from flashlm_numba.training.optimizer import Optimizer

if TYPE_CHECKING:
    from flashlm_numba.model.model import Model

WINDOW, BATCH = 1_024, 2_048  # positions per window and batch in validation; a long receptive field raises WINDOW


@dataclass
class Clock:
    """How far a run has been trained."""

    step: int = 0  # steps done
    tokens: int = 0  # tokens seen
    seconds: float = 0.0  # counts the initial embedding, tree, steps and checkpoints; not compiling or validation


@dataclass
class Session:
    """A run in progress."""

    run: RunConfig
    folder: Path
    data: TokenData
    model: Model
    optimizer: Optimizer
    ema: dict[str, np.ndarray]  # EMA of the parameters; empty if the run has none
    progress: Progress = field(default_factory=Progress)  # receives notes and steps
    clock: Clock = field(default_factory=Clock)
    validation: Validation | None = None  # None before the first one
    subset: list[np.ndarray] = field(default_factory=list)  # the validation documents


def new_session(run: RunConfig, folder: Path, data: TokenData, progress: Progress, compilation: Compilation) -> Session:
    """A run before its first step. Its clock counts the time that counting n-grams and building a new model took.

    Raises UserError if the weights that the run starts from cannot be used.
    """
    ngrams, counting = None, 0.0
    if run.memory.memory == "ngrams":
        compilation.wait()
        ngrams, counting = count_tokens(data, run.memory.memory_least, progress)
    if run.init:
        compilation.wait()
        progress.note(f"Starting from the weights in {run.init}.")
        model, seconds = trained.first_model(run, data.train.counts(run.model.vocab_size), ngrams, progress), 0.0
    else:
        model, seconds = build.new_model(run, data, progress.note, compilation.wait, ngrams)
    ema = {name: value.copy() for name, value in model.parameters.items()} if run.training.ema else {}
    session = _session(run, folder, data, model, ema, progress)
    session.clock.seconds = counting + seconds
    return session


def restored_session(
    run: RunConfig, folder: Path, data: TokenData, path: Path, progress: Progress, compilation: Compilation
) -> Session:
    """A run in the state of the checkpoint `path`, except for the optimiser's state.

    Raises UserError if the checkpoint does not fit these settings.
    """
    compilation.wait()
    progress.note(f"Reading {path}.")
    state = checkpoint.check_state(checkpoint.load_state(path), path, run.model_hash)
    counts = data.train.counts(run.model.vocab_size)
    model = build.model_from(run, checkpoint.load(path, "model") | build.memory_of(run, folder, progress), counts)
    ema = checkpoint.load(path, "ema") if run.training.ema else {}
    if ema and {name: (a.shape, a.dtype) for name, a in ema.items()} != {
        name: (a.shape, a.dtype) for name, a in model.parameters.items()
    }:
        raise UserError(f"The EMA in {path} does not fit this model's weights; use another checkpoint.")
    session = _session(run, folder, data, model, ema, progress)
    session.clock = Clock(state["step"], state["tokens"], state["seconds"])
    session.validation = checkpoint.validation_of(path)
    return session


def _session(
    run: RunConfig, folder: Path, data: TokenData, model: Model, ema: dict[str, np.ndarray], progress: Progress
) -> Session:
    data.vocabulary.load()  # reports a damaged vocabulary now, not at the first sample
    optimizer = Optimizer(model.parameters, model.gradients, run.optimizer)
    subset = validation_subset(data.validation, run.training.validation_tokens)
    return Session(run, folder, data, model, optimizer, ema, progress, subset=subset)
