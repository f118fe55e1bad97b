"""Build a model from a run's settings: a new one, or one from a checkpoint or an exported file."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashlm_numba.data.shards import TokenData
from flashlm_numba.data.tokenizer import Vocabulary
from flashlm_numba.data.vocabularies import read_vocabulary, vocabulary_of
from flashlm_numba.heads import Head, head_class
from flashlm_numba.heads.sampling import KINDS
from flashlm_numba.memory.files import NGRAMS, from_tensors, map_ngrams
from flashlm_numba.memory.ngrams import GatedMemory
from flashlm_numba.model import checkpoint, data_place, packed
from flashlm_numba.model.config import ACTIVATIONS, RunConfig
from flashlm_numba.model.hub_folder import exported_file, is_hub_folder
from flashlm_numba.model.model import Model
from flashlm_numba.model.parameters import initial_parameters
from flashlm_numba.model.settings import run_from_json
from flashlm_numba.system.compiled import ensure_compiled
from flashlm_numba.system.display import TERMINAL, Note, Progress
from flashlm_numba.system.errors import UserError

if TYPE_CHECKING:
    from flashlm_numba.kernels.ngrams import NgramModel

_HEAD, _MEMORY = "head.", "memory."  # prefixes of the head's and the gate's parameters in the model's names

# parts of the kernels (training/kernel_tasks.py) that a use of a model calls
_PARTS = {
    "read": ("{activations}",),
    "score": ("{activations}", "{linear}forward", "{copies}", "{head}"),
    "generate": ("{activations}", "{linear}forward", "{linear}decoding", "{copies}"),
    "train": (
        *("{activations}", "{linear}forward", "{head}", "{linear}backward", "{activations}-backward"),
        *("embedding", "{copies}", "optimizer"),
        *("{linear}decoding", "{head}-whole"),  # the samples
    ),
    "coding": ("{head}-plain", "{head}-whole"),  # token by token, with "generate"
    "memory": ("ngrams",),  # beside the model
    "mixed": ("{head}", "{head}-whole"),  # with it, among the likeliest tokens
    "float": ("{float}",),
    "int8": ("{int8}",),
    "packed": ("bitlinear-packed",),  # generation by a PackedModel, with KINDS of sampling
    **{kind: (f"{{head}}-{kind}",) for kind in KINDS},
    "plain": ("{head}-plain", "{writing}-plain"),
    "likeliest": ("{head}-likeliest", "{writing}-likeliest"),
}
ANY_USE = ("score", "generate", "float", "int8", *KINDS)  # of a model that is not trained further


@dataclass(frozen=True)
class Loaded:
    """A model loaded from a checkpoint or an exported file."""

    run: RunConfig
    model: Model
    state: dict[str, Any]  # state.json: step, tokens, seconds, ...
    vocabulary: Vocabulary


@dataclass(frozen=True)
class Trained:
    """Trained weights, as read."""

    path: Path  # of the checkpoint or of the exported file
    run: RunConfig
    tensors: dict[str, np.ndarray]
    state: dict[str, Any]  # as in Loaded
    vocabulary: Vocabulary


def kernel_parts(run: RunConfig, uses: Collection[str]) -> list[str]:
    """The parts of the kernels for these uses of a run's model.

    uses : some of "read", "score", "train", and "generate" or "packed" with KINDS of sampling; "whole" also for the
        probabilities of all tokens; "coding" with "generate" for compression; "memory" for n-grams; "float" or "int8"
        for other activations than those of the training
    """
    names = {"head": run.head.name, "activations": run.model.activations, "linear": ""}
    names |= {kind: kind for kind in ACTIVATIONS}
    if run.model.linear == "bitlinear":  # the arithmetic is the same with both activations
        names |= dict.fromkeys(("activations", *ACTIVATIONS), "bitlinear") | {"linear": "bitlinear-"}
    names["writing"] = f"{names['linear']}tree" if run.head.name == "tree" else run.head.name
    if run.memory.memory == "ngrams":
        uses = [*uses, "memory", *["mixed"] * ("likeliest" in uses)]
    names["copies"] = "copies" if run.model.copy_shares else names["activations"]  # else nothing more
    return list(dict.fromkeys(part.format(**names) for use in uses for part in _PARTS[use]))


def read_config(folder: Path) -> RunConfig:
    """The settings in a run's folder, with the folder where its tokens are now; see data_place.py.

    Raises UserError if they are missing or invalid.
    """
    path = folder / "config.json"
    if is_hub_folder(folder):
        raise UserError(f"{folder} holds an exported model, which cannot be resumed; start from it with --init.")
    try:
        return data_place.located(run_from_json(path.read_text(encoding="utf-8"), path), folder)
    except FileNotFoundError:
        raise UserError(f"There is no run at {folder}; give a folder written by `flashlm-numba train`.") from None
    except NotADirectoryError:
        raise UserError(f"{folder} is a file, not a run; give a folder written by `flashlm-numba train`.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it, or start a new run.") from None


def load_model(
    folder: Path,
    checkpoint_name: str | None = None,
    *,
    ema: bool = False,
    uses: Collection[str] = ANY_USE,
    progress: Progress = TERMINAL,
) -> Loaded:
    """Load the model of a run's best or named checkpoint, as checkpoint.find_best. With ema=True, use its EMA.

    folder : folder of a run; or file or folder written by `export`, or hf:USER/NAME
    uses : what the model is for, as in kernel_parts; the kernels for it are compiled if they are not already
    progress : receives a note and a bar if kernels must be compiled
    Raises UserError if the checkpoint or the file is damaged, or if ema is True and the run has no EMA.
    """
    folder = exported_file(folder, progress)
    trained = read_trained(folder, checkpoint_name, ema=ema, progress=progress)
    ensure_compiled(kernel_parts(trained.run, uses), progress)
    try:
        return Loaded(trained.run, model_from(trained.run, trained.tensors), trained.state, trained.vocabulary)
    except UserError as error:
        if not folder.is_file():
            raise
        raise UserError(f"{folder} cannot be used: {error}") from None


def read_trained(
    path: Path, checkpoint_name: str | None = None, *, ema: bool = False, progress: Progress = TERMINAL
) -> Trained:
    """Read the best or named checkpoint of a run, or an exported file, without building the model.

    path : folder of a run or of one of its checkpoints; or file or folder written by `export`, or hf:USER/NAME
    Raises UserError as load_model does.
    """
    path = exported_file(path, progress)
    if path.is_file():
        if checkpoint_name is not None or ema:
            raise UserError(f"{path} holds one model; leave out --checkpoint and --ema, or give the folder of a run.")
        packed.note_size(path, progress)
        config, tensors, state, tokenizer = packed.read(path)
        run = run_from_json(config, path)
        vocabulary = checked_vocabulary(vocabulary_of(tokenizer, run.tokenizer_hash, path), run, path)
        return Trained(path, run, tensors, checkpoint.check_state(state, path), vocabulary)
    if checkpoint_name is None and path.absolute().parent.name == "checkpoints":
        path, checkpoint_name = path.absolute().parent.parent, path.name
    run = read_config(path)
    vocabulary = checked_vocabulary(read_vocabulary(path, run.tokenizer_hash), run, path)
    found = checkpoint.find_best(path, checkpoint_name)
    if checkpoint_name is None and checkpoint.later_than(path, int(found.name.removeprefix("step-"))):
        progress.note(f"Using {found.name}, the best on the validation text; --checkpoint selects a later one.")
    state = checkpoint.check_state(checkpoint.load_state(found), found, run.model_hash)
    tensors = checkpoint.load(found, "model") | memory_of(run, path, progress)
    if ema:
        if "ema.safetensors" not in state["files"]:
            raise UserError(f"{path} has no EMA of its weights; leave out --ema.")
        tensors |= checkpoint.load(found, "ema")
    return Trained(found, run, tensors, state, vocabulary)


def checked_vocabulary(vocabulary: Vocabulary, run: RunConfig, where: Path) -> Vocabulary:
    """Return the vocabulary if it has the model's number of tokens; raise UserError otherwise."""
    if vocabulary.size == run.model.vocab_size:
        return vocabulary
    raise UserError(
        f"The vocabulary of {where} has {vocabulary.size:,} tokens, but its model {run.model.vocab_size:,}; restore it."
    )


