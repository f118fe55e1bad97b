"""Starting a run from trained weights (`train --init`): the settings that it takes over, and its first model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flashlm_numba.heads import head_class
from flashlm_numba.memory.files import to_tensors
from flashlm_numba.memory.ngrams import GatedMemory
from flashlm_numba.model.build import model_from, read_trained
from flashlm_numba.model.config import RunConfig
from flashlm_numba.model.hub_folder import exported_file, pinned
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import model_parameters
from flashlm_numba.model.settings import with_settings
from flashlm_numba.system.display import TERMINAL, Progress
from flashlm_numba.system.errors import UserError

if TYPE_CHECKING:
    from flashlm_numba.kernels.ngrams import NgramModel

# settings of model and head that do not change what trained weights mean
FREE = {
    "model": ("activations",),
    "head": ("num_sampled", "full_softmax_ratio", "loss_fraction", "label_smoothing", "z_loss"),
}


def settings_from(recipe: RunConfig, settings: Iterable[str], path: Path, progress: Progress = TERMINAL) -> RunConfig:
    """The settings of a run that starts from the trained weights at path, with their model and head.

    path : a run, one of its checkpoints, an exported file or folder, or hf:USER/NAME
    settings : key=value texts, which change the recipe
    Raises UserError if there are no weights, or if a setting would change what they mean.
    """
    file = exported_file(path, progress)
    trained = read_trained(file, progress=progress)
    own, where = trained.run, pinned(path, trained.path)
    start = replace(recipe, model=own.model, head=own.head, tokenizer_hash=own.tokenizer_hash, init=where)
    run = with_settings(start, settings)
    changed = [
        f"{section}.{field.name}"
        for section, free in FREE.items()
        for field in dataclasses.fields(getattr(run, section))
        if field.name not in free
        and getattr(getattr(run, section), field.name) != getattr(getattr(start, section), field.name)
    ]
    if run.training.embedding_init != recipe.training.embedding_init:
        changed.append("training.embedding_init")
    if changed:
        raise UserError(f"The trained weights in {path} fix {', '.join(changed)}; leave that setting out.")
    return run


def first_model(
    run: RunConfig, counts: np.ndarray, ngrams: NgramModel | None = None, progress: Progress = TERMINAL
) -> Model:
    """The model that run.init names, to be trained further.

    counts : (V,) token counts of the training text;  ngrams : of the same text, for a memory

    A run's ternary matrices continue with their float32 weights. An exported file has only -1, 0 and +1, which become
    as large as a new matrix's weights, so that training can change them; their ternary values stay the same.
    Raises UserError if the weights cannot be read or do not fit.
    """
    trained = read_trained(Path(run.init), progress=progress)
    tensors = trained.tensors
    if trained.path.is_file():
        for name, parameter in model_parameters(run.model).items():
            if parameter.ternary and name in tensors:
                if run.model.linear == "bitlinear":
                    _untie_scale(tensors[name])
                    continue
                share = np.count_nonzero(tensors[name]) / max(1, tensors[name].size)
                tensors[name] *= np.float32(parameter.std / max(share, 1e-9) ** 0.5)
        for name in head_class(run.head.name).ternary:
            _untie_scale(tensors[f"head.{name}"])
    if ngrams is not None:
        gate = GatedMemory(ngrams, run.model.dim).gate.parameters
        tensors = {f"memory.{name}": value for name, value in gate.items()} | tensors | to_tensors(ngrams)
    return model_from(run, tensors, counts)


def _untie_scale(weight: np.ndarray) -> None:
    """Change s times ternary values to weights whose mean magnitude is s, so that they keep it when training starts.

    One of them gets another last bit. Otherwise they would still be taken for a scale times ternary values.
    """
    weight *= np.float32(weight.size / max(1, int(np.count_nonzero(weight))))
    at = np.flatnonzero(weight)[:1]
    weight.flat[at] = np.nextafter(weight.flat[at], np.float32(0))
