"""Atomic writes, file hashes, and an error message for files that cannot be written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from flashlm_numba.system.errors import UserError, warn_once

# what file systems answer that cannot sync (a folder), or cannot rename (over a file, or out of a lower layer)
_NO_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_RENAME = {errno.EXDEV, errno.EEXIST, errno.EPERM, errno.EACCES, errno.EBUSY, errno.EINVAL} | (
    _NO_SYNC - {errno.EBADF}
)


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
    """Sync a folder's entries to disk, so that a file renamed into it survives a crash.

    Some file systems (CIFS, many of FUSE) cannot sync a folder, and some folders may be written but not read.
    """
    if os.name != "posix":  # Windows cannot open a folder and needs no sync
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        _allow_unsynced(error, folder)
    finally:
        os.close(descriptor)


def sync_file(file: IO[Any]) -> None:
    """Sync everything written to an open file to disk."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        _allow_unsynced(error, Path(file.name))


def _allow_unsynced(error: OSError, path: Path) -> None:
    """Warn if a file system cannot sync; raise other errors, such as those of the disk."""
    if error.errno not in _NO_SYNC:
        raise error
    warn_once(
        "sync",
        f"The file system of {path} cannot sync to disk ({error.strerror}), so the newest files may be lost if the "
        "power fails.",
    )


def replace(source: Path, target: Path) -> None:
    """Rename a file to target, replacing a file there, or a folder to target, where there is none.

    A file system that cannot do this (EXDEV for a folder of a container's image) gets a copy instead, which a crash can
    leave incomplete; the source is deleted only when the copy is on disk. A folder's state.json is copied last.
    """
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        warn_once(
            "rename",
            f"The file system of {target.parent} cannot rename {source.name} ({error.strerror}); the program copies "
            "instead, and a crash meanwhile can damage the copy.",
        )
        try:
            (_move_folder if source.is_dir() else _move_file)(source, target)
        except OSError as second:
            raise second from error


def _move_file(source: Path, target: Path) -> None:
    """Replace target by source. The old file keeps another name until the new one is complete."""
    old = target.with_name(f".{target.name}.old")
    renamed = False
    with contextlib.suppress(OSError):  # a file that is mounted cannot be renamed, but can be written
        os.rename(target, old)
        renamed = True
    try:
        _copy(source, target)
    except BaseException:
        if renamed:
            with contextlib.suppress(OSError):
                target.unlink(missing_ok=True)
                os.rename(old, target)
        raise
    if renamed:
        old.unlink()
    source.unlink()


def _move_folder(source: Path, target: Path) -> None:
    target.mkdir()
    try:
        for path in sorted(source.iterdir(), key=lambda path: path.name == "state.json"):
            _copy(path, target / path.name)
        sync_folder(target)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    remove_folder(source)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        sync_file(file)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for any other text, also for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def free_name(folder: Path, name: str, suffix: str = "") -> Path:
    """The path folder/name+suffix, with -2, -3 and so on after the name if it exists."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(path for each in names if not os.path.lexists(path := folder / f"{each}{suffix}"))


def remove_folder(folder: Path) -> None:
    """Delete a folder, its state.json first, so that a half-deleted checkpoint does not look like a complete one."""
    (folder / "state.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def write_atomically(path: Path, write: Callable[[BinaryIO], object], temporary: Path | None = None) -> None:
    """Write a file under a temporary name, fsync it and rename it. Readers see either the old content or the new.

    temporary : path in the same folder; default: a name with this process's id
    """
    if temporary is None:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            write(f)
            sync_file(f)
        replace(temporary, path)
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