def memory_of(run: RunConfig, folder: Path, progress: Progress) -> dict[str, np.ndarray]:
    """The tensors of a run's memory, beside those of a checkpoint. Raises UserError if they are missing or damaged."""
    if run.memory.memory == "none":
        return {}
    if (folder / NGRAMS).exists():
        packed.note_size(folder / NGRAMS, progress)
    return map_ngrams(folder, run.memory_hash)


def new_model(
    run: RunConfig,
    data: TokenData,
    note: Note,
    meanwhile: Callable[[], None] = lambda: None,
    ngrams: NgramModel | None = None,
) -> tuple[Model, float]:
    """A model before its first step, which depends only on settings and data, and the seconds that building it took.

    ngrams : of the training text, for a memory
    meanwhile : called while another process computes the initial embedding; its time is not counted
    An initial embedding from the cache counts with the seconds that computing it took. A run's clock therefore does
    not depend on earlier runs.
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
    memory = None if ngrams is None else GatedMemory(ngrams, run.model.dim)
    model = Model(run.model, parameters, _head_maker(run, constants, counts), memory)
    return model, seconds + time.perf_counter() - began


def model_from(run: RunConfig, tensors: dict[str, np.ndarray], counts: np.ndarray | None = None) -> Model:
    """A model from the tensors of model.safetensors. Raises UserError if they do not fit the settings.

    counts : (V,) token counts of the training text, needed for training; without them a sampled head becomes dense
    """
    try:
        return Model(run.model, tensors, _head_maker(run, tensors, counts), _memory_from(run, tensors))
    except (ValueError, KeyError, OverflowError) as error:
        raise UserError(f"The weights do not fit the stored settings ({error}); restore the file.") from None


def _memory_from(run: RunConfig, tensors: dict[str, np.ndarray]) -> GatedMemory | None:
    """The memory among a model's tensors, with its trained gate."""
    if run.memory.memory == "none":
        return None
    ngrams = from_tensors(tensors)
    if ngrams is None or ngrams.vocab_size != run.model.vocab_size:
        raise ValueError("there are no n-grams of its vocabulary")
    gate = {name.removeprefix(_MEMORY): value for name, value in tensors.items() if name.startswith(_MEMORY)}
    return GatedMemory(ngrams, run.model.dim, gate)


