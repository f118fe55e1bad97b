"""Export of a run's model to one file, which the commands read like a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flashlm_numba.kernels.bitlinear import absmean_ternary
from flashlm_numba.kernels.ternary import ternarize
from flashlm_numba.memory.config import MemoryConfig
from flashlm_numba.memory.files import to_tensors
from flashlm_numba.model import packed
from flashlm_numba.model.build import load_model, tensors_of
from flashlm_numba.model.hub import repository_of
from flashlm_numba.model.hub_folder import is_exported
from flashlm_numba.model.parameters import ternary_names
from flashlm_numba.system.display import TERMINAL, Progress
from flashlm_numba.system.errors import UserError


def export_run(
    folder: Path,
    out: Path,
    checkpoint_name: str | None = None,
    *,
    ema: bool = False,
    rows: str = "int8",
    memory: bool = True,
    progress: Progress = TERMINAL,
) -> Path:
    """Write a run's model to one file with packed ternary weights. eval, generate and info read it like a run.

    rows : arithmetic of the embedding's rows: "int8" or "int4", with rounding; or "float", exactly those of the run
    memory : whether the file holds the run's memory too, if it has one; without it, the model is its head alone
    The file contains no path of this machine; it identifies the training text by hash only. Returns out.
    Raises UserError if the run cannot be read, or if out exists or cannot be written.
    """
    if is_exported(folder):
        raise UserError(f"{folder} is already exported; give the folder of a run.")
    packed.check_new(out)
    loaded = load_model(folder, checkpoint_name, ema=ema, uses=["read"], progress=progress)
    tensors = tensors_of(loaded.model)
    if loaded.model.memory is not None and memory:
        tensors |= to_tensors(loaded.model.memory.model)
    elif loaded.model.memory is not None:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("memory.")}
    threshold = loaded.run.model.ternary_threshold
    ternary = ternary_names(loaded.run.model)
    scales = {}
    if loaded.run.model.linear == "bitlinear":
        for name in ternary:
            tensors[name], scales[name] = absmean_ternary(tensors[name])
    else:
        tensors |= {name: ternarize(tensors[name], threshold=threshold) for name in ternary}
    for name in loaded.model.head_ternary_names:
        tensors[name], scales[name] = absmean_ternary(tensors[name])
    ternary = [*ternary, *loaded.model.head_ternary_names]
    start = loaded.run.training.embedding_init
    if start not in ("corpus", "random") and not start.startswith("hf:"):
        start = Path(start).name  # without the path on this machine
    training = dataclasses.replace(loaded.run.training, embedding_init=start)
    run = loaded.run if memory else dataclasses.replace(loaded.run, memory=MemoryConfig())
    run = dataclasses.replace(run, data="", data_absolute="", memory_hash="", training=training)
    if repository_of(run.init) is None:
        run = dataclasses.replace(run, init=Path(run.init).name)
    state = {name: loaded.state[name] for name in ("step", "tokens", "seconds")} | {"ema": ema}
    packed.write(out, tensors, ternary, run.to_json(), state, loaded.vocabulary.to_json(), rows, scales)
    return out
