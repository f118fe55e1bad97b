"""The counted n-grams of a run, in RUN/ngrams.safetensors, and of an exported file, among its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flashlm_numba.kernels.ngrams import NgramModel, NgramTables
from flashlm_numba.system.arrays import for_reading
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import replace, sync_folder
from flashlm_numba.system.tensors import map_tensors, write_tensors

NGRAMS = "ngrams.safetensors"
LONGEST = 16  # tokens of an n-gram
PREFIX = "memory.ngrams."  # of the tables' names among a model's tensors


def to_tensors(model: NgramModel) -> dict[str, np.ndarray]:
    """The tables by name."""
    found = {PREFIX + name: table for name, table in model.tables._asdict().items()}
    return found | {PREFIX + "end_of_text": np.array([model.end_of_text])}


def from_tensors(tensors: Mapping[str, np.ndarray]) -> NgramModel | None:
    """The n-grams among a model's tensors, or None if there are none. Raises ValueError if they do not fit together."""
    if PREFIX + "unigram" not in tensors:
        return None
    try:
        tables = NgramTables(*(for_reading(tensors[PREFIX + name]) for name in NgramTables._fields))
        end_of_text = int(tensors[PREFIX + "end_of_text"].item())
    except KeyError as error:
        raise ValueError(f"its n-grams lack {error}") from None
    _check(tables)
    if not 0 <= end_of_text < len(tables.unigram):
        raise ValueError(f"the end of text {end_of_text} is no token of its n-grams")
    return NgramModel(len(tables.discounts) + 1, end_of_text, tables)


def _check(tables: NgramTables) -> None:
    """Raise ValueError unless a look-up stays within the tables, whoever wrote them: kernels do not check."""
    grams, contexts, vocab = len(tables.tokens), len(tables.gamma), len(tables.unigram)
    kinds = {name: (getattr(tables, name).dtype.name, getattr(tables, name).shape) for name in NgramTables._fields}
    tokens = "uint16" if vocab <= 2**16 else "uint32"
    wanted = {
        "unigram": ("float32", (vocab,)),
        "tokens": (tokens, (grams,)),
        "counts": ("uint8", (grams,)),
        "alpha": ("float32", (grams,)),
        "gamma": ("float32", (contexts,)),
        "starts": ("int64", (contexts + 1,)),
        "discounts": ("float64", (len(tables.discounts), 4)),
    }
    if kinds != wanted or not 1 <= len(tables.discounts) < LONGEST or not vocab:
        raise ValueError("the tables of its n-grams do not fit together")
    starts, end = tables.starts, vocab
    if starts[0] != 0 or starts[-1] != grams or not _all(starts, lambda part: (part[1:] >= part[:-1]).all(), overlap=1):
        raise ValueError("the contexts of its n-grams are not in order")
    for _ in range(len(tables.discounts) - 1):  # the n-grams of each length are contexts, but for the longest
        end = vocab + int(starts[min(end, contexts)])
    if end != contexts or not _all(tables.tokens, lambda part: (part < vocab).all()):
        raise ValueError("its n-grams lead out of the tables")
    shares = (tables.unigram, tables.alpha, tables.gamma, tables.discounts)
    if not all(_all(values, lambda part: ((part >= 0) & (part <= 3)).all()) for values in shares):
        raise ValueError("its n-grams have no probabilities")
    if not _all(tables.gamma, lambda part: (part <= 1).all()):
        raise ValueError("its n-grams have no probabilities")


def _all(values: np.ndarray, holds: Callable[[np.ndarray], Any], overlap: int = 0) -> bool:
    """Whether something holds for all parts of an array, without a temporary array of its size."""
    step = 1 << 20
    return all(bool(holds(values[start : start + step + overlap])) for start in range(0, max(len(values), 1), step))


def write_ngrams(folder: Path, model: NgramModel) -> str:
    """Write the n-grams of a run. Returns the file's SHA-256 (hex)."""
    temporary = folder / f".{NGRAMS}.tmp"
    try:
        digest = write_tensors(temporary, to_tensors(model))
        replace(temporary, folder / NGRAMS)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)
    return digest


def map_ngrams(folder: Path, digest: str) -> dict[str, np.ndarray]:
    """The tensors of a run's n-grams, mapped. Raises UserError if they are missing, or not those with this SHA-256."""
    path = folder / NGRAMS
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found == digest:
            return map_tensors(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); restore it.") from None
    raise UserError(f"{path} is damaged: it does not match the SHA-256 in config.json; restore it.")
