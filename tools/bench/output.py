"""Output files of benchmarks: checked before the work begins, and written atomically."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from flashlm_numba.system.files import write_atomically


def check_writable(path: Path) -> None:
    """Raise click.BadParameter unless a file can be written at path. Call this before hours of work, not after."""
    try:
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(20, "Not a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(21, "Is a directory")
        if path.exists() and not path.is_file():
            raise OSError(22, "Not a regular file")
        if path.exists():
            with path.open("ab"):
                pass
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be written: {error.strerror or error}.") from None


def write_json(path: str | Path, result: Mapping[str, Any]) -> None:
    """Write one object atomically, indented. Raises ValueError for a number that is not finite, which JSON lacks."""
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    write_atomically(Path(path), lambda file: file.write(text.encode()))
