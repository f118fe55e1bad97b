"""Names of files: any bytes that the system allows, the same in every locale, and fit to be shown.

Python decodes a name by the locale's encoding and keeps bytes that do not fit as surrogates.
"""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from flashlm_numba.system.errors import UserError


def expanded(path: Path | str) -> Path:
    """The path with a leading `~` or `~name` replaced by the home folder of this user, or of one who exists.

    Raises UserError for an empty text, which Path would take for the working folder, and for a NUL character.
    """
    if path == "":
        raise UserError("The path is empty: name a file or a folder.")
    if "\0" in str(path):
        raise UserError(f"{printable(str(path))} contains a NUL character, which no name of a file can have.")
    return Path(os.path.expanduser(path))


def to_text(path: Path | str) -> str:
    """A name as a text for a file: the same in every locale, and reversible. Bytes outside UTF-8 become surrogates."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def from_text(text: str) -> str:
    """The name that to_text() wrote, as this process decodes it."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def printable(text: str) -> str:
    r"""A message on one line, with bytes outside the encoding and control characters written as in \xe9.

    >>> print(printable("caf\udce9\n.txt"))
    caf\xe9\x0a.txt
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # a byte that the locale's encoding cannot decode
        number -= 0xDC00
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 1 << 16 else f"\\U{number:08x}"


def _escape_unencodable(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(map(_escaped, error.object[error.start : error.end])), error.end


SHOWN = "flashlm_numba.shown"  # error handler of standard output and standard error; see cli/main.py
codecs.register_error(SHOWN, _escape_unencodable)
