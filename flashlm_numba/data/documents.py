"""The interface of a source of documents (name, roles, stream of texts), and helpers for the library `datasets`."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashlm_numba.system.errors import UserError
from flashlm_numba.system.hub import quiet_hub

ROLES = ("train", "validation", "test")
ALL = "all"  # role of documents that are not divided into splits
LISTED = 20  # names of columns in a message


@dataclass
class Tally:
    """Numbers of documents left out up to some point of the source."""

    empty: int = 0
    held_out: int = 0


@dataclass(frozen=True)
class Place:
    """Where a file of a Hugging Face dataset begins. A continued run starts there, not at the first file."""

    part: int = 0
    documents: int = 0  # documents of the plan's stream before it
    empty: int = 0  # documents without text before it
    stage: int = 0  # index in Plan.stages()
    taken: int = 0  # documents before it that count towards --max-docs
    held_out: int = 0  # documents left out before it because they are held out


@dataclass(frozen=True)
class Document:
    """A document with text, and its split."""

    split: str
    text: str
    limited: bool  # whether it counts towards --max-tokens
    tally: Tally  # the tally after this document
    place: Place = Place()  # a place at or before this document


class Source(ABC):
    """A source of documents.

    name : as given by the user;  kind : built-in, files or hub;  column : column of the text in rows
    licence : licence of the documents, if known
    """

    name: str
    kind: str
    column: str
    licence: str | None

    @property
    @abstractmethod
    def roles(self) -> tuple[str, ...]:
        """Roles that have documents: ("all",), or several of train, validation and test."""

    @property
    def paths(self) -> list[Path]:
        """The local files that contain the documents."""
        return []

    def fingerprint(self) -> dict[str, Any]:
        """JSON values that must be unchanged to continue an unfinished corpus."""
        return {"name": self.name, "kind": self.kind, "licence": self.licence}

    def parts(self, role: str) -> int:
        """Number of parts of a role, as in documents()."""
        return 1

    @abstractmethod
    def documents(
        self,
        role: str,
        first_part: int = 0,
        started: Callable[[int], None] = lambda part: None,
        note: Callable[[str], None] = lambda sentence: None,
    ) -> Iterator[str]:
        """Stream the texts of a role's documents. Empty documents are blank strings, so that the caller can count them.

        The parts of a Hugging Face dataset are its files. started(part) is called before each part, and parts before
        first_part are not downloaded. Local files are quick to read again and have no parts. After a broken connection
        the stream retries for a while and reports it with note(sentence).
        Raises UserError if a file is damaged, is not UTF-8 or lacks the column, or if the connection breaks for good.
        """


def role_of(name: str) -> str | None:
    """The role in the first word of a file's name, or else of a folder above it: train, validation or test; or None.

    The usual short names of validation files count too, so that no such file is used for training by mistake.
    `testament.txt` has no role, because its first word is not "test".
    """
    for part in reversed(name.lower().split("/")):
        if word := re.match(r"(train|validation|valid|val|dev|test)([^a-z]|$)", part):
            return word[1] if word[1] in ROLES else "validation"
    return None


def quiet_datasets() -> Any:
    """Import `datasets` without its progress bars, log lines and download counter (a request per load)."""
    quiet_hub()
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.config.TORCH_AVAILABLE = False  # otherwise it imports an installed torch: 2 s and 200 MB
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL + 1)  # below this it logs every error
    return datasets


class NotText(Exception):
    """A value of the column is not text."""


_KINDS = {bool: "true or false", int: "a number", float: "a number", bytes: "bytes", list: "a list", dict: "an object"}


def pick(row: Mapping[str, Any], column: str, missing: Callable[[Iterable[str]], None] = lambda columns: None) -> str:
    """The text in a column of a row; empty if it is null or missing. `a.b` is field b of column a, or a column a.b.

    missing : called with the names of the row's columns if the column is not among them
    Raises NotText if the value is not text.
    """
    value: Any = row
    for name in [column] if column in row else column.split("."):
        if value is None:
            break
        if not isinstance(value, Mapping) or name not in value:
            missing(row)
            return ""
        value = value[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise NotText(f"the value is {_KINDS.get(type(value), type(value).__name__)}")
    return value


@dataclass
class Missing:
    """The rows of a file that lack the column."""

    rows: int = 0
    columns: list[str] = field(default_factory=list)  # of the first such row

    def add(self, columns: Iterable[str]) -> None:
        """Count a row with these columns."""
        self.rows += 1
        self.columns = self.columns or [str(name) for name in columns]

    def report(self, file: str, column: str, rows: int, *, skip_missing: bool, note: Callable[[str], None]) -> None:
        """Note that some of a file's rows lack the column. If all do, raise UserError, unless skip_missing is True.

        rows : number of rows read, at least self.rows
        """
        if not self.rows:
            return
        have = _listed(self.columns)
        if self.rows < rows:
            note(f"{file}: {self.rows:,} of {rows:,} rows lack the column {column} (the first of them has {have}).")
        elif skip_missing:
            note(f"{file} has no column {column} and is left out (it has {have}).")
        else:
            raise UserError(
                f"{file} has no column {column}: choose one with --column (it has {have}), or leave such files out "
                "with --skip-missing."
            )


def _listed(names: list[str]) -> str:
    """Names of columns for a sentence: all of them, or the first ones if there are many."""
    more = len(names) - LISTED
    return (", ".join(names[:LISTED]) or "none") + (f" and {more:,} more" if more > 0 else "")


def without_surrogates(text: str) -> str:
    """Replace unpaired surrogates, which JSON allows and UTF-8 does not, by U+FFFD, as tiktoken does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def reason(error: BaseException) -> str:
    """The first line of an error's message, for use in a sentence."""
    text = str(error).strip().splitlines()
    return (text[0].rstrip(".:") if text else type(error).__name__)[:200]
