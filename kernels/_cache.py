"""The files of compiled kernels: in which folder they are, and how damage to them is noticed.

Numba replaces its cache files without syncing them, so a crash can leave them empty or cut, and then every start fails
with EOFError. Here each file begins with the SHA-256 of its content. A file that does not match is compiled anew.

This module imports Numba only inside functions, since flashlm_numba/system/cache.py uses the folders without kernels.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import stat
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import platformdirs

_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
# what file systems answer that cannot rename over a file
_NO_RENAME = {errno.EXDEV, errno.EEXIST, errno.EPERM, errno.EACCES, errno.EBUSY, errno.ENOSYS, errno.ENOTSUP}


class CacheWarning(UserWarning):
    """A file of compiled kernels is damaged."""


# --- folders ---


def user_root() -> Path:
    """The user's cache folder. It begins with "~" if there is neither HOME nor an entry for the user in passwd."""
    try:
        return Path(platformdirs.user_cache_dir("flashlm-numba", appauthor=False))
    except RuntimeError:  # newer versions of platformdirs
        return Path("~/.cache/flashlm-numba")


def temporary_root() -> Path | None:
    """The replacement of user_root, with a fixed name so that later processes find it; None without such a folder."""
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    try:
        return Path(tempfile.gettempdir()) / f"flashlm-numba-{user}"
    except FileNotFoundError:  # no temporary folder can be written
        return None


def is_writable(folder: Path) -> bool:
    """Whether a folder exists or can be created, and files can be written to it. A path without a root does not count.

    Without a home folder, user_root would be a folder called "~" below the working folder.
    """
    if not folder.is_absolute():
        return False
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def is_private(folder: Path, *, or_roots: bool = False) -> bool:
    """Whether folder is no link and only this user may write to it; in a temporary folder anyone may create it.

    or_roots : accept a folder of root's too
    """
    try:
        status = folder.lstat()
    except OSError:
        return False
    if not hasattr(os, "getuid"):
        return stat.S_ISDIR(status.st_mode)
    owners = (os.getuid(), 0) if or_roots else (os.getuid(),)
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid in owners and not others


# --- files ---


def sealed(content: bytes) -> bytes:
    """The content of a file with its SHA-256 in front."""
    return hashlib.sha256(content).digest() + content


def unsealed(data: bytes) -> bytes | None:
    """The content of a file written by sealed, or None if it is damaged."""
    digest, content = data[:32], data[32:]
    return content if hashlib.sha256(content).digest() == digest else None


def read_sealed(path: Path) -> bytes | None:
    """The content of a sealed file, or None if it is missing, damaged or unreadable."""
    try:
        return unsealed(path.read_bytes())
    except OSError:
        return None


def _write_sealed(path: Path, content: bytes) -> None:
    """Replace a file by a sealed one; written in place where renaming fails, since its readers notice a part of it."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:16]}.tmp")
    try:
        temporary.write_bytes(sealed(content))
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.errno not in _NO_RENAME:
            raise
        path.write_bytes(sealed(content))


def compiled_files(folder: Path) -> list[Path]:
    """Numba's files in a folder, sorted."""
    return sorted(path for path in folder.glob("*") if path.suffix in (".nbi", ".nbc"))


def write_mark(mark: Path, folder: Path) -> None:
    """Write a mark that the compiled code in a folder is complete: the names of its files."""
    _write_sealed(mark, "\n".join(path.name for path in compiled_files(folder)).encode())


def lost_files(mark: Path, folder: Path) -> list[Path] | None:
    """The files named by a mark that are missing or damaged; None without a valid mark."""
    names = read_sealed(mark)
    if not names:
        return None
    paths = [folder / name for name in names.decode().split("\n")]
    return [path for path in paths if read_sealed(path) is None]


def remove_damaged(folder: Path) -> None:
    """Delete the damaged files in a folder, so that they are compiled without a warning."""
    for path in compiled_files(folder):
        if read_sealed(path) is None:
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def _read_only_allowed() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise


# --- Numba's cache ---


def cache_for(folder: Path) -> Callable[[Any], Any]:
    """A function that makes the cache of a Python function, whose files are in folder and sealed.

    The folder must belong to one version of the sources, since nothing else tells the cache that they have changed.
    """
    from numba.core import caching
    from numba.core.serialize import dumps

    class Locator(caching.UserProvidedCacheLocator):
        def __init__(self, py_func: Any, py_file: str) -> None:
            self._py_file = py_file
            self._lineno = py_func.__code__.co_firstlineno
            self._cache_path = str(folder)

        @classmethod
        def from_function(cls, py_func: Any, py_file: str) -> Any:
            return cls(py_func, py_file)  # Numba would not read a folder that cannot be written

        def get_source_stamp(self) -> None:
            return None  # Numba's is of the file, which has another time in every installation

    class Implementation(caching.CompileResultCacheImpl):
        _locator_classes = (Locator,)

    class Files(caching.IndexDataCacheFile):
        """The index of a function and its data files."""

        def _save_index(self, overloads: dict[Any, str]) -> None:
            self._write(self._index_path, (self._version, self._source_stamp, overloads))

        def _load_index(self) -> dict[Any, str]:
            found = self._read(self._index_path)
            current = found is not None and found[:2] == (self._version, self._source_stamp)
            return found[2] if current else {}

        def _save_data(self, name: str, data: Any) -> None:
            self._write(self._data_path(name), data)
            caching._cache_log("[cache] data saved to %r", self._data_path(name))  # with NUMBA_DEBUG_CACHE

        def _load_data(self, name: str) -> Any:
            found = self._read(self._data_path(name))
            caching._cache_log("[cache] data loaded from %r", self._data_path(name))
            return found

        def _write(self, path: str, value: Any) -> None:
            _write_sealed(Path(path), dumps(value))

        def _read(self, path: str) -> Any:
            if not os.path.lexists(path):
                return None
            content = read_sealed(Path(path))
            if content is None:
                warnings.warn(
                    f"The compiled kernels in {path} are damaged; they are compiled anew.", CacheWarning, stacklevel=2
                )
                return None
            return pickle.loads(content)

    class KernelCache(caching.FunctionCache):
        _impl_class = Implementation

        def __init__(self, py_func: Any) -> None:
            super().__init__(py_func)
            stamp = self._impl.locator.get_source_stamp()
            self._cache_file = Files(self._cache_path, self._impl.filename_base, stamp)

        def save_overload(self, sig: Any, data: Any) -> None:
            with _read_only_allowed():
                super().save_overload(sig, data)

    return KernelCache
