"""A model as a folder for the Hugging Face hub: its files, and how the commands read it.

model.safetensors is a file of `export` (packed.py) and complete by itself. The other files tell the hub and other
programs what it is. Where a folder has them, reading it compares them with SHA256SUMS and with the model, so that a
folder of damaged or mixed files is refused.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from flashlm_numba import __version__
from flashlm_numba.data.tokenizer import TOKENIZER, Vocabulary
from flashlm_numba.model import hub, packed
from flashlm_numba.model.config import RunConfig
from flashlm_numba.model.published import CONFIG
from flashlm_numba.model.safetensors_files import ONE, read_json
from flashlm_numba.system.display import Progress
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import parse_json, sha256

GENERATION, CARD, SUMS = "generation_config.json", "README.md", "SHA256SUMS"
FILES = (ONE, CONFIG, GENERATION, TOKENIZER, CARD, SUMS)
MODEL_TYPE = "flashlm-numba"
GENERATE = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "max_new_tokens": 200}  # as `generate`
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\]+)")
_AGAIN = "export or copy the folder again"


def is_hub_folder(path: Path) -> bool:
    """Whether a path is a folder with a model in a file, and neither a run nor a checkpoint."""
    is_run = (path / "checkpoints").is_dir() or (path / "state.json").exists()
    return not is_run and any((path / name).is_file() for name in (ONE, SUMS))


def is_exported(path: Path) -> bool:
    """Whether a path is not a run: an exported file, a folder for the hub, or a repository there."""
    return path.is_file() or is_hub_folder(path) or hub.repository_of(path) is not None


def exported_file(path: Path, progress: Progress) -> Path:
    """The file to read for what a user names: that of a folder for the hub, which is checked, or of hf:USER/NAME, which
    is downloaded. Every other path, such as a run's, is returned as it is.

    Raises UserError if a file is damaged, or if the model cannot be downloaded.
    """
    repository = hub.repository_of(path)
    if repository is not None:
        folder = hub.download(repository, FILES, progress)
        return checked_file(folder, f"delete {folder.parent.parent} to download it again")
    return checked_file(path) if is_hub_folder(path) else path


def pinned(path: Path, file: Path) -> str:
    """What names the same weights later: hf:USER/NAME@COMMIT, or an absolute path.

    path : as the user named them;  file : what exported_file made of it
    """
    repository = hub.repository_of(path)
    return str(file.resolve()) if repository is None else str(hub.Repository(repository.name, file.parent.name))


def checked_file(folder: Path, remedy: str = _AGAIN) -> Path:
    """The model.safetensors of a folder for the hub, after the other files were compared with SHA256SUMS and with it.

    Raises UserError, ending with `remedy`, if a file is damaged or belongs to another model. What is wrong with the
    model itself is left to packed.read.
    """
    for name, expected in _sums(folder, remedy).items():
        path = folder / name
        try:
            found = sha256(path).hexdigest()
        except FileNotFoundError:
            raise UserError(f"{path} is missing, though {SUMS} lists it; {remedy}.") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
        if found != expected:
            raise UserError(f"{path} is damaged: it does not match its SHA-256 in {SUMS}; {remedy}.")
    file = folder / ONE
    settings = _settings_in(file)
    if (folder / CONFIG).exists():
        content = read_json(folder / CONFIG)
        kind = content.get("model_type") if isinstance(content, dict) else None
        if kind == "hgrn_bit":
            raise UserError(
                f"{folder} holds a published MatMul-free LM; import it with `flashlm-numba import {folder} FILE`, and "
                "give FILE."
            )
        if kind != MODEL_TYPE:
            raise UserError(
                f"{folder / CONFIG} has the model_type {kind!r}, which is no model of this program; give a folder "
                "written by `flashlm-numba export --hub`."
            )
        if settings is not None and content.get("settings") != settings:
            raise UserError(f"{folder / CONFIG} has other settings than {ONE} beside it; {remedy}.")
    tokenizer = folder / TOKENIZER
    if settings is not None and tokenizer.exists():
        try:
            found = sha256(tokenizer).hexdigest()
        except OSError as error:
            raise UserError(f"{tokenizer} cannot be read: {error.strerror or error}.") from None
        if found != settings.get("tokenizer_hash"):
            raise UserError(f"{tokenizer} is not the vocabulary of {ONE} beside it; {remedy}.")
    return file


def _sums(folder: Path, remedy: str) -> dict[str, str]:
    """The SHA-256 (hex) of this program's files in SHA256SUMS; nothing if there is none, as in a folder of others."""
    path = folder / SUMS
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}.") from None
    lines = [_LINE.fullmatch(line) for line in text.splitlines()]
    found = {line[2]: line[1] for line in lines if line is not None}
    if None in lines or not found:
        raise UserError(f"{path} is damaged: it is no list of SHA-256 and names; {remedy}.")
    return {name: digest for name, digest in found.items() if name in FILES}


def _settings_in(file: Path) -> dict[str, Any] | None:
    """The settings in an exported file; None if there are none, of which packed.read says what is wrong."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            settings = parse_json((opened.metadata() or {})["config"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


# --- writing ---


def config_text(run: RunConfig, vocabulary: Vocabulary, rows: str) -> str:
    """The text of config.json: what other programs look for, and all settings. rows : arithmetic of the embedding"""
    content = {
        "model_type": MODEL_TYPE,
        "architectures": ["FlashLM" if run.model.linear == "ternary" else "MatMulFreeLM"],
        "format": packed.FORMAT,
        "flashlm_numba_version": __version__,
        "vocab_size": run.model.vocab_size,
        "hidden_size": run.model.dim,
        "num_hidden_layers": run.model.n_blocks,
        "bos_token_id": vocabulary.start,
        "eos_token_id": vocabulary.eot,
        "rows": rows,
        "settings": json.loads(run.to_json()),
    }
    return json.dumps(content, indent=2) + "\n"


def generation_text(vocabulary: Vocabulary) -> str:
    """The text of generation_config.json: what `generate` does by default."""
    content = {"bos_token_id": vocabulary.start, "eos_token_id": vocabulary.eot, **GENERATE}
    return json.dumps(content, indent=2) + "\n"


def sums_text(folder: Path) -> str:
    """The text of SHA256SUMS for the files in a folder, as `sha256sum -c` reads it."""
    return "".join(f"{sha256(folder / name).hexdigest()}  {name}\n" for name in sorted(os.listdir(folder)))
