"""Read an exported MatMul-free LM for generation without unpacking it: five weights per byte become four.

A tensor is in memory only while its weights move to their place, and float32 matrices are never made. The peak is
therefore that of the packed model. packed.py describes the file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from flashlm_numba.data.tokenizer import Vocabulary
from flashlm_numba.data.vocabularies import vocabulary_of
from flashlm_numba.kernels.bit_packed import PackedTrunk
from flashlm_numba.kernels.bit_trunk import BitConfig, lower_bounds
from flashlm_numba.kernels.ternary import packed_width
from flashlm_numba.model import packed
from flashlm_numba.model.build import checked_vocabulary, kernel_parts, load_model
from flashlm_numba.model.config import ACTIVATIONS, ROWS, ModelConfig, RunConfig
from flashlm_numba.model.hub_folder import exported_file
from flashlm_numba.model.mixers import BIT_LAYERS
from flashlm_numba.model.model import Model
from flashlm_numba.model.packed_model import PackedHead, PackedModel, RoundedRows
from flashlm_numba.model.parameters import EMBEDDING, model_parameters
from flashlm_numba.model.settings import run_from_json
from flashlm_numba.system.compiled import ensure_compiled
from flashlm_numba.system.display import TERMINAL, Progress
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import parse_json

HEAD, HEAD_NORM = "head.weight", "head.norm.weight"
_ROWS_AT_ONCE = 512  # of a matrix, whose weights take a byte each while they are packed anew
_NAMES_AT_ONCE = 16  # tensors, after which the file's pages leave this process


def two_bits(out: np.ndarray, base3: np.ndarray, columns: int) -> None:
    """out (R, W) uint8, as by pack_ternary, from base3 (R, ceil(columns / 5)) uint8, as by packed.pack_base3.

    Raises ValueError if the arrays do not fit, or a byte of base3 is not of five weights.

    >>> out = np.empty((1, 64), np.uint8)
    >>> two_bits(out, packed.pack_base3(np.array([[1, 0, -1]])), 3)
    >>> [hex(byte) for byte in out[0, :4]]
    ['0x56', '0x55', '0x54', '0x55']
    """
    width, five = packed_width(columns), -(-columns // packed.PER_BYTE)
    if out.shape != (len(base3), width) or base3.shape != (len(out), five) or base3.dtype != np.uint8:
        raise ValueError(f"{columns} columns take {five} bytes per row, got {base3.dtype} of shape {base3.shape}")
    if base3.size and base3.max() >= 3**packed.PER_BYTE:
        raise ValueError(f"no byte can be above {3**packed.PER_BYTE - 1}, got {base3.max()}")
    table = np.arange(3**packed.PER_BYTE)[:, None] // 3 ** np.arange(packed.PER_BYTE) % 3
    fives = table.astype(np.uint8)
    codes = np.ones((min(_ROWS_AT_ONCE, len(out)), 4 * width), np.uint8)  # of zero
    for start in range(0, len(out), _ROWS_AT_ONCE):
        part = base3[start : start + _ROWS_AT_ONCE]
        codes[: len(part), :columns] = fives[part].reshape(len(part), -1)[:, :columns]
        blocks = codes[: len(part)].reshape(len(part), width // 64, 4, 64)
        found = blocks[:, :, 0] | blocks[:, :, 1] << 2 | blocks[:, :, 2] << 4 | blocks[:, :, 3] << 6
        out[start : start + _ROWS_AT_ONCE] = found.reshape(len(part), width)


class _Places:
    """Where the tensors of a file go, by name."""

    def __init__(self, config: ModelConfig, rows: str) -> None:
        self.config, self.rows = config, rows
        bit = BitConfig(config.dim, config.ffn_dim, config.n_blocks, config.n_passes, config.norm_eps)
        self.trunk = PackedTrunk(bit)
        self.head = np.zeros((config.vocab_size, packed_width(config.dim)), np.uint8)
        self.head_norm, self.head_scale = np.ones(config.dim, np.float32), np.zeros(1, np.float32)
        self.bounds = np.zeros((config.n_blocks, config.dim), np.float32)
        self.embedding: dict[str, np.ndarray] = {}
        self._fill: dict[str, Callable[[np.ndarray], None]] = {}
        weights = self.trunk.weights
        for b in range(config.n_blocks):
            norms = {"norm1": weights.norm1[b], "norm2": weights.norm2[b], "mixer.hidden_norm": weights.hidden_norm[b]}
            for place, (layer, name) in enumerate(BIT_LAYERS.items()):
                norms[f"{name}.norm"] = weights.down_norm[b] if layer == "down" else weights.norms[b, place]
                full = f"blocks.{b}.{name}.weight"
                self._matrix(full, self.trunk.matrix(b, layer), self.trunk.shapes[layer][1])
                self._array(full + packed.SCALE, weights.scales[b, place : place + 1])
            for name, place_of in norms.items():
                self._array(f"blocks.{b}.{name}.weight", place_of)
        self._array("final_norm.weight", weights.final_norm)
        self._array("lower_bounds", self.bounds)
        self._matrix(HEAD, self.head, config.dim)
        self._array(HEAD + packed.SCALE, self.head_scale)
        self._array(HEAD_NORM, self.head_norm)
        parts = (EMBEDDING,) if rows == "float" else (f"{EMBEDDING}.{rows}", packed.SCALES)
        for name in parts:
            self._keep(name)

    def _matrix(self, name: str, out: np.ndarray, columns: int) -> None:
        self._fill[name + packed.SUFFIX] = lambda value: two_bits(out, value, columns)

    def _keep(self, name: str) -> None:
        def keep(value: np.ndarray) -> None:
            self.embedding[name] = value.copy()

        self._fill[name] = keep

    def _array(self, name: str, out: np.ndarray) -> None:
        def fill(value: np.ndarray) -> None:
            if value.shape != out.shape or value.dtype != np.float32:
                raise ValueError(f"{name} must be float32 of shape {out.shape}, got {value.dtype} {value.shape}")
            out[...] = value

        self._fill[name] = fill

    @property
    def names(self) -> set[str]:
        """Of all tensors that the model needs."""
        return set(self._fill)

    def put(self, name: str, value: np.ndarray) -> None:
        """Move a tensor to its place; others have none. Raises ValueError if it does not fit."""
        if name in self._fill:
            self._fill[name](value)

    def model(self) -> PackedModel:
        """The model, after all tensors. Raises ValueError if the embedding's rows or a scale do not fit."""
        config = self.config
        self.trunk.weights.bounds[...] = lower_bounds(self.bounds)
        scales = np.append(self.trunk.weights.scales, self.head_scale)
        if not ((scales >= 0) & (scales < np.inf)).all():
            raise ValueError("the scales of its matrices are not finite")
        if self.rows == "float":
            rows = RoundedRows(self.embedding[EMBEDDING], None, "float")
        else:
            rows = RoundedRows(self.embedding[f"{EMBEDDING}.{self.rows}"], self.embedding[packed.SCALES], self.rows)
        shape = rows.rows(np.arange(min(1, len(rows.codes))), config.dim).shape
        if (len(rows.codes), *shape) != (config.vocab_size, 1, config.dim):
            raise ValueError(f"the embedding must have {config.vocab_size} rows of {config.dim}")
        head = PackedHead(self.head_norm, self.head, float(self.head_scale[0]))
        return PackedModel(config, self.trunk, rows, head)


