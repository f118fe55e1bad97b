"""Dataclass fields for settings; their metadata holds the values that are allowed."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import field
from typing import Any


def in_range(
    default: Any, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False, optional: bool = False
) -> Any:
    """A field for a number: its default and its range [low, high], or (low, high] if open_low.

    optional : files of earlier versions lack it
    """
    return field(default=default, metadata={"low": low, "high": high, "open_low": open_low, "optional": optional})


def one_of(default: str, choices: Collection[str], *, optional: bool = False) -> Any:
    """A field for a word: its default and the allowed words.

    choices : read at each check, so that a name registered in a table later is allowed too
    optional : files of earlier versions lack it
    """
    return field(default=default, metadata={"choices": choices, "optional": optional})
