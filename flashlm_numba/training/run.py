"""Start a run, or resume it from a checkpoint, and train it with loop.py.

Nothing here prints or ends the process. Notes go to a Progress; an error that the user can correct is a UserError.
"""

from __future__ import annotations

import datetime
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from flashlm_numba.data.builtin import open_run_tokens
from flashlm_numba.data.shards import TokenData, is_prepared, open_tokens
from flashlm_numba.data.tokenizer import TOKENIZER
from flashlm_numba.data.vocabularies import write_vocabulary
from flashlm_numba.heads import head_class
from flashlm_numba.inference.evaluate import score
from flashlm_numba.memory.files import NGRAMS, write_ngrams
from flashlm_numba.model import build, checkpoint, data_place, sizes
from flashlm_numba.model.config import Plan, RunConfig
from flashlm_numba.model.parameters import ternary_names
from flashlm_numba.model.settings import check_run, with_settings
from flashlm_numba.model.training_memory import check_memory, training_bytes
from flashlm_numba.system.compiled import Compilation
from flashlm_numba.system.display import TERMINAL, Progress
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import free_name, parse_json, write_atomically, write_text, writing_to
from flashlm_numba.system.threads import available_threads, set_threads
from flashlm_numba.training import inputs
from flashlm_numba.training.loop import train
from flashlm_numba.training.plan import OWN_LENGTH, Length, plan_for, plan_minutes
from flashlm_numba.training.schedule import lr_scale
from flashlm_numba.training.session import Session, new_session, restored_session
from flashlm_numba.training.step import train_step
from flashlm_numba.training.tensorboard import TensorBoard, check_package

# settings that --resume may change: what is written and how often, and learning rates, for use after a divergence
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
    """The result of training a run: its folder and its exit status."""

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
    any_head: bool = False,
    tensorboard: Path | None = None,
    progress: Progress | None = TERMINAL,
) -> Finished:
    """Train a new run.

    run : settings without a plan;  length : default: the recipe's length, or 20 minutes
    data : a prepared folder; None for the built-in text;  out : folder of the run; default: a new folder in runs/
    threads : default: all that this process may use;  progress : receives notes and steps; None: shows nothing
    any_head : the run's head is only the recipe's default, so a small vocabulary gets the dense head
    tensorboard : folder in which a folder with the run's name receives the values of every step, for TensorBoard
    Raises UserError for any error that the user can correct, and ValueError for more threads than there are.
    """
    began = time.perf_counter()
    progress = Progress() if progress is None else progress
    if tensorboard is not None:
        check_package()
    if data is not None:  # before the head is named and compiled
        run = inputs.with_vocabulary_of(open_tokens(inputs.training_data(data, progress)), run, any_head)
    check_run(run)
    name = f"{run.head.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = out if out is not None else Path("runs") / name
    _check_free(folder)
    using = set_threads(threads)
    with _compiling(run, progress) as compilation:  # while the text is prepared
        run, tokens = _with_data(run, data, using, any_head, progress)
        # report an impossible length before creating the folder and computing the embedding
        length = length.or_own(run)
        if length.in_steps:
            run = plan_for(run, steps=length.steps, tokens=length.tokens)
        another = "choose another --out"
        with writing_to(folder, another), checkpoint.lock(folder, f"wait for it, stop it, or {another}"):
            _check_free(folder)  # another process may have started a run here since
            session = new_session(run, folder, tokens, progress, compilation)
            rehearse(session, length.minutes, began)
            _store_settings(session)
            _describe(session)
            _watch(session, tensorboard)
            return Finished(folder, _train_new(session))


def _check_free(folder: Path) -> None:
    """Raise UserError if the folder for a new run is not empty."""
    if (folder / "config.json").exists() or (folder / "checkpoints").exists():
        raise UserError(f"{folder} already holds a run; use --resume {folder}, or choose another --out.")
    if is_prepared(folder):
        raise UserError(f"{folder} holds prepared tokens; choose another --out for the run.")
    # a failed start may leave hidden files; deleting this run would also delete another run inside its folder
    inside = sorted(path.name for path in folder.glob("*") if not path.name.startswith(".")) if folder.is_dir() else []
    if inside:
        raise UserError(f"{folder} is not empty (it holds {inside[0]}); choose another --out for the run.")


def _with_data(
    run: RunConfig, data: str | None, threads: int, any_head: bool, progress: Progress
) -> tuple[RunConfig, TokenData]:
    """The settings completed with data and threads, and the tokens, after checking them."""
    source = inputs.training_data(data, progress)
    tokens = open_tokens(source)
    run = replace(run, threads=threads, data=str(source.resolve()), data_hash=tokens.hash)
    run = inputs.with_vocabulary_of(tokens, run, any_head)
    check_memory(run, tokens.train.n_tokens)
    tokens.verify(progress=progress)
    inputs.check(run, tokens)
    return run, tokens


def _store_memory(session: Session) -> None:
    """Write the n-grams of a run that has a memory."""
    if session.model.memory is not None:
        digest = write_ngrams(session.folder, session.model.memory.model)
        session.run = replace(session.run, memory_hash=digest)


