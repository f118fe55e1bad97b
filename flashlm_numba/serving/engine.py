"""The engine: worker threads that run the steps of many texts, a few of them at the same time, the others in a queue.

A worker runs one step of a text, gives the text back and takes the next one, so that all texts advance at the same
speed. While no other text is ready it stays with its own. A step is what two milliseconds of compiled code give, or a
token. Where texts advance together (model/together.py) there is one worker: the first text of a round computes the
tokens of all.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class QueueFull(Exception):
    """There is no place for another text."""


def _nowhere(result: Any) -> None:
    """Take a result that nobody waits for."""


class Job:
    """The steps of one text, to be run by an engine.

    steps : an iterator; each `next` is a step, and its result is passed on unless it is None
    deliver : called in a worker thread with each result; at the end with None, or with the exception that ended it. It
        is not called after the job was cancelled.
    """

    def __init__(self, steps: Iterator[Any], deliver: Callable[[Any], object]) -> None:
        self.steps, self.deliver = steps, deliver
        self.cancelled = False

    def run_step(self) -> bool:
        """Run one step. Returns whether there may be another one; if not, what the job holds is freed: a worker keeps
        its last job until the next one comes.
        """
        if self.cancelled:
            self._free()
            return False
        try:
            result = next(self.steps)
        except StopIteration:
            result = None
        except Exception as error:  # handed to whoever waits for the text
            result = error
        else:
            if result is None:
                return True
            self._deliver(result)
            return True
        self.steps = iter(())  # before the last result is taken, so that it is free when the request has ended
        self._deliver(result)
        self._free()
        return False

    def _free(self) -> None:
        self.steps, self.deliver = iter(()), _nowhere

    def _deliver(self, result: Any) -> None:
        if not self.cancelled:
            with contextlib.suppress(RuntimeError):  # the event loop that waited for it is closed
                self.deliver(result)


class Engine:
    """Runs jobs in worker threads.

    workers : threads;  streams : jobs that run at the same time;  places : jobs that wait until others have ended
    """

    def __init__(self, workers: int, streams: int, places: int) -> None:
        self._streams, self._places = streams, places
        self._lock = threading.Lock()  # of the following three
        self._closed = False
        self._running = 0
        self._waiting: deque[Job] = deque()
        self._ready: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"decode-{i}") for i in range(workers)]
        for thread in self._threads:
            thread.start()

    @property
    def running(self) -> int:
        """Jobs that run."""
        return self._running

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    def free(self) -> int:
        """Jobs that can be submitted now."""
        with self._lock:
            return self._free()

    def _free(self) -> int:
        return self._streams - self._running + self._places - len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Run these jobs, all or none. Raises QueueFull if there are fewer places."""
        with self._lock:
            if len(jobs) > self._free():
                raise QueueFull
            self._waiting.extend(jobs)
            self._start()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End these jobs: those that wait now, and those that run after the step that they are in."""
        for job in jobs:
            job.cancelled = True
        with self._lock:
            if any(job.cancelled for job in self._waiting):
                self._waiting = deque(job for job in self._waiting if not job.cancelled)

    def close(self) -> None:
        """End all threads after the steps that they are in."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
        for _ in self._threads:
            self._ready.put(None)
        for thread in self._threads:
            thread.join()

    def _start(self) -> None:
        """Let waiting jobs run while there are streams for them. The caller has the lock."""
        while self._waiting and self._running < self._streams:
            self._running += 1
            self._ready.put(self._waiting.popleft())

    def _work(self) -> None:
        while (job := self._ready.get()) is not None:
            while job.run_step() and not self._closed:
                if not self._ready.empty():
                    self._ready.put(job)
                    break
            else:
                with self._lock:
                    self._running -= 1
                    self._start()
