"""Checkpoints, written atomically and checked by SHA-256 when read; and the lock of a run's folder.

RUN/checkpoints/step-<N>/ holds safetensors files and state.json, which records the SHA-256 of each file and of itself.
Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import numpy as np

from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import free_name, parse_json, remove_folder, replace, sync_folder, write_text
from flashlm_numba.system.locks import LockedError, locked
from flashlm_numba.system.tensors import read_tensors, write_tensors

KEEP = 3  # number of recent checkpoints that a run keeps


@dataclass(frozen=True)
class Validation:
    """What a run's validations have shown: a later loss above the best one means that training on made it worse."""

    best_step: int
    best_nll: float
    last_step: int  # the last step that was validated

    def after(self, step: int, nll: float) -> Validation:
        """With the validation of one more step."""
        return Validation(step, nll, step) if nll < self.best_nll else replace_fields(self, last_step=step)

    @property
    def has_passed(self) -> bool:
        """Whether a later step was worse than the best one."""
        return self.best_step != self.last_step


def save(run: Path, step: int, files: dict[str, dict[str, np.ndarray]], state: dict[str, Any]) -> Path:
    """Write RUN/checkpoints/step-<step> and delete old checkpoints. Returns its path.

    files : file name (without .safetensors) -> tensors
    state : JSON values for state.json; "keep": true marks a checkpoint that is never deleted, and "validation" is a
        Validation as a dict, or None
    The newest KEEP checkpoints, the marked ones and the best remain. The folder gets its name only when every byte is
    on disk.
    Raises UserError if writing fails.
    """
    parent = run / "checkpoints"
    final = parent / f"step-{step}"
    temporary = parent / f".tmp-step-{step}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left_over in parent.glob(".tmp-*"):  # left by a process that was killed while saving
            shutil.rmtree(left_over)
        temporary.mkdir()
        hashes = {}
        for name, tensors in files.items():
            hashes[f"{name}.safetensors"] = write_tensors(temporary / f"{name}.safetensors", tensors)
        content = {"step": step, **state, "files": hashes}
        write_text(temporary / "state.json", json.dumps({**content, "sha256": _hash(content)}, indent=1) + "\n")
        sync_folder(temporary)
        if final.exists():  # a resumed run saves the same step again
            replace(final, parent / f".tmp-old-step-{step}")
        replace(temporary, final)
        sync_folder(parent)
        for left_over in parent.glob(".tmp-*"):
            shutil.rmtree(left_over)
        best = (validation := state.get("validation")) and validation["best_step"]
        passing = [step for step in _steps(run) if not _marked(parent / f"step-{step}")]
        for old in passing[:-KEEP]:
            if old != best:
                _remove(parent / f"step-{old}")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"The checkpoint of step {step} could not be written to {parent}: {error.strerror or error}; "
            "free some space there and resume the run from its last checkpoint."
        ) from error
    return final


