"""A model from a run's settings: new, or out of a checkpoint; and where a run's data lies."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashlm_numba import checkpoint
from flashlm_numba.config import HeadConfig, RunConfig
from flashlm_numba.errors import UserError

if TYPE_CHECKING:
    from flashlm_numba.data import TokenData
    from flashlm_numba.model import Model

Note = Callable[[str], None]  # shows a line to the user


@dataclass(frozen=True)
class Loaded:
    """A model out of a run's checkpoint."""

    run: RunConfig
    model: Model
    state: dict[str, Any]  # state.json: step, tokens, seconds, ...


def read_config(folder: Path) -> RunConfig:
    """The settings of a run's folder; UserError if there are none or they are not sane."""
    path = folder / "config.json"
    try:
        return RunConfig.from_json(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise UserError(
            f"There is no run at {folder}; give a folder that `flashlm-numba train` made."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or start a new run.") from None


def load_model(folder: Path, checkpoint_name: str | None = None, *, ema: bool = False) -> Loaded:
    """The model of a run's newest checkpoint, or the one named; with ema its running average of the weights.

    Raises UserError if the checkpoint is damaged, or no average was kept.
    """
    run = read_config(folder)
    path = checkpoint.find(folder, checkpoint_name)
    state = checkpoint.load_state(path)
    tensors = checkpoint.read_safetensors(path / "model.safetensors")
    if ema:
        if "ema.safetensors" not in state["files"]:
            raise UserError(f"{folder} keeps no running average of its weights; leave out --ema.")
        tensors |= checkpoint.read_safetensors(path / "ema.safetensors")
    return Loaded(run, model_from(run, tensors), state)


def describe_run(folder: Path, checkpoint_name: str | None = None) -> dict[str, Any]:
    """What `info` shows: parameters by group, sizes, the tree's shape, how far the run was trained."""
    loaded = load_model(folder, checkpoint_name)
    run, parameters = loaded.run, loaded.model.parameters
    groups: dict[str, int] = {}
    for name, value in parameters.items():
        group = name.split(".")[0]
        group = "norms" if group in ("norm1", "norm2", "final_norm") else group
        groups[group] = groups.get(group, 0) + value.size
    ternary = sum(
        parameters[name].size
        for name in ("mixer.out.weight", "glu.gate.weight", "glu.up.weight", "glu.down.weight")
    )
    path = checkpoint.find(folder, checkpoint_name)
    return {
        "run": str(folder),
        "recipe": run.recipe,
        "head": run.head.name,
        "parameters": sum(value.size for value in parameters.values()),
        "parameters_by_group": groups,
        "ternary_parameters": ternary,
        "bytes": {
            "float32": 4 * sum(value.size for value in parameters.values()),
            "ternary_packed": -(-ternary // 4),  # 2 bits a weight
            "checkpoint": sum(file.stat().st_size for file in path.iterdir()),
        },
        "tree": _describe_tree(loaded),
        "receptive_field": run.model.receptive_field,
        "checkpoint": path.name,
        "trained": {
            "steps": loaded.state["step"],
            "planned_steps": run.plan.steps,
            "tokens": loaded.state["tokens"],
            "seconds": round(loaded.state["seconds"], 1),
        },
        "data": run.data,
    }


def check(run: RunConfig, data: TokenData) -> None:
    """Raise UserError unless the model and the data fit together."""
    vocabulary = data.manifest.vocab_size
    if run.model.vocab_size < vocabulary:
        raise UserError(
            f"The tokens in {data.folder} have a vocabulary of {vocabulary:,}, but model.vocab_size is "
            f"{run.model.vocab_size:,}; leave that setting out."
        )


def training_data(source: str | None, note: Note) -> Path:
    """The prepared folder to train on: the one named, or the built-in text's in the user's cache.

    Preparing runs in a process of its own, so that training does not keep the memory it took.
    """
    if source is not None:
        folder = Path(source)
        if not folder.exists():
            raise UserError(
                f"There is no folder {source}; make one with `flashlm-numba prepare SOURCE --out DIR`."
            )
        if not folder.is_dir():
            raise UserError(
                f"{source} is not a prepared folder; first run `flashlm-numba prepare {source} --out DIR`, "
                "then train on DIR."
            )
        return folder
    from platformdirs import user_cache_path

    from flashlm_numba.data import MANIFEST, default_corpus

    cache = user_cache_path("flashlm-numba", appauthor=False)
    if not any(cache.glob(f"corpus-*/{MANIFEST}")):
        note("Preparing the built-in text, this first time ...")
        run_apart(["-m", "flashlm_numba", "prepare"])
    return default_corpus()


def run_apart(arguments: list[str]) -> None:
    """Run this Python with arguments in a process of its own; UserError if it fails, having said why."""
    sys.stderr.flush()
    result = subprocess.run([sys.executable, *arguments], check=False)
    if result.returncode:
        raise UserError(f"That did not work: `{' '.join(arguments)}` ended with status {result.returncode}.")


def new_model(run: RunConfig, data: TokenData, note: Note) -> Model:
    """A model before its first step, a pure function of the settings and the data."""
    from flashlm_numba.model import Model, initial_parameters

    counts = data.train.counts(run.model.vocab_size) + 1  # every token can occur
    buffers: dict[str, np.ndarray] = {}
    if run.head.log_prior:
        buffers["log_prior"] = np.log(counts / counts.sum()).astype(np.float32)
    rows = _embedding_start(run, data, note)
    parameters = initial_parameters(run.model, run.seed, rows)
    return Model(run.model, parameters, _head_maker(run.head, buffers))


def model_from(run: RunConfig, tensors: dict[str, np.ndarray]) -> Model:
    """A model from the tensors of model.safetensors; UserError if they are not of these settings."""
    from flashlm_numba.model import Model

    try:
        return Model(run.model, tensors, _head_maker(run.head, tensors))
    except (ValueError, KeyError) as error:
        raise UserError(
            f"The checkpoint does not fit the run's config.json ({error}); restore the file."
        ) from None


def tensors_of(model: Model) -> dict[str, np.ndarray]:
    """What model.safetensors holds: the parameters, and what of the head is fixed but comes from the data."""
    tensors = dict(model.parameters)
    log_prior = getattr(model.head, "log_prior", None)
    if log_prior is not None:
        tensors["log_prior"] = log_prior
    return tensors


def _head_maker(head: HeadConfig, tensors: dict[str, np.ndarray]) -> Callable[[np.ndarray, np.ndarray], Any]:
    """The function that builds the head on the live embedding and its gradient."""
    from flashlm_numba.heads import DenseHead

    options: dict[str, Any] = {
        "label_smoothing": head.label_smoothing,
        "z_loss": head.z_loss,
        "soft_cap": head.soft_cap,
        "log_prior": tensors.get("log_prior"),
    }
    return lambda weight, dweight: DenseHead(weight, dweight, **options)


def _describe_tree(loaded: Loaded) -> dict[str, Any] | None:
    return None


def _embedding_start(run: RunConfig, data: TokenData, note: Note) -> np.ndarray | None:
    """Rows (V, C) float32 by token id to start the embedding from, or None for random ones."""
    return None
