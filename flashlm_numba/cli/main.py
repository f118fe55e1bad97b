"""The command line: the group of commands, which reports each error as one sentence.

    flashlm-numba prepare [SOURCE] --out DIR
    flashlm-numba train [DATA] --head tree --minutes 20 --out RUN
    flashlm-numba plot RUN... --out FILE
    flashlm-numba eval RUN [DATA]
    flashlm-numba generate RUN --prompt TEXT
    flashlm-numba serve RUN
    flashlm-numba info RUN
    flashlm-numba export RUN FILE
    flashlm-numba export RUN --hub DIR
    flashlm-numba push DIR USER/NAME
    flashlm-numba import FOLDER OUT
    flashlm-numba compress RUN FILE OUT
    flashlm-numba decompress RUN FILE OUT
    flashlm-numba doctor

This module imports only click. The numerical packages take a second to load, and `--help` must not wait for them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import click

from flashlm_numba import __version__
from flashlm_numba.cli import commands
from flashlm_numba.system.display import TERMINAL, say
from flashlm_numba.system.errors import Stopped, UserError
from flashlm_numba.system.paths import SHOWN
from flashlm_numba.system.streams import discard_output, open_standard_streams

# standard output on a full disk, a terminal that is gone, opened for reading, on a file that may not grow
_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF, errno.EFBIG)
_LAYERS = ("default", "tbb", "omp", "workqueue", "safe", "threadsafe", "forksafe")


class _Commands(click.Group):
    """A group that reports a UserError as one sentence on standard error, with exit status 1."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run a command, whatever became of the standard streams."""
        open_standard_streams()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors=SHOWN)  # a name of a file that the terminal cannot show is escaped
        with _sentences_for_warnings():
            return super().main(*arguments, **options)

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Parse the options before the command's name. Ctrl-C ends as it does later; click's own status would be 1."""
        try:
            return super().make_context(*arguments, **options)
        except KeyboardInterrupt:
            say("Stopped.")
            raise click.exceptions.Exit(130) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Stopped as error:
            say(str(error))
            ctx.exit(130)
        except UserError as error:
            say(f"Error: {error}")
            ctx.exit(1)
        except KeyboardInterrupt:
            say("")
            say("Stopped.")
            ctx.exit(130)
        except BrokenPipeError:  # the reader of the pipe has exited, as in `generate | head`
            discard_output(sys.stdout)
            ctx.exit(1)
        except MemoryError as error:
            say(f"Error: There is not enough memory ({error}); close other programs, or use a smaller model.")
            ctx.exit(1)
        except OSError as error:
            if error.filename is not None:  # a path that is too long, or belongs to another user
                say(f"Error: {error.filename} cannot be used: {error.strerror}; check the path.")
                ctx.exit(1)
            if error.errno not in _OUTPUT_ERRORS:
                raise
            discard_output(sys.stdout)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                say("Error: The output cannot be written because no space is left.")
            else:
                say(f"Error: The output cannot be written: {error.strerror}; check where standard output goes.")
            ctx.exit(1)


@contextlib.contextmanager
def _sentences_for_warnings() -> Iterator[None]:
    """Show a warning of this program as a sentence, without the file and line of the code that gave it."""
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if category.__module__.startswith("flashlm_numba."):
            TERMINAL.note(f"Warning: {message}")
        else:
            before(message, category, *place, **options)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="flashlm-numba")
def main() -> None:
    """Train and run a 13.6M-parameter ternary-weight language model on a CPU.

    \b
    The first two commands to type:
      flashlm-numba train --minutes 20 --out my-run
      flashlm-numba generate my-run --prompt "The people"
    """
    _check_environment()


for command in commands.ALL:
    main.add_command(command)


def _check_environment() -> None:
    """Raise UserError for environment variables that Numba rejects; Numba shows a traceback or blames --threads."""
    threads, layer = os.environ.get("NUMBA_NUM_THREADS"), os.environ.get("NUMBA_THREADING_LAYER")
    if threads and not (threads.isascii() and threads.isdecimal() and int(threads) > 0):
        raise UserError(
            f"The variable NUMBA_NUM_THREADS must be a number of threads, got {threads!r}; correct or unset it."
        )
    if layer and layer.lower() not in _LAYERS:
        raise UserError(
            f"The variable NUMBA_THREADING_LAYER must be one of {', '.join(_LAYERS)}, got {layer!r}; correct or "
            "unset it."
        )
