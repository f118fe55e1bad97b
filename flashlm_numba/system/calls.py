"""What calls need that may run in several Python threads at the same time: scratch, turns and refusals.

The kernels release the interpreter's lock, so two calls that write to the same arrays spoil each other's results.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from flashlm_numba.system.threads import available_cores

Item = TypeVar("Item")


class Pool(Generic[Item]):
    """Scratch for calls in flight. Each call takes an item and gives it back when it ends.

    There are at most as many items as calls have been in flight at the same time, and at most one per core is kept.
    """

    def __init__(self) -> None:
        self._free: list[Item] = []  # a list's pop, append and remove are atomic
        self._kept = available_cores()

    @contextlib.contextmanager
    def item(self, fits: Callable[[Item], bool], make: Callable[[], Item]) -> Iterator[Item]:
        """Lend an item that no other call has: a free one that fits, else a new one. Items that do not fit are freed.

        fits : whether an item serves this call;  make : makes one that does
        """
        found = self._take(fits)
        item = make() if found is None else found
        try:
            yield item
        finally:
            if len(self._free) < self._kept:
                self._free.append(item)

    def _take(self, fits: Callable[[Item], bool]) -> Item | None:
        with contextlib.suppress(IndexError):
            while True:
                item = self._free.pop()
                if fits(item):
                    return item
        return None

    @contextlib.contextmanager
    def again(self, item: Item) -> Iterator[bool]:
        """Take an item that an earlier call has given back. Yields False if another call has it, or it was freed."""
        try:
            self._free.remove(item)
        except ValueError:
            yield False
            return
        try:
            yield True
        finally:
            self._free.append(item)

    def clear(self) -> None:
        """Free the items that no call has."""
        self._free.clear()

    @property
    def free(self) -> tuple[Item, ...]:
        """The items that no call has."""
        return tuple(self._free)


class Resettable(Protocol):
    """What holds a lock, or calls in flight."""

    def reset(self) -> None:
        """Forget them, in a forked child, which lacks the threads that had them."""


_created: weakref.WeakSet[Resettable] = weakref.WeakSet()


def call_after_fork(item: Resettable) -> None:
    """Reset an item in every forked child."""
    _created.add(item)


def _after_fork() -> None:
    """Of the calls in flight, a forked child goes on with none but its own thread's, which started the fork."""
    for lock in list(_created):
        lock.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class OneCall:
    """Refuses a call while another one is in flight.

    >>> updates = OneCall("busy")
    >>> with updates.alone(), updates.alone():
    ...     pass
    Traceback (most recent call last):
    RuntimeError: busy
    """

    def __init__(self, message: str) -> None:
        self.message = message
        self.reset()
        call_after_fork(self)

    def reset(self) -> None:
        """Forget the call in flight."""
        self._calls: list[object] = []  # the first is in flight

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Start a call. Raises RuntimeError with the message if there is another one."""
        calls, me = self._calls, object()
        try:
            calls.append(me)
            if calls[0] is not me:
                raise RuntimeError(self.message)
            yield
        finally:  # also after an interrupt anywhere above
            with contextlib.suppress(ValueError):
                calls.remove(me)


class Gate:
    """Lets any number of readers in, or one writer alone. Readers that come while a writer waits go after it."""

    def __init__(self) -> None:
        self.reset()
        call_after_fork(self)

    def reset(self) -> None:
        """Forget those inside."""
        self._changed = threading.Condition()
        self._readers: set[object] = set()
        self._writers: list[object] = []  # the first is inside, or waits until the readers have left

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Enter as a reader."""
        me = object()
        try:
            with self._changed:
                while self._writers:
                    self._changed.wait()
                self._readers.add(me)
            yield
        finally:  # also after an interrupt anywhere above
            with self._changed:
                self._readers.discard(me)
                self._changed.notify_all()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Enter as the writer."""
        me = object()
        try:
            with self._changed:
                self._writers.append(me)
                while self._readers or self._writers[0] is not me:
                    self._changed.wait()
            yield
        finally:
            with self._changed:
                with contextlib.suppress(ValueError):
                    self._writers.remove(me)
                self._changed.notify_all()
