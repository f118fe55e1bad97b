"""Files in the safetensors format: written from memory with a SHA-256, read into memory, and mapped.

The format is a little-endian uint64 length, a JSON header padded with spaces to 8 bytes, and the data
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flashlm_numba.system.files import parse_json, sync_file

# names of NumPy's dtypes in the safetensors format
_DTYPES = {
    "float64": "F64",
    "int64": "I64",
    "float16": "F16",
    "int8": "I8",
    "float32": "F32",
    "int32": "I32",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_NUMPY = {name: np.dtype(kind) for kind, name in _DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file and sync it to disk. Returns its SHA-256 (hex). The same content gives the same bytes.

    The safetensors package copies every tensor to bytes before it writes. This function writes the arrays directly
    from memory and hashes them on the way, which saves 100 MB with the optimiser state of 13.6M parameters. Wide dtypes
    come first, so that all data are aligned.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        array = arrays[name]
        end = offset + array.nbytes
        dtype = _DTYPES[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    parts: list[Any] = [len(text).to_bytes(8, "little"), text]
    with path.open("wb") as file:
        for part in (*parts, *(_bytes(arrays[name]) for name in order)):
            file.write(part)
            digest.update(part)
        sync_file(file)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, by name.

    Each array is copied into memory that NumPy allocates. NumPy requests large pages, load_file does not, and large
    pages make reading scattered rows a few percent faster.
    """
    from safetensors.numpy import load_file

    found = load_file(path)
    return {name: found.pop(name).copy() for name in list(found)}


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file from write_tensors, by name, read-only and mapped: the system reads what is used.

    The file must be known to be intact. Raises OSError, ValueError or KeyError otherwise, as far as it shows.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length))
    data = np.memmap(path, np.uint8, "r", offset=8 + length)
    found = {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        low, high = entry["data_offsets"]
        found[name] = data[low:high].view(_NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return found


def _bytes(array: np.ndarray) -> np.ndarray:
    """The array's memory as a little-endian buffer, without a copy on a little-endian machine."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8)
