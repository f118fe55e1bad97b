"""The training loop: steps, log, validation, checkpoints.

A run is a folder with config.json, metrics.jsonl (one JSON object per line), samples.txt and checkpoints/step-<N>/.
run.py creates the session, plan.py determines the number of steps, step.py performs one step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from flashlm_numba.heads import head_class
from flashlm_numba.inference.evaluate import score
from flashlm_numba.inference.generate import generate_text
from flashlm_numba.kernels.ema import ema_update
from flashlm_numba.model import build, checkpoint, data_place
from flashlm_numba.model.config import RunConfig
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import sync_file, write_text, writing_to
from flashlm_numba.system.signals import caught_signals
from flashlm_numba.training.metrics import LOG
from flashlm_numba.training.schedule import lr_scale, shortened
from flashlm_numba.training.session import BATCH, WINDOW, Session
from flashlm_numba.training.step import train_step

CHECKPOINT_SECONDS = 120.0  # training time between checkpoints if checkpoint_every is 0
_CHUNK = 1 << 18  # elements exchanged at a time, so that no temporary has the size of the array


def train(session: Session) -> int:
    """Train until the last planned step or a signal. Returns the exit status: 0, or 128 plus the signal's number."""
    folder, clock, progress = session.folder, session.clock, session.progress
    with (
        writing_to(folder, f"free some space there and resume with: flashlm-numba train --resume {folder}"),
        caught_signals(progress.stopping) as caught,
        (folder / LOG).open("a", encoding="utf-8") as log,
        progress.steps(session.run.plan.steps, clock.step),
    ):
        checkpoints = _Checkpoints(session, log)
        while clock.step < session.run.plan.steps and not caught:
            run, step = session.run, clock.step + 1
            last, phase = run.plan.steps, run.phase_at(step)
            sampled = _is_sampled(run, step)
            with _divergence(session, step):
                done = train_step(session, phase, step, lr=_lr_factor(run, step), full=not sampled)
            spent = done.seconds + _update_ema(session)
            clock.step, clock.tokens, clock.seconds = step, clock.tokens + phase.tokens, clock.seconds + spent
            line = {
                "step": step,
                "tokens": clock.tokens,
                "seconds": round(clock.seconds, 4),
                "loss": done.loss,
                "nll": done.nll,
                **({"sampled": True} if sampled else {}),
                "lr": done.lr,
                "tokens_per_s": round(phase.tokens / spent, 1),
                "shares": done.shares,
            }
            validate = step == last or _every(run.training.validate_every, step)
            if validate and session.subset:
                with _divergence(session, step):
                    line |= _validate(session)
                _shorten(session)
            if validate or _every(run.training.log_every, step):
                log.write(json.dumps(line) + "\n")
                log.flush()
            left = run.tokens_until(session.run.plan.steps) - clock.tokens
            progress.step(line, seconds_left=left * spent / phase.tokens)
            checkpoints.after_step(is_best=_is_best(session), is_last=step == session.run.plan.steps)
        if caught and clock.step < session.run.plan.steps:
            checkpoints.before_stopping()
    if clock.step < session.run.plan.steps:
        progress.note(f"Stopped after step {clock.step:,}, saved; resume with: flashlm-numba train --resume {folder}")
        return 128 + caught[0]
    _note_best(session)
    asked = session.run.plan.asked_steps
    early = f" after {clock.step:,} of {asked:,} planned steps, since validation had stopped improving" if asked else ""
    progress.note(f"Done{early}: {folder}")
    return 0


def _lr_factor(run: RunConfig, step: int) -> float:
    """The schedule's factor for both learning rates in a step; steps count from 1."""
    return lr_scale(step - 1, run.plan.schedule_steps, run.optimizer)


def _is_sampled(run: RunConfig, step: int) -> bool:
    """Whether the head samples its loss in this step, so that loss and NLL read low."""
    return step <= run.plan.schedule_steps * (1 - head_class(run.head.name).full_ratio(run.head))


