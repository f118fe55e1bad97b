"""A run from its command to its end: started, or resumed from a checkpoint, and trained by loop.py.

Nothing here prints or ends the process: what is to be seen goes to a Progress, what the user can mend is a UserError.
"""

from __future__ import annotations

import datetime
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from flashlm_numba.data.builtin import open_run_tokens
from flashlm_numba.data.shards import TokenData, is_prepared, open_tokens
from flashlm_numba.heads import head_class
from flashlm_numba.inference.evaluate import score
from flashlm_numba.model import build, checkpoint
from flashlm_numba.model.config import RunConfig
from flashlm_numba.model.settings import with_settings
from flashlm_numba.system.display import TERMINAL, Progress
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import write_text, writing_to
from flashlm_numba.system.threads import available_threads, set_threads
from flashlm_numba.training import inputs
from flashlm_numba.training.loop import train
from flashlm_numba.training.plan import OWN_LENGTH, Length, plan_for, plan_minutes
from flashlm_numba.training.session import Session, new_session, restored_session
from flashlm_numba.training.step import train_step

# what --resume may change: how much is written, and, after a divergence, the size of the steps
CHANGEABLE = {
    "training": (
        "log_every",
        "validate_every",
        "validation_tokens",
        "checkpoint_every",
        "sample_tokens",
        "checkpoint_minutes",
    ),
    "optimizer": ("normuon_lr", "adamw_lr", "nonembedding_lr_scale", "clip"),
}


@dataclass(frozen=True)
class Finished:
    """A run that has ended, for now."""

    folder: Path
    status: int  # 0, or 128 plus the number of the signal that stopped it: 130 after Ctrl-C


# --- starting ---


def start_run(
    run: RunConfig,
    length: Length = OWN_LENGTH,
    *,
    data: str | None = None,
    out: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = TERMINAL,
) -> Finished:
    """Train a new run.

    run : settings without plan;  length : default the recipe's own, or 20 minutes
    data : a prepared folder, None for the built-in text;  out : the run's folder, by default one below runs/
    threads : by default all that this process may use;  progress : shown what happens; None: nothing is shown
    Raises UserError for whatever the user can mend, ValueError for more threads than there are.
    """
    began = time.perf_counter()
    progress = Progress() if progress is None else progress
    name = f"{run.head.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = out if out is not None else Path("runs") / name
    _check_free(folder)
    run, tokens = _with_data(run, data, set_threads(threads), progress)
    # what is impossible is said before the folder is made and the embedding computed
    length = length.or_own(run)
    if length.in_steps:
        run = plan_for(run, steps=length.steps, tokens=length.tokens)
    another = "choose another --out"
    with writing_to(folder, another), checkpoint.lock(folder, f"wait for it, stop it, or {another}"):
        _check_free(folder)  # another start may have been here since
        session = new_session(run, folder, tokens, progress)
        rehearse(session, length.minutes, began)
        write_text(folder / "config.json", session.run.to_json())
        _describe(session)
        return Finished(folder, _train_new(session))


def _check_free(folder: Path) -> None:
    """UserError if there is something in the folder that a new run is to have."""
    if (folder / "config.json").exists() or (folder / "checkpoints").exists():
        raise UserError(f"{folder} already holds a run; go on with --resume {folder}, or choose another --out.")
    if is_prepared(folder):
        raise UserError(f"{folder} holds prepared tokens; choose another --out for the run.")
    # a hidden file may be what a start that failed has left; another run's folder inside is lost with this one's
    inside = sorted(path.name for path in folder.glob("*") if not path.name.startswith(".")) if folder.is_dir() else []
    if inside:
        raise UserError(f"{folder} is not empty ({inside[0]} is in it); choose another --out for the run.")


def _with_data(run: RunConfig, data: str | None, threads: int, progress: Progress) -> tuple[RunConfig, TokenData]:
    """The settings with the data and the threads that the run uses, and its tokens, checked."""
    source = inputs.training_data(data, progress)
    tokens = open_tokens(source)
    tokens.verify(progress=progress)
    run = replace(run, threads=threads, data=str(source.resolve()), data_hash=tokens.hash)
    run = inputs.with_vocabulary_of(tokens, run)
    inputs.check(run, tokens)
    return run, tokens


def _describe(session: Session) -> None:
    """Say what is about to be trained."""
    run = session.run
    size = sum(value.size for value in session.model.parameters.values())
    head = head_class(run.head.name).title(run.head)
    session.progress.note(
        f"Training {size:,} parameters with the {head} head for {run.plan.steps:,} steps "
        f"({run.tokens_until(run.plan.steps):,} tokens) on {run.threads} thread{'s' * (run.threads > 1)}, "
        f"in {session.folder}"
    )
    for line in session.optimizer.summary().splitlines():
        session.progress.note("  " + line)


def _train_new(session: Session) -> int:
    """Train; where the memory does not even suffice for a step, the folder is free again for smaller settings."""
    try:
        return train(session)
    except MemoryError:
        if not session.clock.step:  # nothing is lost
            for made in ("config.json", "metrics.jsonl"):
                (session.folder / made).unlink(missing_ok=True)
        raise


# --- resuming ---


