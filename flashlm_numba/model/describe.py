"""The description of a run or an exported model that `info` shows."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from flashlm_numba.data.shards import open_tokens
from flashlm_numba.model import checkpoint
from flashlm_numba.model.build import load_model
from flashlm_numba.model.config import RunConfig
from flashlm_numba.model.hub_folder import exported_file
from flashlm_numba.model.parameters import ternary_names
from flashlm_numba.model.sizes import device_bytes, parameters_by_part
from flashlm_numba.model.training_memory import training_bytes
from flashlm_numba.system.display import TERMINAL, Progress, peak_rss_mb
from flashlm_numba.system.errors import UserError


def describe_run(folder: Path, checkpoint_name: str | None = None, *, progress: Progress = TERMINAL) -> dict[str, Any]:
    """The description that `info` shows: parameters per group, sizes, shape of the tree, training progress."""
    name, folder = str(folder), exported_file(folder, progress)
    loaded = load_model(folder, checkpoint_name, uses=["read"], progress=progress)
    run, parameters = loaded.run, loaded.model.parameters
    shapes = {name: value.shape for name, value in parameters.items()}
    ternary = [*ternary_names(run.model), *loaded.model.head_ternary_names]
    n_ternary = sum(parameters[name].size for name in ternary)
    n_parameters = sum(value.size for value in parameters.values())
    rows = loaded.state.get("rows", "float")
    path = folder if folder.is_file() else checkpoint.find_best(folder, checkpoint_name)
    files = [path] if path.is_file() else list(path.iterdir())
    peak = peak_rss_mb()
    return {
        "run": name,
        "recipe": run.recipe,
        "head": run.head.name,
        "activations": run.model.activations,
        "rows": rows,  # arithmetic of the embedding's rows
        "vocabulary": loaded.vocabulary.name,
        "vocab_size": loaded.vocabulary.size,
        "parameters": n_parameters,
        "parameters_by_group": parameters_by_part(shapes),
        "ternary_parameters": n_ternary,
        "float_parameters": n_parameters - n_ternary,
        "bytes": {
            "float32": 4 * n_parameters,
            "ternary_packed": -(-n_ternary // 4),  # 2 bits per weight
            **device_bytes(loaded.model, loaded.vocabulary, "int8" if rows == "float" else rows),
            "training_memory": training_bytes(run),  # about, at its peak
            "exported" if path.is_file() else "checkpoint": sum(file.stat().st_size for file in files),
        },
        "peak_memory_mb": None if peak is None else round(peak),  # peak of this process, with the model loaded
        **({"tree": None} | loaded.model.head.describe(lambda: _counts(run))),  # the JSON has the key for every head
        "memory": None if loaded.model.memory is None else loaded.model.memory.describe(),
        "receptive_field": run.model.receptive_field,
        "checkpoint": path.name,
        "trained": {
            "running_average": bool(loaded.state.get("ema")),  # set in an exported EMA
            "steps": loaded.state["step"],
            "planned_steps": run.plan.steps,
            "tokens": loaded.state["tokens"],
            "seconds": round(loaded.state["seconds"], 1),
        },
        "data": run.data,
    }


def _counts(run: RunConfig) -> np.ndarray | None:
    """Count of each token in the training text (V,), or None if the text is no longer available."""
    if run.data:  # an exported model does not record the folder of its text
        with contextlib.suppress(UserError):
            data = open_tokens(Path(run.data))
            if data.hash == run.data_hash:
                return data.train.counts(run.model.vocab_size)
    return None