def _every(period: int, step: int) -> bool:
    """Whether `step` is a multiple of `period`; never for a period of 0."""
    return period > 0 and step % period == 0


def _update_ema(session: Session) -> float:
    """Move the EMA towards the parameters by 1 - decay. Returns the seconds that this took."""
    start = time.perf_counter()
    for name, average in session.ema.items():
        ema_update(average, session.model.parameters[name], session.run.training.ema)
    return time.perf_counter() - start


# --- validation ---


def _validate(session: Session) -> dict[str, float]:
    """NLL of the weights, and of their EMA if there is one, on the fixed subset; adds a text to samples.txt."""
    values = {"val_nll": _validation_nll(session)}
    if session.ema:
        _exchange(session)
        try:
            values["val_nll_ema"] = _validation_nll(session)
        finally:
            _exchange(session)
    text = ", with the EMA of the weights ".join(f"{value:.4f}" for value in values.values())
    if not all(map(math.isfinite, values.values())):
        raise UserError(f"The NLL of the validation text is {text}, so training has diverged.")
    step, tokens = session.clock.step, sum(map(len, session.subset))
    session.progress.note(f"step {step:,}: NLL on a fixed {tokens:,}-token subset of the validation text {text}")
    best = session.validation or checkpoint.Validation(step, values["val_nll"], step)
    session.validation = best.after(step, values["val_nll"])
    if session.run.training.sample_tokens:
        _write_sample(session)
    return values


def _shorten(session: Session) -> None:
    """Begin the warm-down now if validation has stopped improving.

    The shorter plan is stored at once. A run that is resumed from a checkpoint before this step repeats the same steps,
    since until here both plans are the same.
    """
    run, clock = session.run, session.clock
    if session.validation is None or run.fixed_schedule is not None:
        return
    passes = clock.tokens / session.data.train.n_tokens
    plan = shortened(run.plan, run.optimizer, clock.step, session.validation, passes)
    shorter = dataclasses.replace(run, plan=plan)
    if plan == run.plan or _is_sampled(run, clock.step) != _is_sampled(shorter, clock.step):
        return  # in the second case the steps so far would not be those of the shorter run
    session.run = shorter
    write_text(session.folder / "config.json", data_place.stored(session.run, session.folder).to_json())
    session.progress.shorten(plan.steps)
    session.progress.note(
        f"The validation text has not been predicted better since step {session.validation.best_step:,}, so the "
        f"learning rates fall from now on, and training ends at step {plan.steps:,} instead of {run.plan.steps:,}."
    )


def _is_best(session: Session) -> bool:
    """Whether this step was validated, better than all before."""
    return session.validation is not None and session.validation.best_step == session.clock.step


def _note_best(session: Session) -> None:
    """Note if the last weights are not those that other commands use."""
    best = session.validation
    if best is not None and best.has_passed:
        session.progress.note(
            f"The validation text was predicted best after step {best.best_step:,} (NLL {best.best_nll:.4f}); eval, "
            f"generate and export use that checkpoint. For the last one give --checkpoint step-{session.clock.step}."
        )


def _validation_nll(session: Session) -> float:
    return score(session.model, session.subset, eot=session.data.vocabulary.eot, window=WINDOW, batch=BATCH).mean_nll


def _exchange(session: Session) -> None:
    """Swap the parameters and their EMA in place, without a full copy."""
    for name, value in session.model.parameters.items():
        a, b = value.reshape(-1), session.ema[name].reshape(-1)
        for i in range(0, len(a), _CHUNK):
            part = a[i : i + _CHUNK].copy()
            a[i : i + _CHUNK] = b[i : i + _CHUNK]
            b[i : i + _CHUNK] = part


def _write_sample(session: Session) -> None:
    """Append a text generated by the model to samples.txt."""
    pieces = generate_text(
        session.model,
        session.data.vocabulary,
        "",
        max_tokens=session.run.training.sample_tokens,
        seed=session.run.seed,
        temperature=0.8,
    )
    with (session.folder / "samples.txt").open("a", encoding="utf-8") as file:
        file.write(f"=== step {session.clock.step} ===\n{''.join(pieces)}\n\n")