def resume_run(
    folder: Path,
    length: Length = OWN_LENGTH,
    *,
    checkpoint_name: str | None = None,
    settings: tuple[str, ...] = (),
    threads: int | None = None,
    progress: Progress | None = TERMINAL,
) -> Finished:
    """Go on with a run from its newest checkpoint, or the one named.

    length : default the run's plan;  settings : key=value of CHANGEABLE
    threads : default the run's own number, or all that this machine has where those are fewer
    progress : shown what happens; None: nothing is shown.  Raises as start_run.
    """
    began = time.perf_counter()
    progress = Progress() if progress is None else progress
    run = build.read_config(folder)
    elsewhere = "make it writable, or copy the run to where you may write and resume the copy"
    with writing_to(folder, elsewhere), checkpoint.lock(folder, "wait for it, or stop it"):
        path = None
        if checkpoint_name is not None or checkpoint.any_in(folder):
            path = checkpoint.find(folder, checkpoint_name)
        run = replace(run, threads=_threads_again(run.threads, threads, progress))
        run = _changed(run, settings)
        tokens = _same_tokens(run, folder, progress)
        if path is None:
            progress.note(f"{folder} has no checkpoint yet; it starts again from its first step.")
            session = new_session(run, folder, tokens, progress)
        else:
            session = restored_session(run, folder, tokens, path, progress)
        if not _lengthen(session, length):
            return Finished(folder, 0)
        rehearse(session, length.minutes, began)
        if path is not None:
            session.optimizer.load_state_dict(checkpoint.load(path, "optimizer"))
        _drop_later(session, path)
        write_text(folder / "config.json", session.run.to_json())
        progress.note(f"Going on from step {session.clock.step:,} of {session.run.plan.steps:,}.")
        return Finished(folder, train(session))


def _threads_again(before: int, asked: int | None, progress: Progress) -> int:
    """Set the threads of a resumed run; says so where they are not as many as before."""
    using = set_threads(min(before, available_threads()) if asked is None else asked)
    if using != before:
        why = "" if asked is not None else ", all that there are here"
        progress.note(f"The run used {before} threads, now {using}{why}: last digits of the results will differ.")
    return using


def _changed(run: RunConfig, settings: tuple[str, ...]) -> RunConfig:
    """Apply the settings that a resumed run may change; refuse the others."""
    wanted = with_settings(run, settings)
    allowed = run
    for section, keys in CHANGEABLE.items():
        values = {key: getattr(getattr(wanted, section), key) for key in keys}
        allowed = replace(allowed, **{section: replace(getattr(run, section), **values)})
    if allowed != wanted:
        names = ", ".join(name for group in CHANGEABLE.values() for name in group)
        raise UserError(f"A resumed run keeps its settings; --set may change only {names}.")
    return allowed


def _same_tokens(run: RunConfig, folder: Path, progress: Progress) -> TokenData:
    """The tokens that a run was trained on, checked; UserError if there are others in their place."""
    tokens = open_run_tokens(run.data)
    if tokens.hash != run.data_hash:
        raise UserError(
            f"The tokens in {run.data} are not those that {folder} was trained on; prepare the same data "
            "there, or start a new run."
        )
    tokens.verify(progress=progress)
    inputs.check(run, tokens)
    return tokens


def _lengthen(session: Session, length: Length) -> bool:
    """Give the run the length asked for; False, having said so, if nothing is left to train."""
    at, fixed = session.clock.step, session.run.fixed_schedule
    if length.in_steps:
        session.run = plan_for(session.run, steps=length.steps, tokens=length.tokens)
        if session.run.plan.steps < at:
            raise UserError(f"{session.folder} is already at step {at:,}; ask for more than that.")
    end = session.run.plan.steps if length.minutes is None else fixed or math.inf
    if at < end:
        return True
    more = "" if at == fixed else "; give --steps, --tokens or --minutes to go further"
    session.progress.note(f"{session.folder} is complete at step {at:,}{more}.")
    return False


def _drop_later(session: Session, path: Path | None) -> None:
    """Drop what was saved and logged after the step that the run goes on from, as it will be written again.

    path : of the checkpoint that it goes on from; None: from the start
    """
    folder, at = session.folder, session.clock.step
    for name in checkpoint.set_aside_after(folder, at):
        session.progress.note(f"A later checkpoint was set aside as {folder / 'checkpoints' / name}.")
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        kept = []
        for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= at:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # torn by a crash
        write_text(metrics, "".join(kept))
    samples = folder / "samples.txt"
    if samples.exists():
        size = checkpoint.load_state(path).get("samples_bytes", 0) if path else 0
        with samples.open("r+b") as file:
            file.truncate(min(size, samples.stat().st_size))


# --- both ---


def rehearse(session: Session, minutes: float | None, began: float) -> None:
    """Load every kernel that a step and a validation need, on a small batch; with minutes, plan them by the speed.

    The steps are done at learning rate 0 and leave no trace: the parameters stay, the moments are dropped.
    """
    phase = session.run.training.phases[0]
    train_step(session, replace(phase, batch_size=2, seq_len=min(16, phase.seq_len)), 0, lr=0.0)
    if session.subset:
        score(session.model, [session.subset[0][:16]], eot=session.data.vocabulary.eot)
    if minutes is not None:
        session.run = plan_minutes(session, minutes, began)
    session.optimizer.load_state_dict({})
