"""This Python again, in a process of its own: neither memory nor threads that it took stay with the caller."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flashlm_numba.system.errors import UserError


def environment(**variables: str) -> dict[str, str]:
    """The environment of such a process: this one's, and these variables."""
    # a checkout that is not installed must find the package as this process did
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | variables | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run_apart(arguments: list[str], *, quiet: bool = False, **variables: str) -> None:
    """Run this Python with arguments and these variables; UserError if it fails, having said why.

    quiet : show nothing of what it writes to standard error; a failure's last line is then part of the UserError
    """
    if sys.stderr is not None:
        sys.stderr.flush()
    result = subprocess.run(
        [sys.executable, *arguments],
        check=False,
        env=environment(**variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
        errors="replace",
    )
    if result.returncode:
        last = (result.stderr or "").strip().rpartition("\n")[2]
        why = f": {last}" if last else "."
        raise UserError(f"That did not work: `{' '.join(arguments)}` ended with status {result.returncode}{why}")
