"""Run this Python interpreter in a separate process, whose memory and threads are freed when it ends."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from flashlm_numba.system.errors import UserError
from flashlm_numba.system.streams import error_descriptor

# -P: without it, Python would import a random.py in the working folder instead of its own
PYTHON = (sys.executable, "-P")


def environment(**variables: str) -> dict[str, str]:
    """The environment for such a process: that of this process, plus these variables."""
    # In a checkout that is not installed, the new process must find the package too. The folder of installed packages
    # is not added, because PYTHONPATH comes before Python's own library.
    root = Path(__file__).resolve().parents[2]
    before = [] if root.name in ("site-packages", "dist-packages") else [str(root)]
    paths = [*before, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | variables | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})


def run_apart(arguments: list[str], *, quiet: bool = False, **variables: str) -> None:
    """Run this Python interpreter with arguments and environment variables. Raises UserError if it fails.

    quiet : hide the standard error of the process; if it fails, the last line becomes part of the UserError
    """
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.flush()
    shown = subprocess.DEVNULL if error_descriptor() is None else None
    result = subprocess.run(
        [*PYTHON, *arguments],
        check=False,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE if quiet else shown,
        text=True,
        errors="replace",
    )
    if result.returncode:
        last = (result.stderr or "").strip().rpartition("\n")[2]
        why = f": {last}" if last else "."
        raise UserError(f"The command `{' '.join(arguments)}` failed with status {result.returncode}{why}")