def serves(run: RunConfig) -> bool:
    """Whether a PackedModel can be made of an exported model with these settings."""
    ends = run.head.name == "bitlinear" and not run.head.log_prior and run.head.soft_cap is None
    alone = not run.model.ngram_copy_orders and run.memory.memory == "none"
    return ends and alone and run.model.linear == "bitlinear" and run.model.embedding_dim is None


def load_for_generation(
    path: Path,
    checkpoint_name: str | None = None,
    *,
    ema: bool = False,
    uses: Collection[str],
    progress: Progress = TERMINAL,
) -> tuple[Model | PackedModel, Vocabulary]:
    """The model at path and its vocabulary, as by build.load_model; it stays packed if it can (serves).

    uses : "generate", with KINDS of sampling, and "score", "coding" and another arithmetic of the activations, for
        which a packed model needs no further kernels. Raises UserError as load_model.
    """
    path = exported_file(path, progress)
    run = None if ema or checkpoint_name is not None or not path.is_file() else _run_of(path)
    if run is None or not serves(run):
        loaded = load_model(path, checkpoint_name, ema=ema, uses=uses, progress=progress)
        return loaded.model, loaded.vocabulary
    own = ["packed" if use == "generate" else use for use in uses if use not in (*ACTIVATIONS, "score", "coding")]
    ensure_compiled(kernel_parts(run, own), progress)
    packed.note_size(path, progress)
    model, _, tokenizer = read_packed_model(path)
    return model, checked_vocabulary(vocabulary_of(tokenizer, run.tokenizer_hash, path), run, path)


def _run_of(path: Path) -> RunConfig | None:
    """The settings in an exported file; None if there are none, of which load_model says what is wrong."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        return run_from_json(metadata["config"], path) if metadata.get("format") == packed.FORMAT else None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, UserError):
        return None


def read_packed_model(path: Path) -> tuple[PackedModel, dict[str, Any], str]:
    """The model of an exported file, its state, and the text of its tokenizer.json.

    Raises UserError for a file that is damaged or not an export, and ValueError for another kind of model (serves).
    """
    from safetensors import SafetensorError, safe_open

    damaged = f"{path} is damaged ({{}}); export the run again."
    try:
        with safe_open(path, framework="numpy") as file:
            metadata, names = file.metadata() or {}, sorted(file.keys())
        if metadata.get("format") != packed.FORMAT:
            raise UserError(f"{path} is not a file from `flashlm-numba export`; give such a file.")
        texts = [metadata.get(name, "") for name in ("config", "state", "tokenizer")]
        run = run_from_json(texts[0], path)
        if not serves(run):
            raise ValueError(f"{path} holds a model whose weights are unpacked to float32")
        state = parse_json(texts[1])
        rows = state["rows"]
        if rows not in ROWS:
            raise UserError(damaged.format(f"the arithmetic of its rows is {rows!r}"))
        places, digest = _Places(run.model, rows), packed.Digest(*texts)
        missing = places.names - set(names)
        if missing or not set(model_parameters(run.model)) & places.names:
            raise UserError(damaged.format(f"{min(missing, default='everything')} is missing"))
        for start in range(0, len(names), _NAMES_AT_ONCE):
            with safe_open(path, framework="numpy") as file:
                for name in names[start : start + _NAMES_AT_ONCE]:
                    value = file.get_tensor(name)
                    digest.add(name, value)
                    try:
                        places.put(name, value)
                    except ValueError as error:
                        raise UserError(damaged.format(f"{name}: {error}")) from None
        if digest.hex() != metadata.get("sha256"):
            raise UserError(damaged.format("its tensors do not match its SHA-256"))
        try:
            return places.model(), state, packed.decompressed(texts[2])
        except ValueError as error:
            raise UserError(damaged.format(error)) from None
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise UserError(damaged.format(error)) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
