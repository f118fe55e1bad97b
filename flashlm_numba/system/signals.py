"""Signals that ask a program to stop, kept until it is ready for them."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def caught_signals(on_first: Callable[[], None]) -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list, so that the work at hand is finished; a second one ends at once.

    SIGHUP comes when the terminal is closed; where it is ignored, as under nohup, it stays so. Outside the main thread
    the list stays empty, since Python lets only that one handle signals.

    on_first : called by the handler of the first signal, so it must not use print, which may be what was interrupted
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def remember(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        on_first()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, remember) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