def _store_settings(session: Session) -> None:
    """Write the vocabulary, the memory and the settings of a new run, or nothing if the disk is full."""
    folder = session.folder
    write_vocabulary(folder, session.data.vocabulary)
    try:
        _store_memory(session)
        write_text(folder / "config.json", data_place.stored(session.run, folder).to_json())
    except BaseException:
        for made in (TOKENIZER, NGRAMS):
            (folder / made).unlink(missing_ok=True)
        raise


def _describe(session: Session) -> None:
    """Note what is about to be trained."""
    run = session.run
    size = sum(value.size for value in session.model.parameters.values())
    head = head_class(run.head.name).title(run.head)
    session.progress.note(
        f"Training {size:,} parameters with the {head} head for {run.plan.steps:,} steps "
        f"({run.tokens_until(run.plan.steps):,} tokens) on {run.threads} thread{'s' * (run.threads > 1)}, "
        f"in {session.folder}"
    )
    for line in (*_sizes(session), *_memory_size(session), *session.optimizer.summary().splitlines()):
        session.progress.note("  " + line)


def _sizes(session: Session) -> list[str]:
    """Lines with the parameters by part, and the memory that the model takes in training and on a device."""
    model, run = session.model, session.run
    parts = sizes.parameters_by_part({name: value.shape for name, value in model.parameters.items()})
    ternary = sum(model.parameters[name].size for name in [*ternary_names(run.model), *model.head_ternary_names])
    device = sizes.device_bytes(model, session.data.vocabulary)
    packed, tables, state = map(sizes.in_units, device.values())
    return [
        f"{sizes.in_words(parts)}; {ternary:,} ternary, {sum(parts.values()) - ternary:,} float",
        f"packed {packed} with int8 rows, tokenizer {tables}, decoding state {state} in int8; "
        f"training takes about {sizes.in_units(training_bytes(run))} of memory",
    ]


def _memory_size(session: Session) -> list[str]:
    """A line with the size of the memory, if there is one."""
    if session.model.memory is None:
        return []
    found = session.model.memory.describe()
    size = sizes.in_units(found["bytes"])
    return [f"memory: {found['ngrams']:,} n-grams of up to {found['order']} tokens, {size}"]


def _watch(session: Session, tensorboard: Path | None) -> None:
    """Write the values of the session's steps for TensorBoard too, if there is a folder for them."""
    if tensorboard is not None:
        session.progress = TensorBoard(session.progress, tensorboard / session.folder.absolute().name)


def _train_new(session: Session) -> int:
    """Train. If memory does not suffice for the first step, free the folder for smaller settings."""
    try:
        return train(session)
    except MemoryError:
        if not session.clock.step:  # nothing has been trained
            for made in ("config.json", "metrics.jsonl", TOKENIZER, NGRAMS):
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
    data: Path | None = None,
    tensorboard: Path | None = None,
    progress: Progress | None = TERMINAL,
) -> Finished:
    """Resume a run from its newest checkpoint, or from the named one.

    length : default: the run's plan;  settings : key=value texts for settings in CHANGEABLE
    threads : default: the number that the run used, or all that this process may use if these are fewer
    data : folder of the tokens that the run was trained on, if they have moved;  tensorboard : as in start_run
    progress : receives notes and steps; None: shows nothing
    Raises UserError and ValueError as start_run does.
    """
    began = time.perf_counter()
    progress = Progress() if progress is None else progress
    if tensorboard is not None:
        check_package()
    run = build.read_config(folder)
    if data is not None:
        run = replace(run, data=str(data.resolve()))
    elsewhere = "make it writable, or copy the run to a writable folder and resume the copy"
    with writing_to(folder, elsewhere), checkpoint.lock(folder, "wait for it, or stop it"):
        path = None
        if checkpoint_name is not None or checkpoint.any_in(folder):
            path = checkpoint.find(folder, checkpoint_name)
        run = replace(run, threads=_threads_again(run.threads, threads, progress))
        run = _changed(run, settings)
        check_memory(run)
        with _compiling(run, progress) as compilation:
            tokens = _same_tokens(run, folder, progress)
            if path is None:
                progress.note(f"{folder} has no checkpoint yet; training starts again from the first step.")
                session = new_session(run, folder, tokens, progress, compilation)
            else:
                session = restored_session(run, folder, tokens, path, progress, compilation)
        before = session.run.plan
        if not _lengthen(session, length):
            return Finished(folder, 0)
        rehearse(session, length.minutes, began)
        session.run = _noting_lengthening(session.run, before, session.clock.step)
        if path is None:
            _store_memory(session)
        else:
            session.optimizer.load_state_dict(checkpoint.load(path, "optimizer"))
        _drop_later(session, path)
        write_text(folder / "config.json", data_place.stored(session.run, folder).to_json())
        _watch(session, tensorboard)
        progress.note(f"Resuming from step {session.clock.step:,} of {session.run.plan.steps:,}.")
        return Finished(folder, train(session))


