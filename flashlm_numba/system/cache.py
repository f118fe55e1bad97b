"""The cache folder: the user's, or a temporary one if the user's cannot be written.

Compiled kernels are in a subfolder; see kernels/_jit.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from flashlm_numba.kernels._cache import is_private, is_writable, temporary_root, user_root
from flashlm_numba.system.errors import UserError

T = TypeVar("T")


def from_cache(name: str, read: Callable[[Path], T | None]) -> T | None:
    """The first result of read(path) that is not None, for `name` in each cache root; else None. Writes nothing."""
    user, temporary = user_root(), temporary_root()
    found = read(user / name) if user.is_absolute() else None
    if found is None and temporary is not None and is_private(temporary):
        found = read(temporary / name)
    return found


def writable_cache(name: str = "") -> Path:
    """The folder `name` in the first cache root that can be written; creates the folder if it is missing.

    Raises UserError if neither root can be written.
    """
    user, temporary = user_root(), temporary_root()
    if is_writable(user / name):
        return user / name
    if temporary and is_writable(temporary) and is_private(temporary) and is_writable(temporary / name):
        return temporary / name
    raise UserError(
        f"Neither {user} nor {temporary or 'a temporary folder'} can be written; set the environment variable "
        "XDG_CACHE_HOME to a writable folder."
    )


def set_hub_home() -> None:
    """Name a folder for huggingface_hub if the user has no home; it would make a folder "~" in the working folder."""
    if not user_root().is_absolute() and "HF_HOME" not in os.environ:
        os.environ["HF_HOME"] = str(writable_cache("huggingface"))
