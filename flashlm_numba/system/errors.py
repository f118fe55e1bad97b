"""The one exception that reaches the user as a sentence instead of a traceback."""


class UserError(Exception):
    """What happened, what was expected and what to do, in one or two plain sentences.

    The command line prints the text and exits with status 1; raise it for anything that the user can mend
    (a missing or damaged file, a wrong vocabulary, a full disk), never for a mistake of the program.
    """
