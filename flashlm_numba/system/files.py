"""Files written whole or not at all, their hashes, and a sentence where they cannot be written."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flashlm_numba.system.errors import UserError


def sha256(path: Path, size: int | None = None) -> Any:
    """hashlib object over the first size bytes of a file (all of them if None)."""
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
    """Bring a folder's entries to the disk: a file renamed into it is then there after a crash."""
    if os.name == "posix":  # Windows cannot open a folder, and needs no such call
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, write: Callable[[BinaryIO], object], temporary: Path | None = None) -> None:
    """Write a file under a temporary name, fsync it and rename it: readers see the old content or the new.

    temporary : in the same folder; default a name of this process's own
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
    """Replace a text file whole: after a crash it holds the old text or the new one.

    No other process may write it meanwhile: the temporary name is always the same, so that what a kill has left there
    is overwritten, and hidden, so that it does not count as content of its folder.
    """
    write_atomically(path, lambda file: file.write(text.encode()), path.with_name(f".{path.name}.tmp"))


@contextlib.contextmanager
def writing_to(folder: Path, remedy: str) -> Iterator[None]:
    """Turn the file system's refusals into a sentence that ends with a remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}; {remedy}."
        ) from error
