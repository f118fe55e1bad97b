"""Run this Python interpreter in a separate process, whose memory and threads are freed when it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flashlm_numba.system.errors import UserError


def environment(**variables: str) -> dict[str, str]:
    """The environment for such a process: that of this process, plus these variables."""
    # in a checkout that is not installed, the new process must find the package too
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | variables | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run_apart(arguments: list[str], *, quiet: bool = False, **variables: str) -> None:
    """Run this Python interpreter with arguments and environment variables. Raises UserError if it fails.

    quiet : hide the standard error of the process; if it fails, the last line becomes part of the UserError
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
        raise UserError(f"The command `{' '.join(arguments)}` failed with status {result.returncode}{why}")
