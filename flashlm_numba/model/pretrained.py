"""Initial embedding E (V, C) from a GPT-2 checkpoint: a file, or a repository on Hugging Face."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import linalg

from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import parse_json
from flashlm_numba.system.hub import HUB_TIMEOUT, quiet_hub
from flashlm_numba.system.paths import expanded

PADDING = 1_024  # a padded vocabulary has fewer unused rows at its end; 50,304 to 51,200 rows are common


def from_gpt2(source: str | Path, dim: int, vocab_size: int) -> tuple[np.ndarray, float]:
    """Rows (vocab_size, dim) float32 from a GPT-2 checkpoint's token embedding, and their share of its variance.

    source : a local .safetensors file, or `hf:NAME` for model.safetensors of a Hugging Face repository
    The embedding W (V, D) = U S Vt is reduced to U S of the `dim` largest singular values, as in FlashLM v3. The share
    is the sum of their squares divided by the sum of all squares.
    Raises UserError if the file is missing, damaged, or not GPT-2's.
    """
    weight, name = _read_wte(_download(str(source)) if str(source).startswith("hf:") else expanded(source))
    rows, width = weight.shape
    if not vocab_size <= rows < vocab_size + PADDING:
        raise UserError(
            f"{name} in {source} has {rows:,} rows, but the vocabulary has {vocab_size:,} tokens; "
            "use a checkpoint with GPT-2's vocabulary."
        )
    if width < dim:
        raise UserError(
            f"{name} in {source} has {width} columns, fewer than the model's {dim} channels; "
            "use a wider checkpoint or a narrower model."
        )
    weight = weight[:vocab_size]
    if not np.isfinite(weight).all():
        raise UserError(f"{name} in {source} contains values that are not finite; use an intact checkpoint.")
    # W = U S Vt, so U S = W V, and V are the eigenvectors of the small W.T @ W (D, D)
    gram = weight.T.astype(np.float64) @ weight.astype(np.float64)
    squares, vectors = linalg.eigh(gram)
    squares, vectors = squares[::-1], vectors[:, ::-1][:, :dim]
    total = float(squares.sum())
    if total <= 0:
        raise UserError(f"{name} in {source} contains only zeros; use a trained checkpoint.")
    signs = np.where(vectors[np.abs(vectors).argmax(axis=0), np.arange(dim)] < 0, -1.0, 1.0)
    return weight @ (vectors * signs).astype(np.float32), float(squares[:dim].sum()) / total


def _embedding_name(names: Iterable[str], path: Path) -> str:
    """The name of the token embedding among a checkpoint's tensors.

    Wrappers put words before it, such as _orig_mod. or module. A checkpoint that ties it to the output layer may hold
    only the latter.
    """
    for ending in ("wte.weight", "lm_head.weight"):
        found = [name for name in names if f".{name}".endswith(f".{ending}")]
        if len(found) > 1:
            raise UserError(
                f"{path} has {len(found)} token embeddings ({', '.join(found[:3])}); use a checkpoint of one model."
            )
        if found:
            return found[0]
    raise UserError(f"{path} has no tensor wte.weight or lm_head.weight; use a GPT-2 checkpoint in safetensors format.")


def _read_wte(path: Path) -> tuple[np.ndarray, str]:
    """The token embedding of a .safetensors file as float32 (V, D), and its name in the file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"There is no file {path}; --embeddings takes a GPT-2 .safetensors file, or hf:NAME.")
    try:
        with safe_open(path, framework="numpy") as file:
            name = _embedding_name(list(file.keys()), path)
            view = file.get_slice(name)
            kind, shape = view.get_dtype(), view.get_shape()
            if len(shape) != 2 or kind not in ("F32", "F16", "BF16"):
                raise UserError(
                    f"{name} in {path} is {kind} of shape {tuple(shape)}; expected F32, F16 or BF16 of "
                    "shape (tokens, channels)."
                )
            if kind == "BF16":  # NumPy has no such type
                return _read_bfloat16(path, name, tuple(shape)), name
            return file.get_tensor(name).astype(np.float32), name
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable .safetensors file ({error}); copy or download it again.") from None


def _read_bfloat16(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A bfloat16 tensor as float32; its bits are the upper half of the float32. safetensors has checked the file."""
    with path.open("rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        start, _ = parse_json(file.read(header_length))[name]["data_offsets"]
    raw: Any = np.memmap(path, "<u2", "r", offset=8 + header_length + start, shape=shape)
    return (raw.astype(np.uint32) << 16).view(np.float32)


def _download(source: str) -> Path:
    """model.safetensors of `hf:NAME`, from the Hugging Face cache without asking the hub, or else from the hub."""
    hub = quiet_hub()
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = source.removeprefix("hf:")
    try:
        try:
            return Path(hub.hf_hub_download(name, "model.safetensors", local_files_only=True))
        except LocalEntryNotFoundError:
            # one request first, because the download retries a failing request for half a minute
            hub.HfApi().model_info(name, timeout=HUB_TIMEOUT)
            return Path(hub.hf_hub_download(name, "model.safetensors"))
    except Exception as error:  # dozens of kinds: no network, no such repository, gated, full disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"Cannot get model.safetensors of {name} from the Hugging Face hub ({reason}); check the name "
            "and the network, or give a local .safetensors file."
        ) from None
