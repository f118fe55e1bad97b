"""A model from a run's settings: new, or out of a checkpoint or an exported file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashlm_numba.data.manifest import MANIFEST, Manifest
from flashlm_numba.data.shards import TokenData
from flashlm_numba.data.tokenizer import VOCABULARIES, Vocabulary, vocabulary_named
from flashlm_numba.heads import Head, head_class
from flashlm_numba.model import checkpoint, packed
from flashlm_numba.model.config import RunConfig
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters
from flashlm_numba.model.settings import run_from_json
from flashlm_numba.system.compiled import ensure_compiled
from flashlm_numba.system.display import Note, say
from flashlm_numba.system.errors import UserError

_HEAD = "head."  # how the names of a head's own parameters begin in a model's


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
        return run_from_json(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise UserError(f"There is no run at {folder}; give a folder that `flashlm-numba train` made.") from None
    except NotADirectoryError:
        raise UserError(f"{folder} is a file, not a run; give a folder that `flashlm-numba train` made.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or start a new run.") from None


def load_model(folder: Path, checkpoint_name: str | None = None, *, ema: bool = False, note: Note = say) -> Loaded:
    """The model of a run's newest checkpoint, or the one named; with ema the EMA of its weights.

    folder : of a run, or a file that export_run wrote, which holds one model.  note : told when the kernels have to be
        compiled first, which takes a minute or two
    Raises UserError if the checkpoint or the file is damaged, or no average was kept.
    """
    if folder.is_file():
        return _load_exported(folder, checkpoint_name, ema, note)
    run = read_config(folder)
    path = checkpoint.find(folder, checkpoint_name)
    state = checkpoint.check_state(checkpoint.load_state(path), path, run.model_hash)
    tensors = checkpoint.load(path, "model")
    if ema:
        if "ema.safetensors" not in state["files"]:
            raise UserError(f"{folder} keeps no EMA of its weights; leave out --ema.")
        tensors |= checkpoint.load(path, "ema")
    ensure_compiled(note)
    return Loaded(run, model_from(run, tensors), state)


def _load_exported(path: Path, checkpoint_name: str | None, ema: bool, note: Note) -> Loaded:
    if checkpoint_name is not None or ema:
        raise UserError(f"{path} holds one model; leave out --checkpoint and --ema, or give the folder of a run.")
    config, tensors, state = packed.read(path)
    run = run_from_json(config, path)
    ensure_compiled(note)
    try:
        return Loaded(run, model_from(run, tensors), checkpoint.check_state(state, path))
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from None


def vocabulary_of(run: RunConfig) -> Vocabulary:
    """The vocabulary that a run's model reads and writes: its training text's, by the manifest where that is there.

    Without the text, as with an exported model, it is the first of VOCABULARIES that has as many tokens as the model:
    the settings do not name it. Raises UserError if there is none.
    """
    if run.data:
        with contextlib.suppress(UserError):
            manifest = Manifest.read(Path(run.data) / MANIFEST)
            if manifest.hash == run.data_hash:
                return manifest.vocabulary
    for name in VOCABULARIES:
        vocabulary = vocabulary_named(name)
        if vocabulary.size == run.model.vocab_size:
            return vocabulary
    raise UserError(
        f"No vocabulary here has the model's {run.model.vocab_size:,} tokens, and the training text, which names it, "
        "is gone; put the text back where it was."
    )


def new_model(
    run: RunConfig, data: TokenData, note: Note, meanwhile: Callable[[], None] = lambda: None
) -> tuple[Model, float]:
    """A model before its first step, a pure function of the settings and the data, and the seconds it took.

    meanwhile : called while another process makes the start of the embedding, where that has to be made, and not
        counted in the seconds; a start out of the cache counts with the seconds that it once took, so that a run's
        clock does not depend on what ran before it
    """
    counts = data.train.counts(run.model.vocab_size)
    with ThreadPoolExecutor(1) as waiting:
        start = waiting.submit(_embedding_start, run, data, note)
        meanwhile()
        rows, seconds = start.result()  # rows by token id
    began = time.perf_counter()
    head = head_class(run.head.name)
    constants = head.constants_from_data(run.head, counts, rows)
    order = head.token_of_row(constants)
    if rows is not None and order is not None:
        rows = rows[order]
    parameters = initial_parameters(run.model, run.seed, rows)
    model = Model(run.model, parameters, _head_maker(run, constants, counts))
    return model, seconds + time.perf_counter() - began


def model_from(run: RunConfig, tensors: dict[str, np.ndarray], counts: np.ndarray | None = None) -> Model:
    """A model from the tensors of model.safetensors; UserError if they are not of these settings.

    counts (V,): of the training text, needed to train on; without them the sampled head is a dense one.
    """
    try:
        return Model(run.model, tensors, _head_maker(run, tensors, counts))
    except (ValueError, KeyError, OverflowError) as error:
        raise UserError(f"The weights do not fit the settings beside them ({error}); restore the file.") from None


def tensors_of(model: Model) -> dict[str, np.ndarray]:
    """What model.safetensors holds: the parameters, and what of the head is fixed but comes from the data."""
    return model.parameters | model.head.constants()


def _head_maker(
    run: RunConfig, tensors: dict[str, np.ndarray], counts: np.ndarray | None
) -> Callable[[np.ndarray, np.ndarray], Head]:
    """The function that builds the head on the live embedding and its gradient, both in the head's row order.

    tensors : of a saved model, or the constants of a new one.  counts (V,) of the training text, None where the model
        will not be trained on
    """
    own = {name.removeprefix(_HEAD): value for name, value in tensors.items() if name.startswith(_HEAD)}

    def make(weight: np.ndarray, dweight: np.ndarray) -> Head:
        head = head_class(run.head.name)
        return head.from_settings(run.head, weight, dweight, constants=tensors, parameters=own, counts=counts)

    return make


def _embedding_start(run: RunConfig, data: TokenData, note: Note) -> tuple[np.ndarray | None, float]:
    """Rows (V, C) float32 by token id to start the embedding from, or None for random ones; the seconds it took."""
    start, config = run.training.embedding_init, run.model
    if start == "random":
        return None, 0.0
    if start == "corpus":
        from flashlm_numba.model import embedding_init

        return embedding_init.cached_start(data, config.dim, threads=run.threads, report=note)
    from flashlm_numba.model import pretrained

    began = time.perf_counter()
    rows, kept = pretrained.from_gpt2(start, config.dim, config.vocab_size)
    note(f"The embedding starts from {start}, cut to {config.dim} dimensions: {kept:.1%} of its variance.")
    return rows, time.perf_counter() - began
