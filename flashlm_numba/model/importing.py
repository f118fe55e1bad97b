"""Import of a published MatMul-free LM: a folder of safetensors becomes one packed file, which the commands read."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from flashlm_numba.data.imported import ImportedVocabulary, imported_text, read_tokenizer
from flashlm_numba.data.tokenizer import TOKENIZER
from flashlm_numba.heads.config import HeadConfig
from flashlm_numba.kernels.bitlinear import absmean_ternary
from flashlm_numba.model import packed
from flashlm_numba.model.config import ModelConfig, RunConfig
from flashlm_numba.model.parameters import ternary_names
from flashlm_numba.model.published import Published, located, read_published
from flashlm_numba.model.safetensors_files import Stored, stored_tensors
from flashlm_numba.system.compiled import ensure_compiled
from flashlm_numba.system.display import TERMINAL, Progress
from flashlm_numba.system.errors import UserError

MANY = 30_000_000  # parameters that take more than a second or two
_HEAD = "head.weight"
_NO_BOUND = -200.0  # beside 0 its softmax is 0 in float32, so every bound is


def import_folder(folder: Path, out: Path, *, rows: str = "float", progress: Progress = TERMINAL) -> Path:
    """Write the model in a folder to one file with packed ternary weights. eval, generate and info read it.

    rows : arithmetic of the embedding's rows, as in export_run; "float" keeps the published numbers
    The tokenizer is taken as it is; a note says what it loses. Without one the file computes by token ids only.
    Returns out. Raises UserError if a file is missing, damaged or describes another model, or if out exists or cannot
    be written. Everything that can be refused is, before a tensor is read.
    """
    model = read_published(folder)
    places = located(folder, model, stored_tensors(folder))
    packed.check_new(out)
    vocabulary = _vocabulary(folder, model, progress)
    run = RunConfig(
        recipe="mmf",
        tokenizer_hash=vocabulary.hash,
        model=_settings(folder, model),
        head=HeadConfig(name="bitlinear"),
    )
    ensure_compiled(["bitlinear"], progress)
    size = sum(math.prod(place.shape) for place in places.values())
    if size > MANY:
        progress.note(f"Packing {size:,} parameters ...")
    tensors, scales = _pack(run.model, places)
    if not model.has_bounds:
        tensors["lower_bounds"] = np.full((model.n_blocks, model.dim), _NO_BOUND, np.float32)
        tensors["lower_bounds"][0] = 0
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "ema": False}
    packed.write(out, tensors, list(scales), run.to_json(), state, vocabulary.to_json(), rows, scales)
    return out


def _settings(folder: Path, model: Published) -> ModelConfig:
    """The settings of this program."""
    try:
        return ModelConfig(
            vocab_size=model.vocab_size,
            dim=model.dim,
            ffn_dim=model.ffn_dim,
            mixer="mlgru",
            linear="bitlinear",
            n_blocks=model.n_blocks,
            n_passes=1,
            norm_eps=model.norm_eps,
        )
    except ValueError as error:
        raise UserError(f"The model in {folder} cannot be imported: {error}.") from None


def _vocabulary(folder: Path, model: Published, progress: Progress) -> ImportedVocabulary:
    """The folder's vocabulary, with a note on what it lacks."""
    path, tokenizer = folder / TOKENIZER, None
    if path.exists():
        tokenizer = read_tokenizer(path, model.vocab_size)
    else:
        progress.note(f"{folder} has no {TOKENIZER}, so the imported model takes token ids and no text.")
    vocabulary = ImportedVocabulary(imported_text(tokenizer, model.vocab_size, model.start, model.end))
    if (lost := vocabulary.lost()) is not None:
        progress.note(f"The tokenizer does not keep every text: {lost[0]!r} comes back as {lost[1]!r}.")
    return vocabulary


def _pack(config: ModelConfig, places: dict[str, Stored]) -> tuple[dict[str, np.ndarray], dict[str, np.float32]]:
    """All tensors, the ternary ones as -1, 0 and +1 in int8; and the scales of these. One tensor at a time is read.

    Raises UserError if one contains a number that is not finite.
    """
    ternary, tensors, scales = {*ternary_names(config), _HEAD}, {}, {}
    for name, place in places.items():
        value = place.read()
        if not np.isfinite(value).all():
            raise UserError(f"{place.path} holds values that are not finite (for {name}); copy it again.")
        if name in ternary:
            values, scales[name] = absmean_ternary(value)
            value = values.astype(np.int8)
        tensors[name] = value
    return tensors, scales
