"""What every source of documents has: a name, roles, a stream of texts; and `datasets`, the library that reads rows."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flashlm_numba.system.errors import UserError

ROLES = ("train", "validation", "test")
ALL = "all"  # the role of documents that nobody has split yet


class Source(ABC):
    """Where documents come from: which ones, of which role, under which licence.

    name : as the user gave it;  kind : built-in, files or hub;  column : where rows keep the text
    licence : where it is known
    """

    name: str
    kind: str
    column: str
    licence: str | None

    @property
    @abstractmethod
    def roles(self) -> tuple[str, ...]:
        """Roles that have documents: ("all",), or some of train, validation and test."""

    @property
    def paths(self) -> list[Path]:
        """The local files that the documents are in."""
        return []

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a half-made corpus to be continued; plain JSON values."""
        return {"name": self.name, "kind": self.kind, "licence": self.licence}

    @abstractmethod
    def documents(
        self,
        role: str,
        first_part: int = 0,
        started: Callable[[int], None] = lambda part: None,
        note: Callable[[str], None] = lambda sentence: None,
    ) -> Iterator[str]:
        """Stream the texts of a role's documents; empty ones come as blank strings, for the caller to count.

        A Hugging Face dataset comes in parts, its files: started(part) is called before each, and those
        before first_part are not downloaded. Local files are quick to read again and count as no parts. A connection
        that breaks is tried again for a while, of which note(sentence) tells.
        Raises UserError when a file is damaged, is no UTF-8 or lacks the column, or the connection breaks.
        """


def role_of(name: str) -> str | None:
    """Role that a file's name, or else the name of a folder above it, gives by its first word: train, validation, test.

    The usual short names of a validation file count too, so that none is trained on by mistake. A book's
    `testament.txt` has no role.
    """
    for part in reversed(name.lower().split("/")):
        if word := re.match(r"(train|validation|valid|val|dev|test)([^a-z]|$)", part):
            return word[1] if word[1] in ROLES else "validation"
    return None


def quiet_datasets() -> Any:
    """Import `datasets` without its progress bars, log lines and download counter (a request per load)."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets
    import huggingface_hub

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.config.TORCH_AVAILABLE = False  # or it imports torch, where that is installed: 2 s and 200 MB
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL + 1)  # below this it logs every error
    huggingface_hub.utils.logging.set_verbosity_error()
    return datasets


def texts_of(stream: Iterable[dict[str, Any]], column: str, name: str) -> Iterator[str]:
    checked = False
    for row in stream:
        if not checked:
            check_column(row, column, name)
            checked = True
        text = row.get(column)
        if text is None:
            text = ""
        elif not isinstance(text, str):
            raise UserError(
                f"Column {column} of {name} holds {type(text).__name__}, not text: choose another --column."
            )
        yield text if text.isascii() else _without_surrogates(text)


def _without_surrogates(text: str) -> str:
    """Text with U+FFFD for half a surrogate pair, which JSON can hold and UTF-8 cannot; tiktoken does so."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def check_column(columns: Iterable[str], column: str, name: str | Path) -> None:
    names = list(columns)
    if column not in names:
        have = ", ".join(map(str, names)) or "none"
        raise UserError(f"{name} has no column {column}: choose one with --column (it has {have}).")


def reason(error: BaseException) -> str:
    """First line of an error's message, for use inside a sentence."""
    text = str(error).strip().splitlines()
    return (text[0].rstrip(".:") if text else type(error).__name__)[:200]
