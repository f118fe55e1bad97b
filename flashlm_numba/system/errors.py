"""The exception that reaches the user as a sentence instead of a traceback."""


class UserError(Exception):
    """An error that the user can correct. One or two sentences say what happened, what was expected and what to do.

    The command line prints the text and exits with status 1. Raise it for a missing or damaged file, a wrong
    vocabulary or a full disk, never for a bug of the program.
    """
