"""Reading a run's log, metrics.jsonl."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from flashlm_numba.system.errors import UserError
from flashlm_numba.system.files import parse_json

LOG = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log: one object per logged step. A line that is being written is left out.

    Raises UserError if there is no such file.
    """
    try:
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{folder} has no log that can be read ({error.strerror}): train a run there.") from None
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # torn by a crash
            value = parse_json(line)
            if isinstance(value, dict) and "step" in value:
                found.append(value)
    return found
