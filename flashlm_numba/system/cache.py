"""The cache folder: the user's, or a temporary one if the user's cannot be written.

Compiled kernels are cached elsewhere; see kernels/_jit.py.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import platformdirs

from flashlm_numba.system.errors import UserError

T = TypeVar("T")


def cache_roots() -> tuple[Path, Path]:
    """The user's cache folder and its temporary replacement, whose name is fixed so that later runs find it."""
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    return (
        Path(platformdirs.user_cache_dir("flashlm-numba", appauthor=False)),
        Path(tempfile.gettempdir()) / f"flashlm-numba-{user}",
    )


def from_cache(name: str, read: Callable[[Path], T | None]) -> T | None:
    """The first result of read(path) that is not None, for `name` in each cache root; else None. Writes nothing."""
    user, temporary = cache_roots()
    found = read(user / name)
    if found is None and _is_ours(temporary):
        found = read(temporary / name)
    return found


def writable_cache(name: str = "") -> Path:
    """The folder `name` in the first of cache_roots that can be written; creates the folder if it is missing.

    Raises UserError if neither root can be written.
    """
    user, temporary = cache_roots()
    if _is_writable(user / name):
        return user / name
    if _is_writable(temporary) and _is_ours(temporary) and _is_writable(temporary / name):
        return temporary / name
    raise UserError(
        f"Neither {user} nor {temporary} can be written; set the environment variable XDG_CACHE_HOME to a writable "
        "folder."
    )


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _is_ours(folder: Path) -> bool:
    """Whether only this user may write to a folder; in the system's temporary folder anyone may create one."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    if not hasattr(os, "getuid"):
        return stat.S_ISDIR(status.st_mode)
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not others
