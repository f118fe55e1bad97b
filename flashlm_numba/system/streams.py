"""Standard input, output and error, which may be closed, broken or full (cron, `2>&-`, a pipe whose reader ended)."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import Any

NAMES = ("stdin", "stdout", "stderr")


def open_standard_streams() -> None:
    """Connect those that are closed to the null device, so that no file that is opened later takes their number.

    Python sets sys.stderr to None if descriptor 2 is closed. Without this, a checkpoint could get that descriptor, and
    the notes of another process be written into it. A pipe that another program made non-blocking becomes blocking,
    because Python's streams lose output on a full non-blocking pipe.
    """
    for number, name in enumerate(NAMES):
        try:
            os.fstat(number)
        except OSError:
            _connect_to_null(number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
    if hasattr(os, "set_blocking"):
        for number in (1, 2):
            with contextlib.suppress(OSError):
                os.set_blocking(number, True)
    atexit.unregister(_settle)
    atexit.register(_settle)


def _connect_to_null(number: int) -> None:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened == number:  # usual, since the lowest free number is taken
        os.set_inheritable(number, True)
    else:
        os.dup2(opened, number)
        os.close(opened)


def discard_output(stream: Any) -> None:
    """Connect a stream that cannot be written to the null device; what it holds back is lost."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()


def _settle() -> None:
    """Empty both streams. Otherwise Python ends with status 120 if a note could not be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            discard_output(stream)


def error_descriptor() -> int | None:
    """The descriptor of standard error, or None if there is none. Descriptor 2 may belong to another file."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return None
