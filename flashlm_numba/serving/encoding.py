"""JSON as the server writes it.

It is ASCII: the escapes of JSON stand for other characters, so that no client has to guess an encoding and no character
can end a line of an event stream.
"""

from __future__ import annotations

import json
from typing import Any


def json_text(value: Any) -> str:
    """JSON in ASCII, on one line. Raises ValueError for a number that is not finite."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def json_bytes(value: Any) -> bytes:
    """The same as bytes."""
    return json_text(value).encode()
