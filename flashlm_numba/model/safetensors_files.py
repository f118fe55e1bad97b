"""The tensors of a folder of safetensors files, described before any is read, and read one at a time.

A folder holds model.safetensors, or shards and model.safetensors.index.json, which says in which file a tensor is. The
format is a little-endian uint64 length, a JSON header, and the data (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import parse_json

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_HEADER = 100_000_000  # bytes, as in the safetensors library
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    path: Path
    dtype: str  # a name in _BYTES
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file

    def read(self) -> np.ndarray:
        """The tensor as float32; bfloat16 and float16 are widened. Raises UserError if the file has become shorter."""
        count, kind = math.prod(self.shape), {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[self.dtype]
        try:
            raw = np.fromfile(self.path, kind, count, offset=self.offset)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}.") from None
        if raw.size != count:
            raise UserError(f"{self.path} became shorter while it was read; copy it again.")
        if self.dtype == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32, copy=False).reshape(self.shape)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder, by name; only headers are read. Raises UserError if a file is missing or damaged."""
    if (folder / ONE).exists():
        return _header(folder / ONE)
    index = folder / INDEX
    if not index.exists():
        raise UserError(f"{folder} has neither {ONE} nor {INDEX}; give the folder of a model in safetensors files.")
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} does not say in which files the tensors are (weight_map); restore it.")
    for name in sorted(set(places.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"{index} names the file {name!r}, which is not in its folder; restore it.")
        try:
            is_there = (folder / name).is_file()
        except OSError:  # a name that is too long
            is_there = False
        if not is_there:
            raise UserError(f"{index} names the file {name}, which is missing in {folder}; restore it.")
    headers = {name: _header(folder / name) for name in sorted(set(places.values()))}
    found = {}
    for name, file in places.items():
        if name not in headers[file]:
            raise UserError(f"{index} says that {name} is in {file}, but it is not there; restore the files.")
        found[name] = headers[file][name]
    return found


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises UserError if it cannot be read."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it.") from None


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises UserError unless the header is valid and the file holds all its bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= _MOST_HEADER:
                raise UserError(f"{path} is not a safetensors file; restore it.")
            if 8 + length > size:
                raise UserError(f"{path} is truncated: it ends within its header; copy it again.")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        header = parse_json(text)
        header.pop("__metadata__", None)
        entries = [(name, entry["dtype"], entry["shape"], *entry["data_offsets"]) for name, entry in header.items()]
        if not all(type(n) is int and n >= 0 for _, _, shape, low, high in entries for n in (*shape, low, high)):
            raise ValueError
        if not all(isinstance(dtype, str) for _, dtype, *_ in entries):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a safetensors file: its header cannot be read; restore it.") from None
    found = {}
    for name, dtype, shape, low, high in entries:
        if dtype not in _BYTES:
            raise UserError(
                f"{path} holds {name} as {dtype}, which cannot be imported; convert it to {', '.join(_BYTES)}."
            )
        if high - low != math.prod(shape) * _BYTES[dtype]:
            raise UserError(
                f"{path} gives {name} {high - low:,} bytes, which do not fit its shape {shape}; restore it."
            )
        if 8 + length + high > size:
            have = size - 8 - length
            raise UserError(f"{path} is truncated: {name} ends at byte {high:,} of {have:,}; copy it again.")
        found[name] = Stored(path, dtype, tuple(shape), 8 + length + low)
    return found
