"""The counted n-grams of a run, in RUN/ngrams.safetensors, and of an exported file, among its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flashlm_numba.kernels.ngrams import NgramModel, NgramTables
from flashlm_numba.system.arrays import for_reading
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import replace, sync_folder
from flashlm_numba.system.tensors import map_tensors, write_tensors

NGRAMS = "ngrams.safetensors"
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
    return NgramModel(len(tables.discounts) + 1, end_of_text, tables)


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
