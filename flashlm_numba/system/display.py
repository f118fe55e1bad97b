"""Progress of long commands: the hook that they report to, and the display that the command line uses.

In a terminal the display is a progress bar, elsewhere an occasional plain line. Everything goes to standard error, so
that results on standard output can be piped.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from flashlm_numba.system.paths import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

from flashlm_numba.system.streams import error_descriptor

Note = Callable[[str], None]  # shows a line to the user

PLAIN_SECONDS = 20.0  # between plain lines, without a terminal
WIDE = 130  # terminal columns from which all values of a step fit on one line


def duration(seconds: float) -> str:
    """A duration as a short text.

    >>> duration(9.6), duration(75), duration(7260)
    ('10s', '1m15s', '2h01m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


def plural(count: int, noun: str) -> str:
    """A count with its noun, in the plural unless count is 1.

    >>> plural(1, "document"), plural(2300, "document")
    ('1 document', '2,300 documents')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def say(line: str) -> None:
    """Print a line on standard error. The work continues if it cannot be written (a closed terminal, `| head`)."""
    if sys.stderr is not None:  # else print would use standard output
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream was closed
            print(printable(line), file=sys.stderr, flush=True)


def in_terminal() -> bool:
    """Whether standard error is a terminal; it may be closed, or None."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


def peak_rss_mb() -> float | None:
    """Peak resident memory of this process so far, in MB (1e6 bytes); None on Windows."""
    try:  # Linux: getrusage counts what the process was before it became this program, a copy of its parent
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024e-6
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1e-6 if sys.platform == "darwin" else 1024e-6)


class Progress:
    """The hook that long operations report to. This base class shows nothing; override the methods you need."""

    def note(self, text: str) -> None:
        """Show a line of text."""

    @contextlib.contextmanager
    def steps(self, total: int, done: int) -> Iterator[None]:
        """A context in which a run trains the steps after `done` up to `total`."""
        yield

    def shorten(self, total: int) -> None:
        """The run now ends at step `total`, earlier than it was told."""

    def step(self, line: dict[str, Any], seconds_left: float) -> None:
        """A step is done. line : its line of metrics.jsonl;  seconds_left : estimated time to the last step"""

    @contextlib.contextmanager
    def tokens(self, label: str, total: int | None) -> Iterator[Progress]:
        """A context in which `total` tokens (None: unknown) are processed; label names the operation."""
        yield self

    @contextlib.contextmanager
    def functions(self, label: str, total: int) -> Iterator[Progress]:
        """A context in which `total` functions are compiled; label names the operation."""
        yield self

    @contextlib.contextmanager
    def texts(self, label: str, total: int) -> Iterator[Progress]:
        """A context in which `total` texts are processed; label names the operation."""
        yield self

    def advance(self, count: int) -> None:
        """`count` more tokens, functions or texts are done."""

    def stopping(self) -> None:
        """A signal asks to stop after this step. The signal handler calls this method, so it must not use print."""


class Display(Progress):
    """Shows notes and one progress bar at a time, on standard error."""

    def __init__(self) -> None:
        self._progress: Bar | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._done = 0
        self._last = 0.0  # time of the last plain line

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def note(self, text: str) -> None:
        """Print a line."""
        if self._progress is not None:
            with contextlib.suppress(OSError):
                self._progress.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)

    def stopping(self) -> None:
        """Say that training stops after this step."""
        descriptor = error_descriptor()
        if descriptor is not None:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(descriptor, b"\nFinishing the step and saving; interrupt again to stop without saving.\n")

    @contextlib.contextmanager
    def steps(self, total: int, done: int) -> Iterator[None]:
        """Show a bar over the steps of a run; `step` advances it."""
        self._start("step", total, done)
        try:
            yield
        finally:
            self._stop()

    def shorten(self, total: int) -> None:
        """Show a bar over fewer steps."""
        self._total = total
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=total)

    def step(self, line: dict[str, Any], seconds_left: float) -> None:
        """Show a step's line of metrics.jsonl and the remaining time."""
        shares = line["shares"]
        label = "NLL of the sample" if "sampled" in line else "NLL"
        progress = (
            f"loss {line['loss']:.3f}  {label} {line['nll']:.3f}  {line['tokens_per_s']:,.0f} tokens/s  "
            f"{duration(seconds_left)} left"
        )
        time_by_part = f"head {shares['head']:.0%} trunk {shares['trunk']:.0%} optimizer {shares['optimizer']:.0%}"
        narrow = self._progress is not None and self._progress.console.width < WIDE
        text = progress + ("\n" if narrow else "  ") + time_by_part
        self._done = line["step"]
        self._update(text, force=line["step"] == self._total)

    @contextlib.contextmanager
    def tokens(self, label: str, total: int | None) -> Iterator[Display]:
        """Show a bar over `total` tokens (None: unknown); `advance` moves it."""
        self._start(label, total or 0, 0)
        try:
            yield self
        finally:
            self._stop()

    @contextlib.contextmanager
    def functions(self, label: str, total: int) -> Iterator[Display]:
        """Show a bar over the compilation of `total` functions; `advance` moves it."""
        self._start(label, total, 0, "functions")
        try:
            yield self
        finally:
            self._stop()

    @contextlib.contextmanager
    def texts(self, label: str, total: int) -> Iterator[Display]:
        """Show a bar over `total` texts; `advance` moves it."""
        self._start(label, total, 0, "texts")
        try:
            yield self
        finally:
            self._stop()

    def advance(self, count: int) -> None:
        """Add `count` tokens, functions or texts to those done."""
        self._done += count
        self._update(f"{self._done:,} tokens" if self._noun == "tokens" else self._noun, force=False)

    def _start(self, label: str, total: int, done: int, noun: str = "tokens") -> None:
        self._total, self._done, self._label, self._noun = total, done, label, noun
        self._last = time.monotonic()
        if in_terminal():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            console = Console(stderr=True)
            columns = (
                TextColumn("{task.description}"),
                MofNCompleteColumn(),
                BarColumn(bar_width=16 if console.width >= WIDE else 6),
                TextColumn("{task.fields[text]}"),
            )
            self._progress = Bar(*columns, console=console, refresh_per_second=4)
            self._progress.start()
            self._task = self._progress.add_task(label, total=total or None, completed=done, text="")

    def _update(self, text: str, force: bool) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._done, text=text)
        elif force or time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            of = f"/{self._total:,}" if self._total else ""
            say(f"{self._label} {self._done:,}{of}  {text}")

    def _stop(self) -> None:
        if self._progress is not None:
            with contextlib.suppress(OSError):
                self._progress.stop()
            self._progress = None


TERMINAL = Display()  # the default of the commands
