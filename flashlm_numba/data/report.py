"""What `prepare` shows while it works, on standard error."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from flashlm_numba.system.display import in_terminal, plural, say
from flashlm_numba.system.paths import printable

if TYPE_CHECKING:
    from rich.console import Console


class Report:
    """Progress on standard error: a live line in a terminal, else an occasional line; nothing if `on` is False."""

    SILENCE = 30.0  # seconds between lines without a terminal

    def __init__(self, on: bool) -> None:
        self._on = on
        self._console: Console | None = None  # in a terminal
        self._live: Any = None
        self._started = self._said = time.monotonic()
        self._tokens_before = 0
        if on and in_terminal():
            from rich.console import Console

            self._console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

    def say(self, text: str) -> None:
        """Show a line."""
        if self._live is not None and self._console is not None:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._console.print(printable(text))
        elif self._on:
            say(text)

    def start(self, tokens: int = 0, total: int | None = None) -> None:
        """Begin to measure the rate, after `tokens` tokens of an expected total."""
        self._started = self._said = time.monotonic()
        self._tokens_before = tokens
        if self._console is None:
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._live = Progress(
            SpinnerColumn(),
            *([BarColumn()] if total else []),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._live.add_task("", total=total, status="reading")
        self._live.start()

    def status(self, documents: int, tokens: int) -> str:
        """Documents and tokens, and tokens per second since start()."""
        rate = (tokens - self._tokens_before) / max(time.monotonic() - self._started, 1e-9)
        return f"{plural(documents, 'document')}, {tokens:,} tokens, {rate:,.0f} tokens/s"

    def update(self, documents: int, tokens: int) -> None:
        """Show how far encoding is."""
        self.show(self.status(documents, tokens), tokens)

    def show(self, status: str, completed: int = 0) -> None:
        """Show what is going on: a terminal draws the newest status ten times a second, other places get few lines."""
        if self._live is not None:
            self._live.update(self._task, completed=completed, status=status)
        elif time.monotonic() - self._said >= self.SILENCE:
            self._said = time.monotonic()
            self.say(status)

    def stop(self) -> None:
        """Take the live line away."""
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()
            self._live = None
