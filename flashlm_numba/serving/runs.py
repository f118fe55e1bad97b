"""A folder of training runs: what is in it, and the lines that a run has logged, while it trains too.

Only runs in the folder itself are read. A link that leads out of it is no run, nor is a folder whose log is such a
link.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flashlm_numba.serving.api_error import ApiError
from flashlm_numba.serving.encoding import json_text
from flashlm_numba.system.locks import is_locked
from flashlm_numba.training.metrics import LOG

MOST_RUNS = 200  # in the list, the newest
TAIL = 1 << 18  # bytes at the end of a log that the list looks at
LINE = 1 << 16  # bytes of a line; longer ones are damaged
ANSWER_LINES, ANSWER_BYTES = 5_000, 1 << 20  # of one answer
_NUMBERS = ("step", "tokens", "seconds", "loss", "nll", "val_nll", "tokens_per_s")


class Runs:
    """The runs of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def list(self) -> dict[str, Any]:
        """The newest runs, the one that was written last first, with the last numbers of their logs.

        Raises ApiError if the folder cannot be read.
        """
        try:
            names = os.listdir(self._folder)
        except OSError as error:
            raise ApiError(404, f"The folder of runs cannot be read ({error.strerror}).", code="no_runs") from None
        found = []
        for name in names:
            with contextlib.suppress(OSError, ApiError):
                found.append((self._log(name).stat().st_mtime, name))
        found.sort(reverse=True)
        runs = []
        for changed, name in found[:MOST_RUNS]:
            with contextlib.suppress(OSError, ApiError):  # deleted meanwhile
                runs.append(self._described(name, changed))
        return {"runs": runs, "left_out": max(0, len(found) - MOST_RUNS)}

    def _described(self, name: str, changed: float) -> dict[str, Any]:
        log = self._log(name)
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            if size > TAIL:
                file.readline()  # the rest of a line
            lines = [line for line in file.read(TAIL).split(b"\n")[:-1] if line]
        last = next(filter(None, map(_parsed, reversed(lines))), {})
        numbers = {key: last.get(key) if _is_number(last.get(key)) else None for key in _NUMBERS}
        validated = (_parsed(line) or {} for line in reversed(lines) if b'"val_nll"' in line)
        numbers["val_nll"] = next((line["val_nll"] for line in validated if _is_number(line.get("val_nll"))), None)
        return {
            "name": name,
            **numbers,
            "steps": self._planned(name),
            "training": is_locked(log.parent / ".lock"),
            "seconds_ago": round(max(0.0, time.time() - changed), 1),
        }

    def _planned(self, name: str) -> int | None:
        """The steps that a run is to take, if that can be read."""
        with contextlib.suppress(ApiError, OSError, ValueError, LookupError, TypeError, RecursionError):
            with self._file(name, "config.json").open("rb") as file:
                steps = json.loads(file.read(LINE))["plan"]["steps"]
            return steps if type(steps) is int and 0 < steps < 1 << 53 else None
        return None

    def metrics(self, name: str, after: int) -> dict[str, Any]:
        """Lines of a run's log after the first `after` ones: a part of them if there are many.

        `next` is where the following lines begin, and `more` whether there are any. `next` below `after` means that
        the log was cut, as by a run that continues from an earlier step. Damaged lines are counted and left out.
        Raises ApiError if there is no such run.
        """
        lines, number, size = list[Any](), 0, 0
        try:
            with self._log(name).open("rb") as file:
                for line in _complete_lines(file):
                    number += 1
                    if number <= after or not line:
                        continue
                    values = _parsed(line)
                    if values is not None:
                        lines.append(values)
                        size += len(line)
                    if len(lines) == ANSWER_LINES or size >= ANSWER_BYTES:
                        return {"lines": lines, "next": number, "more": True}
        except OSError as error:
            raise ApiError(404, f"The log of this run cannot be read ({error.strerror}).", code="no_run") from None
        return {"lines": lines, "next": number, "more": False}

    def _log(self, name: str) -> Path:
        return self._file(name, LOG)

    def _file(self, name: str, file: str) -> Path:
        """The path of a run's file. Raises ApiError unless it is a file within the folder."""
        absent = ApiError(404, f"There is no run {name[:100]!a} here.", code="no_run")
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            raise absent
        try:
            name.encode()  # the page could not write the address of another name
            folder = self._folder.resolve()
            path = (folder / name / file).resolve()
            if not path.is_file() or path.parent.parent != folder:
                raise absent
        except (OSError, ValueError, RuntimeError):  # RuntimeError: a circle of links
            raise absent from None
        return path


def _complete_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, without one that is being written; an empty one for a line that is too long."""
    while line := file.readline(LINE):
        if line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):  # the rest
            line = file.readline(LINE)
        if line:
            yield b""


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object in a line, with null for numbers that are not finite; None for a damaged line."""
    try:
        values = json.loads(line, parse_constant=lambda _: None)
        json_text(values)  # refuses what JSON cannot hold, such as 1e999
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
