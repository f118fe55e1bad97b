"""Checks of arguments that Python callers pass, with the sentences of the command line."""

from __future__ import annotations

import math
import operator
from typing import Any

from flashlm_numba.system.errors import UserError


def whole(name: str, value: Any, low: int = 1) -> int:
    """The argument as a Python integer, also if it is one of NumPy's. Raises UserError unless it is at least low."""
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be a whole number, got {value!r}.") from None
    if number < low:
        raise UserError(f"{name} must be at least {low}, got {number}.")
    return number


def positive(name: str, value: Any, high: float) -> float:
    """The argument as a Python float. Raises UserError unless it is above 0 and at most high."""
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number <= high:
        raise UserError(f"{name} must be a number above 0 and at most {high:,.0f}, got {value!r}.")
    return number
