"""The exception and the warning that reach the user as a sentence instead of a traceback."""

import warnings


class UserError(Exception):
    """An error that the user can correct. One or two sentences say what happened, what was expected and what to do.

    The command line prints the text and exits with status 1. Raise it for a missing or damaged file, a wrong
    vocabulary or a full disk, never for a bug of the program.
    """


class Stopped(UserError):
    """The user interrupted the work, and what is done is kept. The command line exits with status 130."""


class PlaceWarning(UserWarning):
    """A file system lacks something, and the work continues without it. The command line prints the sentence."""


_said: set[str] = set()  # kinds of PlaceWarning so far


def warn_once(kind: str, sentence: str) -> None:
    """Give a PlaceWarning, unless this process has given one of this kind."""
    if kind not in _said:
        _said.add(kind)
        warnings.warn(sentence, PlaceWarning, stacklevel=3)