def _threads_again(before: int, asked: int | None, progress: Progress) -> int:
    """Set the threads of a resumed run, and note if their number differs from before."""
    using = set_threads(min(before, available_threads()) if asked is None else asked)
    if using != before:
        why = "" if asked is not None else ", all that this process may use"
        progress.note(f"The run used {before} threads, now {using}{why}; the last digits of the results will differ.")
    return using


def _changed(run: RunConfig, settings: tuple[str, ...]) -> RunConfig:
    """Apply the settings that a resumed run may change; raise UserError for others."""
    wanted = with_settings(run, settings)
    allowed = run
    for section, keys in CHANGEABLE.items():
        values = {key: getattr(getattr(wanted, section), key) for key in keys}
        allowed = replace(allowed, **{section: replace(getattr(run, section), **values)})
    if allowed != wanted:
        names = ", ".join(name for group in CHANGEABLE.values() for name in group)
        raise UserError(f"In a resumed run --set may change only {names}.")
    return allowed


def _same_tokens(run: RunConfig, folder: Path, progress: Progress) -> TokenData:
    """The tokens that a run was trained on, checked. Raises UserError if they are not in the folder run.data."""
    tokens = open_run_tokens(run.data, folder, run.data_hash)
    tokens.verify(progress=progress)
    inputs.check(run, tokens)
    return tokens


def _lengthen(session: Session, length: Length) -> bool:
    """Give the run the requested length. Returns False, after a note, if nothing is left to train."""
    at, fixed = session.clock.step, session.run.fixed_schedule
    if length.in_steps:
        session.run = plan_for(session.run, steps=length.steps, tokens=length.tokens)
        if session.run.plan.steps < at:
            raise UserError(f"{session.folder} is already at step {at:,}; request more steps than that.")
    end = session.run.plan.steps if length.minutes is None else fixed or math.inf
    if at < end:
        return True
    more = "" if at == fixed else "; give --steps, --tokens or --minutes to train further"
    session.progress.note(f"{session.folder} is complete at step {at:,}{more}.")
    return False


def _noting_lengthening(run: RunConfig, before: Plan, step: int) -> RunConfig:
    """The run, whose plan says so if it is a new one after the old plan's warm-down had begun."""
    if run.plan == before:
        return run
    begun = step >= run.optimizer.warmup_steps and lr_scale(step, before.schedule_steps, run.optimizer) < 1
    return replace(run, plan=replace(run.plan, lengthened=before.lengthened or begun))


def _drop_later(session: Session, path: Path | None) -> None:
    """Remove checkpoints, metrics and samples after the step that the run resumes from; training writes them again.

    Checkpoints are set aside with the part of the log and of the samples that belongs to them. Without later
    checkpoints, as after a crash, training writes the same lines again.
    path : checkpoint to resume from; None: training starts again
    """
    folder, at = session.folder, session.clock.step
    metrics, samples = folder / "metrics.jsonl", folder / "samples.txt"
    kept, cut = _divided(metrics, at)
    size = checkpoint.load_state(path).get("samples_bytes", 0) if path else 0
    later = checkpoint.later_than(folder, at)
    if later:
        # first, since a run that is killed in between must not lose them
        _set_aside(session, metrics, "".join(cut).encode(), later[-1])
        _set_aside(session, samples, samples.read_bytes()[size:] if samples.exists() else b"", later[-1])
    for name in checkpoint.set_aside_after(folder, at):
        session.progress.note(f"A later checkpoint was set aside as {folder / 'checkpoints' / name}.")
    if metrics.exists():
        write_text(metrics, "".join(kept))
    if samples.exists():
        with samples.open("r+b") as file:
            file.truncate(min(size, samples.stat().st_size))


def _set_aside(session: Session, path: Path, content: bytes, step: int) -> None:
    """Write the end of a file, unless it is empty, to a new file named by the last step that is set aside."""
    if content:
        aside = free_name(path.parent, f"{path.stem}.set-aside-step-{step}", path.suffix)
        write_atomically(aside, lambda file: file.write(content))
        session.progress.note(f"The end of {path.name} was set aside as {aside}.")


def _divided(metrics: Path, at: int) -> tuple[list[str], list[str]]:
    """The lines of a log up to step `at`, and those after it, without lines torn by a crash."""
    kept: list[str] = []
    cut: list[str] = []
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.exists() else []
    for line in lines:
        try:
            (kept if parse_json(line)["step"] <= at else cut).append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return kept, cut


# --- both ---


def _compiling(run: RunConfig, progress: Progress) -> Compilation:
    """The compilation of the kernels that training this run needs, which starts now."""
    return Compilation(build.kernel_parts(run, ["train"]), progress)


def rehearse(session: Session, minutes: float | None, began: float) -> None:
    """Run a step and a validation on a small batch, to load their kernels; with minutes, plan by the measured speed.

    The steps use learning rate 0, so the parameters do not change. The moments are discarded afterwards.
    """
    phase = session.run.training.phases[0]
    train_step(session, replace(phase, batch_size=2, seq_len=min(16, phase.seq_len)), 0, lr=0.0)
    if session.subset:
        score(session.model, [session.subset[0][:16]], eot=session.data.vocabulary.eot)
    if minutes is not None:
        session.run = plan_minutes(session, minutes, began)
    session.optimizer.load_state_dict({})
