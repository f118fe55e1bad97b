"""What a long command shows while it works: the one hook for it, and what the command line hangs there.

In a terminal that is a progress bar, elsewhere a plain line at times. Everything goes to standard error, so that
results on standard output can be piped.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

Note = Callable[[str], None]  # shows a line to the user

PLAIN_SECONDS = 20.0  # between lines where there is no terminal
WIDE = 130  # columns of a terminal that everything about a step fits into


def duration(seconds: float) -> str:
    """Hours, minutes and seconds in a few characters.

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
    """
    >>> plural(1, "document"), plural(2300, "document")
    ('1 document', '2,300 documents')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def say(line: str) -> None:
    """A line on standard error; whoever read it may have gone (a closed terminal, `| head`): the work goes on."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def peak_rss_mb() -> float | None:
    """Largest resident memory of this process so far, in MB (1e6 bytes); None on Windows."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1e-6 if sys.platform == "darwin" else 1024e-6)


class Progress:
    """The hook that long work shows itself to; this one shows nothing. A notebook's overrides what it wants to see."""

    def note(self, text: str) -> None:
        """A line of text, for people."""

    @contextlib.contextmanager
    def steps(self, total: int, done: int) -> Iterator[None]:
        """Inside, a run trains from the step after `done` up to `total`."""
        yield

    def step(self, line: dict[str, Any], seconds_left: float) -> None:
        """A step is done: its line of metrics.jsonl, and the time that is left."""

    @contextlib.contextmanager
    def tokens(self, label: str, total: int | None) -> Iterator[Progress]:
        """Inside, `total` tokens (None: unknown) are gone through; label says for what."""
        yield self

    def advance(self, count: int) -> None:
        """So many more tokens are done."""

    def stopping(self) -> None:
        """A signal asks to stop, and the step is finished first; called by the signal's handler, so without print."""


class Display(Progress):
    """Notes and one progress bar at a time, on standard error."""

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
                self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)

    def stopping(self) -> None:
        """Say that the step is finished first."""
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nFinishing the step and saving; once more to stop without saving.\n")

    @contextlib.contextmanager
    def steps(self, total: int, done: int) -> Iterator[None]:
        """A bar over the steps of a run; move it with `step`."""
        self._start("step", total, done)
        try:
            yield
        finally:
            self._stop()

    def step(self, line: dict[str, Any], seconds_left: float) -> None:
        """Show a step from its line of metrics.jsonl and the time that is left."""
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
        """A bar over tokens (total None: unknown); move it with `advance`."""
        self._start(label, total or 0, 0)
        try:
            yield self
        finally:
            self._stop()

    def advance(self, count: int) -> None:
        """Count tokens as done."""
        self._done += count
        self._update(f"{self._done:,} tokens", force=False)

    def _start(self, label: str, total: int, done: int) -> None:
        self._total, self._done, self._label = total, done, label
        self._last = time.monotonic()
        if sys.stderr.isatty():
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


TERMINAL = Display()  # what a command shows unless it is told otherwise
