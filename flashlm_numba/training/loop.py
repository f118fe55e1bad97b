"""The training loop: steps, log, validation, checkpoints, and a plan that is always in steps.

A run is a folder: config.json, metrics.jsonl (a JSON object per line), samples.txt, checkpoints/step-<N>/.
What a step draws is a function of the seed and the step's number: batches and positions come from generators
seeded by them, so that a resumed run needs no stored position and goes on bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashlm_numba.data.shards import TokenData, is_prepared, open_run_tokens, open_tokens, sample_batch
from flashlm_numba.data.tokenizer import EOT, Tokenizer
from flashlm_numba.heads import head_class
from flashlm_numba.inference.evaluate import score, validation_subset
from flashlm_numba.inference.generate import generate_text
from flashlm_numba.kernels.optimizers import ema_update
from flashlm_numba.model import build as assemble
from flashlm_numba.model import checkpoint
from flashlm_numba.model.config import Phase, Plan, RunConfig, plan_for
from flashlm_numba.system.compiled import ensure_compiled
from flashlm_numba.system.display import Display
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.threads import available_threads
from flashlm_numba.training import inputs
from flashlm_numba.training.optimizer import PRESETS, Optimizer, OptimizerSettings, lr_scale

if TYPE_CHECKING:
    from flashlm_numba.model.model import Model

DEFAULT_MINUTES = 20.0  # a run of no stated length
CHECKPOINT_SECONDS = 120.0  # training time between checkpoints where checkpoint_every is 0
WINDOW, BATCH = 1_024, 2_048  # positions in validating; a longer receptive field raises the first
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
EMBEDDING = "embedding.weight"
_POSITIONS, _CANDIDATES = 1, 2  # the random streams of the positions and of the head, beside the batches' own
_CHUNK = 1 << 18  # elements exchanged at a time, without a temporary of the array's size


@dataclass
class Clock:
    """Where a run stands."""

    step: int = 0  # steps done
    tokens: int = 0  # tokens seen
    seconds: float = 0.0  # of training: the embedding's start, the tree, steps and saving; not compiling or validating


@dataclass
class Session:
    """One run in progress."""

    run: RunConfig
    folder: Path
    data: TokenData
    model: Model
    optimizer: Optimizer
    ema: dict[str, np.ndarray]  # running average of the parameters; empty where none is kept
    clock: Clock = field(default_factory=Clock)
    subset: list[np.ndarray] = field(default_factory=list)  # the validation documents
    tokenizer: Tokenizer = field(default_factory=Tokenizer)


@dataclass(frozen=True)
class Step:
    """What one step did."""

    loss: float  # nats per position: what was minimised, smoothing and z-loss included
    nll: float  # nats per token at the same positions: plain -ln p
    lr: float  # of AdamW
    seconds: float
    shares: dict[str, float]  # of the step's time: embedding, trunk, head, optimizer


def optimizer_settings(run: RunConfig) -> OptimizerSettings:
    """The update rules' settings that a run's configuration asks for."""
    o = run.optimizer
    return replace(
        PRESETS[o.normuon],
        normuon_lr=o.normuon_lr,
        normuon_iterations=o.normuon_iterations,
        adamw_lr=o.adamw_lr,
        adamw_trunk_factor=o.nonembedding_lr_scale,
        adamw_beta1=o.adamw_beta1,
        adamw_beta2=o.adamw_beta2,
        adamw_decay=o.weight_decay,
        adamw_lazy=o.sparse_adamw,
        adamw_rows=o.rowwise_exp_avg_sq,
        clip=o.clip,
    )


def position_weights(seed: int, step: int, micro: int, positions: int, share: float, micros: int) -> np.ndarray:
    """Each position's share of the step's loss, (positions,) float32; over the micro-batches they sum to 1.

    A random `share` of the positions (at least one) counts, drawn from (seed, step, micro); the others are 0.

    >>> sorted(position_weights(0, 1, 0, 8, 0.25, 2).tolist())
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 0.25]
    """
    kept = max(1, int(positions * share))
    if kept == positions:
        return np.full(positions, 1 / (positions * micros), np.float32)
    rng = np.random.default_rng((seed, step, micro, _POSITIONS))
    weights = np.zeros(positions, np.float32)
    weights[rng.permutation(positions)[:kept]] = 1 / (kept * micros)
    return weights


def train_step(session: Session, phase: Phase, step: int, *, lr: float, full: bool = False) -> Step:
    """One optimiser step on the batches of `step`; lr is the schedule's factor (0 changes no parameter).

    full : a head that draws candidates takes all tokens.

    Raises UserError, before any parameter is changed, where the loss or a gradient is not finite.
    """
    run, model = session.run, session.model
    start = time.perf_counter()
    model.sync_weights()
    loss = nll = 0.0
    shares = {"embedding": 0.0, "trunk": 0.0, "head": 0.0, "optimizer": 0.0}
    for micro in range(phase.grad_accum):
        ids, targets = sample_batch(session.data.train, run.seed, step, micro, phase.batch_size, phase.seq_len)
        weights = position_weights(run.seed, step, micro, targets.size, run.head.loss_fraction, phase.grad_accum)
        model.head.begin(np.random.default_rng((run.seed, step, micro, _CANDIDATES)), full=full)
        losses, nlls, seconds = model.loss_and_grad(ids, targets, weights, accumulate=micro > 0)
        share = 1 / (len(losses) * phase.grad_accum)  # the same for every position that counts
        loss += float(losses.sum(dtype=np.float64)) * share
        nll += float(nlls.sum(dtype=np.float64)) * share
        for name, spent in seconds.items():
            shares[name] += spent
    before = time.perf_counter()
    if not math.isfinite(loss):
        named = [
            *model.parameters.items(),
            *((f"the gradient of {n}", g) for n, g in model.gradients.items()),
        ]
        bad = next((name for name, value in named if not np.isfinite(value).all()), "the logits")
        raise UserError(f"The loss is {loss} ({bad} not finite), so training has diverged; nothing was updated.")
    settings = session.optimizer.settings
    rates = settings.normuon_lr * lr, settings.adamw_lr * lr
    # rows that start at random or from the corpus are ours to train from the first step
    frozen = {EMBEDDING} if phase.frozen and run.embedding_given else set()
    session.optimizer.step(*rates, settings.clip, frozen=frozen)
    end = time.perf_counter()
    shares["optimizer"] = end - before
    return Step(
        loss,
        nll,
        rates[1],
        end - start,
        {name: round(spent / (end - start), 4) for name, spent in shares.items()},
    )


# --- starting ---


def start_run(
    run: RunConfig,
    *,
    data: str | None = None,
    out: Path | None = None,
    seed: int | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    minutes: float | None = None,
    threads: int,
) -> int:
    """Train a new run; returns the exit status (0, or 128 plus the signal's number: 130 after Ctrl-C).

    run : settings without plan;  data : a prepared folder, None for the built-in text;  out : its folder
    steps, tokens, minutes : the length, one of them or none (the recipe's own, or 20 minutes)
    threads : the number in use, recorded. Raises UserError for whatever the user can mend.
    """
    began = time.perf_counter()
    name = f"{run.head.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = out if out is not None else Path("runs") / name
    _check_free(folder)
    with Display() as display:
        source = inputs.training_data(data, display.note)
        token_data = open_tokens(source)
        token_data.verify()
        run = replace(
            run,
            seed=run.seed if seed is None else seed,
            threads=threads,
            data=str(source.resolve()),
            data_hash=token_data.hash,
        )
        inputs.check(run, token_data)
        # what is impossible is said before the folder is made and the embedding computed
        fixed_length = steps is not None or tokens is not None
        if fixed_length:
            run = plan_for(run, steps=steps, tokens=tokens)
        elif minutes is None and run.fixed_schedule is not None:
            run = plan_for(run, steps=run.fixed_schedule)
            fixed_length = True
        another = "choose another --out"
        with _writing_to(folder, another), checkpoint.lock(folder, f"wait for it, stop it, or {another}"):
            _check_free(folder)  # another start may have been here since
            session = _new_session(run, folder, token_data, display)
            with _rehearsal(session):
                _warm_up(session, display)
                if not fixed_length:
                    minutes = DEFAULT_MINUTES if minutes is None else minutes
                    session.run = _plan_minutes(session, minutes, began, display)
            checkpoint.write_text(folder / "config.json", session.run.to_json())
            _describe(session, display)
            try:
                return _loop(session, display)
            except MemoryError:
                if not session.clock.step:  # nothing is lost, and the folder is free for smaller settings
                    for made in ("config.json", "metrics.jsonl"):
                        (folder / made).unlink(missing_ok=True)
                raise


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


def resume_run(
    folder: Path,
    *,
    checkpoint_name: str | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    minutes: float | None = None,
    threads: int | None = None,
    settings: tuple[str, ...] = (),
    set_threads: Callable[[int | None], int],
) -> int:
    """Go on with a run from its newest checkpoint, or the one named; returns the exit status as start_run.

    steps, tokens : a new length, counted from the run's first step;  minutes : so much more training
    threads : default the run's own number, or all that this machine has where those are fewer
    settings : key=value of CHANGEABLE.  Raises UserError.
    """
    began = time.perf_counter()
    run = assemble.read_config(folder)
    elsewhere = "make it writable, or copy the run to where you may write and resume the copy"
    with Display() as display, _writing_to(folder, elsewhere), checkpoint.lock(folder, "wait for it, or stop it"):
        path = None
        if checkpoint_name is not None or checkpoint.any_in(folder):
            path = checkpoint.find(folder, checkpoint_name)
        using = set_threads(min(run.threads, available_threads()) if threads is None else threads)
        if using != run.threads:
            why = "" if threads is not None else ", all that there are here"
            display.note(
                f"The run used {run.threads} threads, now {using}{why}: last digits of the results will differ."
            )
        run = replace(_changed(run, settings), threads=using)
        token_data = open_run_tokens(run.data)
        if token_data.hash != run.data_hash:
            raise UserError(
                f"The tokens in {run.data} are not those that {folder} was trained on; prepare the same data "
                "there, or start a new run."
            )
        token_data.verify()
        inputs.check(run, token_data)
        if path is None:
            display.note(f"{folder} has no checkpoint yet; it starts again from its first step.")
            session = _new_session(run, folder, token_data, display)
        else:
            session = _restored_session(run, folder, token_data, path, display)
        at = session.clock.step
        if steps is not None or tokens is not None:
            session.run = plan_for(run, steps=steps, tokens=tokens)
            if session.run.plan.steps < at:
                raise UserError(f"{folder} is already at step {at:,}; ask for more than that.")
        if at >= (session.run.plan.steps if minutes is None else run.fixed_schedule or math.inf):
            more = "" if at == run.fixed_schedule else "; give --steps, --tokens or --minutes to go further"
            display.note(f"{folder} is complete at step {at:,}{more}.")
            return 0
        with _rehearsal(session):
            _warm_up(session, display)
            if minutes is not None:
                session.run = _plan_minutes(session, minutes, began, display)
        if path is not None:
            session.optimizer.load_state_dict(checkpoint.load(path, "optimizer"))
        for name in checkpoint.set_aside_after(folder, at):
            display.note(f"A later checkpoint was set aside as {folder / 'checkpoints' / name}.")
        _cut_back(session, path)
        checkpoint.write_text(folder / "config.json", session.run.to_json())
        display.note(f"Going on from step {at:,} of {session.run.plan.steps:,}.")
        return _loop(session, display)


def _changed(run: RunConfig, settings: tuple[str, ...]) -> RunConfig:
    """Apply the settings that a resumed run may change; refuse the others."""
    wanted = run.with_settings(settings)
    allowed = run
    for section, keys in CHANGEABLE.items():
        values = {key: getattr(getattr(wanted, section), key) for key in keys}
        allowed = replace(allowed, **{section: replace(getattr(run, section), **values)})
    if allowed != wanted:
        names = ", ".join(name for group in CHANGEABLE.values() for name in group)
        raise UserError(f"A resumed run keeps its settings; --set may change only {names}.")
    return allowed


def _new_session(run: RunConfig, folder: Path, data: TokenData, display: Display) -> Session:
    model, seconds = assemble.new_model(run, data, display.note, lambda: ensure_compiled(display.note))
    ema = {name: value.copy() for name, value in model.parameters.items()} if run.training.ema else {}
    session = _session(run, folder, data, model, ema)
    session.clock.seconds = seconds
    return session


def _restored_session(run: RunConfig, folder: Path, data: TokenData, path: Path, display: Display) -> Session:
    ensure_compiled(display.note)
    display.note(f"Reading {path}.")
    state = checkpoint.check_state(checkpoint.load_state(path), path, run.model_hash)
    counts = data.train.counts(run.model.vocab_size)
    model = assemble.model_from(run, checkpoint.load(path, "model"), counts)
    ema = checkpoint.load(path, "ema") if run.training.ema else {}
    if ema and {name: (a.shape, a.dtype) for name, a in ema.items()} != {
        name: (a.shape, a.dtype) for name, a in model.parameters.items()
    }:
        raise UserError(f"The average in {path} is not of this model's weights; use another checkpoint.")
    session = _session(run, folder, data, model, ema)
    session.clock = Clock(state["step"], state["tokens"], state["seconds"])
    return session


def _session(run: RunConfig, folder: Path, data: TokenData, model: Model, ema: dict[str, np.ndarray]) -> Session:
    optimizer = Optimizer(model.parameters, model.gradients, optimizer_settings(run))
    subset = validation_subset(data.validation, run.training.validation_tokens)
    return Session(run, folder, data, model, optimizer, ema, subset=subset)


def _warm_up(session: Session, display: Display) -> None:
    """Load every kernel that a step and a validation need, on a small batch."""
    phase = session.run.training.phases[0]
    train_step(session, replace(phase, batch_size=2, seq_len=min(16, phase.seq_len)), 0, lr=0.0)
    if session.subset:
        score(session.model, [session.subset[0][:16]], eot=EOT)


@contextlib.contextmanager
def _rehearsal(session: Session) -> Iterator[None]:
    """Steps done inside, at learning rate 0, leave no trace: the parameters stay, the moments are dropped."""
    yield
    session.optimizer.load_state_dict({})


# --- a plan from minutes ---


def _plan_minutes(session: Session, minutes: float, began: float, display: Display) -> RunConfig:
    """Turn minutes into steps, from the speed of each phase that will be reached, measured at lr 0.

    The minutes are the training clock's, less what starting and validating will take, up to 2 % of them.
    """
    display.note("Measuring the speed ...")
    run, at = session.run, session.clock.step
    started = time.perf_counter()
    validation = 0.0
    if few := session.subset[:1]:
        score(session.model, few, eot=EOT, window=WINDOW, batch=BATCH)
        validation = (time.perf_counter() - started) * run.training.validation_tokens / len(few[0])
    budget = min(60.0, max(1.0, 0.02 * minutes * 60))  # seconds for measuring a phase, two steps at least
    fixed = run.fixed_schedule
    full_ratio = head_class(run.head.name).full_ratio(run.head)
    rates: list[float] = []
    steps, left = at, minutes * 60
    if at == 0:  # the embedding's start and the tree are on the clock already
        left -= min(session.clock.seconds, left)
    for phase in run.training.phases:
        end = math.inf if phase.last_step is None else phase.last_step
        if end <= at:
            rates.append(0.0)  # over before this plan begins
            continue
        kinds = ((False, 1 - full_ratio), (True, full_ratio))
        rates.append(sum(share * _step_seconds(session, phase, budget, full=full) for full, share in kinds if share))
        if len(rates) == 1 or steps == at:
            validations = 1 + left / rates[-1] / (run.training.validate_every or math.inf)
            left -= min(0.02 * left, time.perf_counter() - began + validations * validation)
        here = min(end - steps, math.floor(left / rates[-1]))
        steps += int(here)
        left -= here * rates[-1]
        if steps < end:
            break
    steps = max(steps, at + 1)
    plan = Plan(steps, fixed or steps, minutes, tuple(rates))
    reached = ", ".join(f"{rate:.3g} s a step" for rate in rates if rate)
    display.note(f"{minutes:g} {'minute is' if minutes == 1 else 'minutes are'} {steps - at:,} steps ({reached}).")
    return replace(run, plan=plan)


def _step_seconds(session: Session, phase: Phase, budget: float, *, full: bool = False) -> float:
    """Seconds that a step of this phase takes, from steps at lr 0 for about `budget` seconds."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        times.append(train_step(session, phase, len(times) + 1, lr=0.0, full=full).seconds)
    return statistics.fmean(times[1:])  # the mean, slow steps included, is what a run's length follows


# --- the loop ---


def _loop(session: Session, display: Display) -> int:
    """Train until the plan's last step or a signal; returns the exit status."""
    run, clock = session.run, session.clock
    training, plan = run.training, run.plan
    sampled_steps = plan.schedule_steps * (1 - head_class(run.head.name).full_ratio(run.head))  # the first ones
    saved_at = clock.seconds
    seen_at = clock.seconds if clock.step else 0.0  # a mark may pass while the start and the tree are made
    saved_step = clock.step if checkpoint.any_in(session.folder) else -1
    metrics = session.folder / "metrics.jsonl"
    with (
        _writing_to(session.folder, f"make room there and go on with: flashlm-numba train --resume {session.folder}"),
        _signals() as caught,
        metrics.open("a", encoding="utf-8") as log,
        display.steps(plan.steps, clock.step),
    ):
        while clock.step < plan.steps and not caught:
            step = clock.step + 1
            phase = run.phase_at(step)
            scale = lr_scale(
                step - 1,
                total=plan.schedule_steps,
                warmup=run.optimizer.warmup_steps,
                decay=run.optimizer.warmdown_ratio * plan.schedule_steps,
            )
            sampled = step <= sampled_steps  # the loss and NLL read low
            try:
                done = train_step(session, phase, step, lr=scale, full=not sampled)
            except UserError as error:
                raise _stopped(session, step, error) from None
            spent = done.seconds + _update_ema(session)
            clock.step, clock.tokens, clock.seconds = step, clock.tokens + phase.tokens, clock.seconds + spent
            last = step == plan.steps
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
            due = last or (training.validate_every and step % training.validate_every == 0)
            if due and session.subset:
                try:
                    line |= _validate(session, display)
                except UserError as error:
                    raise _stopped(session, step, error) from None
            if due or step % training.log_every == 0:
                log.write(json.dumps(line) + "\n")
                log.flush()
            left = (run.tokens_until(plan.steps) - clock.tokens) * spent / phase.tokens
            display.step(line, left)
            keep = _passed(training.checkpoint_minutes, seen_at, clock.seconds)
            seen_at = clock.seconds
            if training.checkpoint_every:
                save = step % training.checkpoint_every == 0
            else:
                save = clock.seconds - saved_at >= CHECKPOINT_SECONDS
            if save or keep or last:
                _save(session, log, keep=keep)
                saved_at, saved_step = clock.seconds, step
        if caught and clock.step < plan.steps and clock.step != saved_step:
            # a mark may have passed while the last checkpoint was written
            _save(session, log, keep=_passed(training.checkpoint_minutes, seen_at, clock.seconds))
    if clock.step < plan.steps:
        display.note(
            f"Stopped after step {clock.step:,}, saved; go on with: flashlm-numba train --resume {session.folder}"
        )
        return 128 + caught[0]
    display.note(f"Done: {session.folder}")
    return 0


def _passed(minutes: Iterable[float], since: float, now: float) -> bool:
    """Whether the clock, in seconds, has passed one of these minutes."""
    return any(since < 60 * mark <= now for mark in minutes)


def _validate(session: Session, display: Display) -> dict[str, float]:
    """NLL on the fixed subset, of the weights and their average if there is one; a text for samples.txt."""
    tokens = sum(map(len, session.subset))

    def nll() -> float:
        return score(session.model, session.subset, eot=EOT, window=WINDOW, batch=BATCH).mean_nll

    values = {"val_nll": nll()}
    if session.ema:
        _exchange(session)
        try:
            values["val_nll_ema"] = nll()
        finally:
            _exchange(session)
    text = ", of the average weights ".join(f"{value:.4f}" for value in values.values())
    if not all(map(math.isfinite, values.values())):
        raise UserError(f"The NLL of the validation text is {text}, so training has diverged.")
    display.note(f"step {session.clock.step:,}: NLL on a fixed {tokens:,}-token subset of the validation text {text}")
    if session.run.training.sample_tokens:
        pieces = generate_text(
            session.model,
            session.tokenizer,
            "",
            max_tokens=session.run.training.sample_tokens,
            seed=session.run.seed,
            temperature=0.8,
            eot=EOT,
        )
        with (session.folder / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"=== step {session.clock.step} ===\n{''.join(pieces)}\n\n")
    return values


def _exchange(session: Session) -> None:
    """Swap the parameters with their average, in place and without a copy of them."""
    for name, value in session.model.parameters.items():
        a, b = value.reshape(-1), session.ema[name].reshape(-1)
        for i in range(0, len(a), _CHUNK):
            part = a[i : i + _CHUNK].copy()
            a[i : i + _CHUNK] = b[i : i + _CHUNK]
            b[i : i + _CHUNK] = part


def _update_ema(session: Session) -> float:
    """Move the average towards the parameters by 1 - decay; returns the seconds it took."""
    start = time.perf_counter()
    for name, average in session.ema.items():
        ema_update(average, session.model.parameters[name], session.run.training.ema)
    return time.perf_counter() - start


def _save(session: Session, log: Any, *, keep: bool = False) -> None:
    """Write a checkpoint; its time counts as training. keep: later ones do not replace it."""
    start = time.perf_counter()
    log.flush()
    os.fsync(log.fileno())  # the log is never behind a checkpoint
    files = {
        "model": assemble.tensors_of(session.model),
        "optimizer": session.optimizer.state_dict(),
    }
    if session.ema:
        files["ema"] = session.ema
    samples = session.folder / "samples.txt"
    state = {
        **dataclasses.asdict(session.clock),
        "generators": {"seed": session.run.seed},  # every draw is a function of (seed, step)
        "data_position": session.clock.step,
        "keep": keep,
        "model_hash": session.run.model_hash,
        "samples_bytes": samples.stat().st_size if samples.exists() else 0,
    }
    checkpoint.save(session.folder, session.clock.step, files, state)
    session.clock.seconds += time.perf_counter() - start


def _cut_back(session: Session, path: Path | None) -> None:
    """Drop what was logged after the step that the run goes on from, as it will be written again."""
    metrics = session.folder / "metrics.jsonl"
    if metrics.exists():
        kept = []
        for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= session.clock.step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # torn by a crash
        checkpoint.write_text(metrics, "".join(kept))
    samples = session.folder / "samples.txt"
    if samples.exists():
        size = checkpoint.load_state(path).get("samples_bytes", 0) if path else 0
        with samples.open("r+b") as file:
            file.truncate(min(size, samples.stat().st_size))


def _stopped(session: Session, step: int, error: UserError) -> UserError:
    """What ended training at this step, and what is left."""
    return UserError(f"Stopped at step {step}: {error} {_last_good(session.folder)}")


def _last_good(folder: Path) -> str:
    """What is left after training diverged."""
    try:
        name = checkpoint.find(folder).name
    except UserError:
        return "No checkpoint was saved before; try lower learning rates, such as --set adamw_lr=5e-4."
    return f"The last good checkpoint is {name}; resume there with, for example, --set adamw_lr=5e-4."


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list, so that the step is finished; a second one ends at once.

    SIGHUP comes when the terminal is closed; where it is ignored, as under nohup, it stays so.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # Python lets only the main thread handle signals
        return

    def remember(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        # not print: it may be what the signal interrupted, and it is not reentrant
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nFinishing the step and saving; once more to stop without saving.\n")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, remember) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _writing_to(folder: Path, remedy: str) -> Iterator[None]:
    """Turn the file system's refusals into a sentence that ends with a remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}; {remedy}."
        ) from error


def _describe(session: Session, display: Display) -> None:
    """Say what is about to be trained."""
    run = session.run
    size = sum(value.size for value in session.model.parameters.values())
    head = head_class(run.head.name).title(run.head)
    display.note(
        f"Training {size:,} parameters with the {head} head for {run.plan.steps:,} steps "
        f"({run.tokens_until(run.plan.steps):,} tokens) on {run.threads} thread{'s' * (run.threads > 1)}, "
        f"in {session.folder}"
    )
    for line in session.optimizer.summary().splitlines():
        display.note("  " + line)
