"""Atomic writes, file hashes, and an error message for files that cannot be written."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flashlm_numba.system.errors import UserError


def sha256(path: Path, size: int | None = None) -> Any:
    """hashlib object over the first `size` bytes of a file; None for all bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while size is None or size > 0:
            block = f.read(1 << 20 if size is None else min(size, 1 << 20))
            if not block:
                break
            digest.update(block)
            if size is not None:
                size -= len(block)
    return digest


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk, so that a file renamed into it survives a crash."""
    if os.name == "posix":  # Windows cannot open a folder and needs no sync
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, write: Callable[[BinaryIO], object], temporary: Path | None = None) -> None:
    """Write a file under a temporary name, fsync it and rename it. Readers see either the old content or the new.

    temporary : path in the same folder; default: a name with this process's id
    """
    if temporary is None:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically. After a crash it holds either the old text or the new one.

    Only one process may write the file at a time. The temporary name is fixed, so that a later call overwrites the
    remains of a killed process, and hidden, so that it does not count as content of its folder.
    """
    write_atomically(path, lambda file: file.write(text.encode()), path.with_name(f".{path.name}.tmp"))


@contextlib.contextmanager
def writing_to(folder: Path, remedy: str) -> Iterator[None]:
    """Turn an OSError into a UserError that ends with `remedy`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}; {remedy}."
        ) from error