# --- checkpoints ---


class _Checkpoints:
    """Writes checkpoints: every checkpoint_every steps or two minutes, at checkpoint_minutes, and at the end."""

    def __init__(self, session: Session, log: TextIO) -> None:
        self.session, self.log = session, log
        clock = session.clock
        self.saved_seconds = clock.seconds  # time of the last checkpoint
        self.saved_step = clock.step if checkpoint.any_in(session.folder) else -1
        # time of the last check; the initial embedding and the tree may already take longer than a mark
        self.seen_seconds = clock.seconds if clock.step else 0.0

    def after_step(self, *, is_best: bool, is_last: bool) -> None:
        """Write a checkpoint if one is due, or if this step is the best or the last."""
        clock, every = self.session.clock, self.session.run.training.checkpoint_every
        keep = self._minute_passed()
        self.seen_seconds = clock.seconds
        due = _every(every, clock.step) if every else clock.seconds - self.saved_seconds >= CHECKPOINT_SECONDS
        if due or keep or is_best or is_last:
            self._save(keep)

    def before_stopping(self) -> None:
        """Write a checkpoint of this step unless there is one."""
        if self.session.clock.step != self.saved_step:
            self._save(self._minute_passed())  # the last checkpoint may have ended past a mark

    def _minute_passed(self) -> bool:
        """Whether one of checkpoint_minutes has passed since the last check."""
        now = self.session.clock.seconds
        return any(self.seen_seconds < 60 * mark <= now for mark in self.session.run.training.checkpoint_minutes)

    def _save(self, keep: bool) -> None:
        """Write a checkpoint, whose time counts as training. keep : later checkpoints do not replace it

        Raises UserError instead if it could not be read again, because a finite gradient led to weights that are not
        finite: the checkpoints of before must not make room for it.
        """
        clock = self.session.clock
        start = time.perf_counter()
        sync_file(self.log)  # the log is never behind a checkpoint
        files, state = _contents(self.session, keep)
        with _divergence(self.session, clock.step):
            for tensors in files.values():
                if (name := checkpoint.not_finite(tensors)) is not None:
                    raise UserError(f"{name} is no longer finite, so training has diverged; this step is not saved.")
        checkpoint.save(self.session.folder, clock.step, files, state)
        clock.seconds += time.perf_counter() - start
        self.saved_seconds, self.saved_step = clock.seconds, clock.step


def _contents(session: Session, keep: bool) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """The tensors of a checkpoint per file, and its state."""
    files = {"model": build.tensors_of(session.model), "optimizer": session.optimizer.state_dict()}
    if session.ema:
        files["ema"] = session.ema
    samples = session.folder / "samples.txt"
    state = {
        **dataclasses.asdict(session.clock),
        "generators": {"seed": session.run.seed},  # all random numbers are functions of (seed, step)
        "data_position": session.clock.step,
        "keep": keep,
        "validation": None if session.validation is None else dataclasses.asdict(session.validation),
        "model_hash": session.run.model_hash,
        "samples_bytes": samples.stat().st_size if samples.exists() else 0,
    }
    return files, state


# --- divergence ---


@contextlib.contextmanager
def _divergence(session: Session, step: int) -> Iterator[None]:
    """Add to a UserError the step at which training stopped and the checkpoint that is left."""
    try:
        yield
    except UserError as error:
        raise UserError(f"Stopped at step {step}: {error} {_last_good(session.folder)}") from None


def _last_good(folder: Path) -> str:
    """A sentence about the last checkpoint before training diverged."""
    try:
        name = checkpoint.find(folder).name
    except UserError:
        return "There is no earlier checkpoint; try lower learning rates, such as --set adamw_lr=5e-4."
    return f"The last good checkpoint is {name}; resume from it with, for example, --set adamw_lr=5e-4."
