"""Fields of the settings' dataclasses, with the values that they may take in their metadata."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import field
from typing import Any


def in_range(default: Any, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False) -> Any:
    """A number's default with its range [low, high], or (low, high] if open_low."""
    return field(default=default, metadata={"low": low, "high": high, "open_low": open_low})


def one_of(default: str, choices: Collection[str]) -> Any:
    """A word's default with the words allowed.

    choices : read at each check, so that a name registered in a table counts from then on
    """
    return field(default=default, metadata={"choices": choices})
