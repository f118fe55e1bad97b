"""A model in one file, with five ternary weights per byte, rounded embedding rows, and the rest as in a checkpoint.

The file is a safetensors file. Its metadata contain the run's settings, its training progress, its tokenizer.json, and
a SHA-256 over all of these and the tensors. A ternary matrix (R, K) is stored as (R, ceil(K / 5)) uint8. Byte j of a
row is the sum over i < 5 of 3**i times the code of weight 5 j + i. The codes 0, 1, 2 stand for -1, 0, +1, and weights
beyond K have the code 0. This takes 1.6 bits per weight, where a ternary weight carries 1.58 bits. Packing loses
nothing, because training evaluates the ternary values too. A matrix whose ternary values have a scale (BitLinear) is
stored with it, as NAME.scale (1,) float32; reading multiplies. The tokenizer.json is compressed by zlib and written in
base64.

The metadata's "rows" names the arithmetic of the embedding's rows, which are also those of a tied head: "float",
"int8" or "int4". Rounded rows are two tensors, embedding.weight.int8 or .int4 and embedding.weight.scales; see
rounded_rows.py. Reading widens them to float32, so a model computes with exactly the numbers in its file.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flashlm_numba.model.config import ROWS
from flashlm_numba.model.parameters import EMBEDDING
from flashlm_numba.model.rounded_rows import round_rows, widen_rows
from flashlm_numba.system.display import Progress
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import parse_json, replace, sync_folder
from flashlm_numba.system.tensors import write_tensors

FORMAT = "flashlm-numba packed 3"
SUFFIX = ".base3"  # suffix of a packed matrix's name
LARGE = 150_000_000  # bytes
MOST_TEXT = 1 << 28  # bytes of a tokenizer.json
SCALE = ".scale"  # suffix of the name of a packed matrix's scale
SCALES = EMBEDDING + ".scales"
PER_BYTE = 5
_POWERS = 3 ** np.arange(PER_BYTE)
_WEIGHTS = (np.arange(3**PER_BYTE)[:, None] // _POWERS % 3 - 1).astype(np.float32)  # of each byte


def pack_base3(weight: np.ndarray) -> np.ndarray:
    """Pack a ternary weight (R, K) of -1, 0, +1 into (R, ceil(K / 5)) uint8. Raises ValueError for other elements.

    >>> pack_base3(np.array([[1, 0, -1, 1, 1, -1]])).tolist()
    [[221, 0]]
    """
    if weight.ndim != 2 or not np.isin(weight, (-1, 0, 1)).all():
        raise ValueError("pack_base3: weight must be a matrix of -1, 0 and +1; use ternarize first")
    rows, columns = weight.shape
    codes = np.zeros((rows, -(-columns // PER_BYTE) * PER_BYTE), np.uint8)
    codes[:, :columns] = weight + 1
    packed = np.zeros((rows, codes.shape[1] // PER_BYTE), np.uint8)
    for i, power in enumerate(_POWERS):  # at most 242, so bytes suffice
        packed += codes[:, i::PER_BYTE] * np.uint8(power)
    return packed


def unpack_base3(packed: np.ndarray, columns: int) -> np.ndarray:
    """Unpack the result of pack_base3 to a weight (R, columns) float32. Raises ValueError if packed is invalid."""
    if packed.ndim != 2 or packed.dtype != np.uint8 or packed.shape[1] != -(-columns // PER_BYTE):
        raise ValueError(
            f"unpack_base3: {columns} columns take {-(-columns // PER_BYTE)} bytes per row, got {packed.dtype} of "
            f"shape {packed.shape}"
        )
    if packed.size and packed.max() >= 3**PER_BYTE:
        raise ValueError(f"unpack_base3: no byte can be above {3**PER_BYTE - 1}, got {packed.max()}")
    weight = np.take(_WEIGHTS, packed, axis=0).reshape(len(packed), packed.shape[1] * PER_BYTE)
    return np.ascontiguousarray(weight[:, :columns])


def _compressed(text: str) -> str:
    """A text as zlib's bytes in base64: GPT-2's tokenizer.json takes 0.7 MB instead of 1.8."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode("ascii")


def decompressed(text: str) -> str:
    """The text of _compressed. Raises ValueError if it is damaged, or longer than MOST_TEXT bytes."""
    decoder = zlib.decompressobj()
    try:
        found = decoder.decompress(base64.b64decode(text, validate=True), MOST_TEXT)
    except zlib.error as error:
        raise ValueError(f"its tokenizer.json cannot be decompressed: {error}") from None
    if not decoder.eof:
        raise ValueError(f"its tokenizer.json is cut, or has over {MOST_TEXT:,} bytes")
    return found.decode()


