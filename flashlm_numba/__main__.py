"""The start of the command `flashlm-numba`, also by `python -m flashlm_numba`."""

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


def run() -> None:
    """Run the command line. Ctrl-C while its modules are imported ends the process without a traceback."""
    try:
        from flashlm_numba.cli.main import main
    except KeyboardInterrupt:
        sys.exit(130)
    main(prog_name="flashlm-numba")


if __name__ == "__main__":
    _forget_working_folder()
    run()
