"""Deferred signals: a request to stop waits until the current work is finished."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def caught_signals(on_first: Callable[[], None]) -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list, so that the current work can finish; a second signal interrupts it.

    SIGHUP arrives when the terminal is closed. If it is ignored, as under nohup, it remains ignored. Outside the main
    thread the list stays empty, because Python handles signals only in the main thread.

    on_first : called by the handler of the first signal; it must not use print, which the signal may have interrupted
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