def tensors_of(model: Model) -> dict[str, np.ndarray]:
    """The tensors of model.safetensors: the parameters, and the head's constants, which depend on the data.

    Those of the n-grams, which never change, are in a file of their own; see memory_of.
    """
    return model.parameters | model.head.constants()


def _head_maker(
    run: RunConfig, tensors: dict[str, np.ndarray], counts: np.ndarray | None
) -> Callable[[np.ndarray, np.ndarray], Head]:
    """A function that builds the head on the live embedding and its gradient, both in the head's row order.

    tensors : tensors of a saved model, or the constants of a new head
    counts : (V,) token counts of the training text; None if the model will not be trained
    """
    own = {name.removeprefix(_HEAD): value for name, value in tensors.items() if name.startswith(_HEAD)}

    def make(weight: np.ndarray, dweight: np.ndarray) -> Head:
        head = head_class(run.head.name)
        return head.from_settings(run.head, weight, dweight, constants=tensors, parameters=own, counts=counts)

    return make


def _embedding_start(run: RunConfig, data: TokenData, note: Note) -> tuple[np.ndarray | None, float]:
    """The initial embedding (V, E) float32 by token id, or None for a random one; and the seconds that it took."""
    start, config = run.training.embedding_init, run.model
    width = config.embedding_dim or config.dim
    if start == "random":
        return None, 0.0
    if start == "corpus":
        from flashlm_numba.model import embedding_init

        return embedding_init.cached_start(data, width, threads=run.threads, report=note)
    from flashlm_numba.model import pretrained

    began = time.perf_counter()
    rows, kept = pretrained.from_gpt2(start, width, config.vocab_size)
    note(f"The initial embedding is {start}, reduced to {width} dimensions with {kept:.1%} of its variance.")
    return rows, time.perf_counter() - began
