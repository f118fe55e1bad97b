"""`python -m flashlm_numba` runs the command `flashlm-numba`."""

import os
import sys


def _forget_working_folder() -> None:
    """Remove the working folder from the places of modules, since it may hold a random.py that is not Python's own.

    `python -m` puts it first. A checkout that is not installed is found through that entry, so there it stays.
    """
    checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        here = os.getcwd()
    except OSError:  # the folder was removed
        return
    if not sys.flags.safe_path and sys.path[:1] == [here] and os.path.realpath(here) != os.path.realpath(checkout):
        del sys.path[0]
        if getattr(sys.modules.get("flashlm_numba"), "__file__", None) is None:
            del sys.modules["flashlm_numba"]  # it was a mere folder of that name


if __name__ == "__main__":
    _forget_working_folder()
    from flashlm_numba.cli.main import main

    main(prog_name="flashlm-numba")