def damage(checkpoint: Path) -> str | None:
    """A short description of the damage to a checkpoint, or None if it is intact."""
    try:
        state = parse_json((checkpoint / "state.json").read_text(encoding="utf-8"))
        recorded = state.pop("sha256")
        if _hash(state) != recorded or checkpoint.name != f"step-{state['step']}":
            return "state.json does not match its recorded SHA-256"
        for name, want in state["files"].items():
            if Path(name).name != name:
                return "state.json names a file elsewhere"
            with (checkpoint / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != want:
                    return f"{name} does not match its recorded SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "state.json cannot be read"
    return None


def find(run: Path, name: str | None = None) -> Path:
    """The newest checkpoint of a run, or the one named "step-<N>" or "<N>", after checking every byte.

    Raises UserError if there is none or if it is damaged; the message then names the last intact checkpoint.
    """
    if not run.is_dir():
        raise UserError(f"There is no run at {run}; give a folder written by `flashlm-numba train`.")
    steps = _steps(run)
    if not steps:
        raise UserError(f"{run} has no checkpoint yet; train it first, or give another run.")
    if name is None:
        step = steps[-1]
    else:
        number = str(name).removeprefix("step-")
        if not number.isdecimal() or int(number) not in steps:
            have = ", ".join(f"step-{step}" for step in steps)
            raise UserError(f"{run} has no checkpoint '{name}'; it has {have}.")
        step = int(number)
    checkpoint = run / "checkpoints" / f"step-{step}"
    reason = damage(checkpoint)
    if reason is None:
        return checkpoint
    which = "The newest checkpoint" if step == steps[-1] else "The checkpoint"
    raise UserError(f"{which} {checkpoint} is damaged ({reason}); {_remedy(checkpoint)}.")


def find_best(run: Path, name: str | None = None) -> Path:
    """The checkpoint to use if none is named: the best on the validation text, if later ones were worse, else the
    newest. It is checked, and a name is taken, as by find.
    """
    steps = _steps(run)
    if name is None and steps and (validation := validation_of(run / "checkpoints" / f"step-{steps[-1]}")):
        name = f"step-{validation.best_step}" if validation.has_passed else None
    return find(run, name)


def validation_of(checkpoint: Path) -> Validation | None:
    """The Validation in a checkpoint's state; None if there was none yet, or its state.json is damaged."""
    try:
        state = load_state(checkpoint)
        if _hash({key: value for key, value in state.items() if key != "sha256"}) != state["sha256"]:
            return None
        return Validation(**state["validation"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _remedy(checkpoint: Path) -> str:
    """What to do if a checkpoint cannot be used."""
    parent, this = checkpoint.parent, int(checkpoint.name.removeprefix("step-"))
    others = [step for step in reversed(_steps(parent.parent)) if step != this]
    intact = next((step for step in others if damage(parent / f"step-{step}") is None), None)
    if intact is None:
        return "there is no other intact checkpoint, so start a new run"
    return f"use the last intact one with --checkpoint step-{intact}"


def any_in(run: Path) -> bool:
    """Whether a run has a checkpoint, intact or not."""
    return bool(_steps(run))


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The values of a checkpoint's state.json."""
    return parse_json((checkpoint / "state.json").read_text(encoding="utf-8"))


def check_state(state: Any, where: Path, model_hash: str | None = None) -> dict[str, Any]:
    """Return state if it contains a valid step, tokens and seconds; raise UserError otherwise.

    The hashes detect damage, but a forged file can have correct hashes.
    model_hash : RunConfig.model_hash, which the state's must equal; None for an exported file, which holds its settings
    """
    if isinstance(state, dict) and model_hash is not None and state.get("model_hash") != model_hash:
        raise UserError(
            f"The model settings in config.json are not the ones that {where} was trained with; restore the file."
        )
    kinds: dict[str, tuple[type, ...]] = {"step": (int,), "tokens": (int,), "seconds": (int, float)}
    if isinstance(state, dict) and all(
        isinstance(state.get(name), kind) and not isinstance(state[name], bool) and 0 <= state[name] < 2**63
        for name, kind in kinds.items()
    ):
        return state
    raise UserError(f"{where} does not record its training progress (step, tokens, seconds); use another checkpoint.")


def load(checkpoint: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of one file of a checkpoint, by name.

    name : model, optimizer or ema
    Raises UserError if the file is damaged or contains a float that is not finite. A fixed log prior may be -inf.
    """
    from safetensors import SafetensorError

    try:
        tensors = read_tensors(checkpoint / f"{name}.safetensors")
    # the last four arise from a dtype that NumPy lacks
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{checkpoint / name}.safetensors cannot be read as tensors ({error}); {_remedy(checkpoint)}."
        ) from None
    if (key := not_finite(tensors)) is not None:
        raise UserError(
            f"{key} in {checkpoint / name}.safetensors contains values that are not finite, so this checkpoint "
            f"cannot be used; {_remedy(checkpoint)}."
        )
    return tensors


def not_finite(tensors: dict[str, np.ndarray]) -> str | None:
    """The name of a tensor that contains NaN or infinity, or None. A fixed log prior may be -inf."""
    floats = ((name, value) for name, value in tensors.items() if value.dtype.kind == "f" and name != "log_prior")
    return next((name for name, value in floats if not np.isfinite(value).all()), None)


def _marked(checkpoint: Path) -> bool:
    """Whether a checkpoint is marked to be kept; False if its state cannot be read."""
    try:
        return load_state(checkpoint).get("keep") is True
    except (OSError, ValueError, AttributeError):
        return False


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint. It is renamed first if possible, so that a half-deleted one does not look like one."""
    hidden = checkpoint.with_name(f".tmp-old-{checkpoint.name}")
    try:
        os.rename(checkpoint, hidden)
    except OSError:  # such as EXDEV for a folder of a container's image
        hidden = checkpoint
    remove_folder(hidden)


def later_than(run: Path, step: int) -> list[int]:
    """Steps of the checkpoints after `step`, ascending."""
    return [later for later in _steps(run) if later > step]


def set_aside_after(run: Path, step: int) -> list[str]:
    """Rename the checkpoints after `step`, which a resumed run will write again. Returns the new names.

    Checkpoints that were set aside before keep their names.
    """
    parent = run / "checkpoints"
    names = []
    for later in later_than(run, step):
        new = free_name(parent, f"set-aside-step-{later}")
        replace(parent / f"step-{later}", new)
        names.append(new.name)
    return names


@contextlib.contextmanager
def lock(run: Path, remedy: str = "wait for it, or stop it") -> Iterator[None]:
    """Lock a run's folder for this process. Raises UserError, ending with `remedy`, if another process trains in it."""
    run.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(run / ".lock"))
        except LockedError as error:
            advice = f" {error.advice}" if error.advice else ""
            raise UserError(f"Another process is training in {run}; {remedy}.{advice}") from None
        yield


def _steps(run: Path) -> list[int]:
    """Steps of the checkpoints in a run, ascending."""
    numbers = (path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*"))
    return sorted(int(number) for number in numbers if number.isdecimal())


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