class Digest:
    """SHA-256 over texts and then every tensor's name, dtype, shape and bytes, in the order of the names."""

    def __init__(self, *texts: str) -> None:
        self._digest = hashlib.sha256("".join(f"{text}\0" for text in texts).encode())

    def add(self, name: str, tensor: np.ndarray) -> None:
        """The next tensor."""
        array = np.asarray(tensor, order="C")
        self._digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        self._digest.update(array.reshape(-1).view(np.uint8).data)

    def hex(self) -> str:
        """Of what was added so far."""
        return self._digest.hexdigest()


def _digest(tensors: dict[str, np.ndarray], *texts: str) -> str:
    digest = Digest(*texts)
    for name in sorted(tensors):
        digest.add(name, tensors[name])
    return digest.hex()


def check_new(path: Path) -> None:
    """Raise UserError if a new file cannot be written there, before the work for it is done."""
    if os.path.lexists(path):  # also a link that leads nowhere
        raise UserError(f"{path} already exists; choose another file, or remove it.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UserError(
            f"The model could not be written to {path}: {error.strerror or error}; choose another file."
        ) from None


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    ternary: Collection[str],
    config: str,
    state: dict[str, Any],
    tokenizer: str,
    rows: str,
    scales: Mapping[str, np.float32] | None = None,
) -> None:
    """Write a model's tensors to one file, atomically.

    ternary : names of the matrices to pack; tensors holds their ternary values
    scales : of those matrices that have one
    config : the run's settings as JSON;  state : the training progress;  tokenizer : the text of tokenizer.json
    rows : arithmetic of the embedding's rows, in ROWS
    Raises UserError if writing fails, or if the rows cannot be rounded.
    """
    stored = {name + SUFFIX: pack_base3(tensors[name]) for name in ternary}
    stored |= {name: value for name, value in tensors.items() if name not in ternary}
    stored |= {name + SCALE: np.array([value], np.float32) for name, value in (scales or {}).items()}
    shapes = {name: list(tensors[name].shape) for name in (*ternary, EMBEDDING)}
    if rows != "float":
        try:
            stored[f"{EMBEDDING}.{rows}"], stored[SCALES] = round_rows(stored.pop(EMBEDDING), rows)
        except ValueError as error:
            raise UserError(
                f"The embedding cannot be rounded to {rows} ({error}); export it with --rows float."
            ) from None
    state_text = json.dumps(state | {"shapes": shapes, "rows": rows}, sort_keys=True)
    texts = {"config": config, "state": state_text, "tokenizer": _compressed(tokenizer)}
    metadata = {"format": FORMAT, **texts, "sha256": _digest(stored, *texts.values())}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(temporary, stored, metadata)
        replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"The model could not be written to {path}: {error.strerror or error}; choose another file, or free some "
            "disk space."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def note_size(path: Path, progress: Progress) -> None:
    """A note that a file is being read, if that takes more than a second or two."""
    size = path.stat().st_size
    if size > LARGE:
        progress.note(f"Reading {path} ({size / 1e6:,.0f} MB) ...")


def read(path: Path) -> tuple[str, dict[str, np.ndarray], dict[str, Any], str]:
    """config, tensors, state and tokenizer of a file from write(). Raises UserError for other and damaged files.

    The state has the arithmetic of the rows too, as "rows".
    """
    from safetensors import SafetensorError, safe_open

    damaged = f"{path} is damaged ({{}}); export the run again."
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(
                    f"{path} is a safetensors file, but not one from `flashlm-numba export`; give such a file, or "
                    "the folder of a run."
                )
            tensors = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError):  # also for a dtype that NumPy lacks
        raise UserError(
            f"{path} cannot be read as a model; give a file written by `flashlm-numba export`, or the folder of a "
            "run. If it is such a file, it is damaged; export the run again."
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    config, state_text, tokenizer = (metadata.get(name, "") for name in ("config", "state", "tokenizer"))
    if _digest(tensors, config, state_text, tokenizer) != metadata.get("sha256"):
        raise UserError(damaged.format("its tensors do not match its SHA-256"))
    try:
        text = decompressed(tokenizer)
        state = parse_json(state_text)
        shapes, rows = state.pop("shapes"), state["rows"]
        columns = shapes.pop(EMBEDDING)[1]
        if rows not in ROWS:
            raise ValueError(f"the arithmetic of its rows is {rows!r}")
        if rows != "float":
            tensors[EMBEDDING] = widen_rows(tensors.pop(f"{EMBEDDING}.{rows}"), tensors.pop(SCALES), columns, rows)
        for name in shapes:
            tensors[name] = unpack_base3(tensors.pop(name + SUFFIX), shapes[name][1])
            if name + SCALE in tensors:
                scale = np.float32(tensors.pop(name + SCALE).item())
                if not 0 <= scale < np.inf:
                    raise ValueError(f"the scale of {name} is {scale}")
                tensors[name] *= scale
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(damaged.format(error)) from None
    return config, tensors, state, text
