"""Compile kernels into the cache, in as many processes as there are cores: python -m ... [PART ...]

Without a part it compiles all of them. Each process takes one task after another (kernel_tasks.py), the longest first.
The process that shares them out prints a line `compiled DONE ALL` for every function, and marks the parts as compiled
when everything has ended. Numba writes a kernel's files under another name and then renames them, so that a process
that ends early leaves no half file.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Collection

from flashlm_numba.system.compiled import ALL, FOLLOW
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.memory import available_mb
from flashlm_numba.system.process import PYTHON, environment
from flashlm_numba.system.threads import available_cores
from flashlm_numba.training.kernel_tasks import TASKS

WORKER = "--tasks-from-standard-input"
FUNCTION, TASK = "function\n", "task\n"  # what such a process says when it has compiled one, or done one
SORRY = "The kernels could not be compiled"
PROCESS_MB = 700  # memory of a process; 500 were measured


# --- a process that compiles ---


def work() -> None:
    """Do the tasks that standard input names, one a line. Prints a line for every function and every task."""
    from numba.core import event

    from flashlm_numba.system.threads import set_threads

    class Reports(event.Listener):
        def on_start(self, event: event.Event) -> None:
            pass

        def on_end(self, event: event.Event) -> None:
            print(FUNCTION, end="", flush=True)

    event.register("numba:compile", Reports())
    set_threads(None)
    names: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(names,), daemon=True).start()
    while True:
        TASKS[names.get()].run()
        print(TASK, end="", flush=True)


def _read(names: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        names.put(line.rstrip("\n"))
    os._exit(0)  # the process that shares out the tasks has ended


# --- the process that shares out the tasks ---


class _Bar:
    """The functions compiled so far, over all processes."""

    def __init__(self, names: Collection[str]) -> None:
        self._lock = threading.Lock()
        self._done, self._total = 0, sum(TASKS[name].functions for name in names)
        self.add(0)

    def add(self, count: int) -> None:
        """So many functions more."""
        with self._lock:
            self._done += count
            with contextlib.suppress(OSError):  # nobody reads any more
                print("compiled", self._done, self._total, flush=True)


def worker_command() -> list[str]:
    """The command line of a process that compiles."""
    return [*PYTHON, "-m", "flashlm_numba.training.precompile", WORKER]


class _Worker(threading.Thread):
    """A process that compiles, and the thread that gives it tasks until none is left."""

    def __init__(self, names: deque[str], bar: _Bar) -> None:
        super().__init__(daemon=True)
        self._names, self._bar = names, bar
        self.failed: str | None = None  # what to tell the user
        self.process = subprocess.Popen(
            worker_command(),
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def run(self) -> None:
        """Give out tasks. If the process ends before its task, `failed` says why."""
        said: deque[str] = deque(maxlen=20)  # of its standard error
        listening = threading.Thread(target=lambda: said.extend(self.process.stderr or ()), daemon=True)
        listening.start()
        with contextlib.suppress(IndexError):  # no task is left
            while self._do(self._names.popleft()):
                pass
            status = self.process.wait()
            listening.join()
            self.failed = _reason(status, "".join(said))
            return
        self.process.kill()
        listening.join()

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        if self.ident is not None:
            self.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not written is not wanted
                    pipe.close()

    def _do(self, name: str) -> bool:
        left = TASKS[name].functions
        with contextlib.suppress(OSError):  # the process has ended, or the one that waits for this one
            print(name, file=self.process.stdin, flush=True)
            for line in self.process.stdout or ():
                if line == FUNCTION and left > 1:
                    self._bar.add(1)
                    left -= 1
                elif line == TASK:
                    self._bar.add(left)
                    return True
        return False


def _reason(status: int, said: str) -> str:
    """A sentence about a process that ended with this status and these last lines of standard error."""
    if status < 0:
        return (
            f"Signal {-status} ended a process that compiled the kernels; if memory ran out (a process needs up to "
            f"{PROCESS_MB:,} MB), free some, and start again."
        )
    last = said.strip().rpartition("\n")[2]
    return last if last.startswith(SORRY) else f"{SORRY}: {last or f'a process ended with status {status}'}."


def compile_parts(parts: Collection[str], *, follow: bool = False) -> None:
    """Compile these parts of the kernels and mark them. Raises UserError if a process fails.

    follow : give up when the parent of this process has ended
    """
    parent = os.getppid()
    names = [name for name, task in TASKS.items() if task.part in parts]
    names.sort(key=lambda name: -TASKS[name].seconds)
    free = available_mb()
    processes = min(available_cores(), len(names), len(names) if free is None else max(1, free // PROCESS_MB))
    bar, queue = _Bar(names), deque(names)
    workers = [_Worker(queue, bar) for _ in range(processes)]
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            if follow and os.getppid() != parent:
                raise KeyboardInterrupt
            for worker in workers:
                worker.join(0.05)
                if worker.failed is not None:
                    raise UserError(worker.failed)
    finally:
        for worker in workers:
            worker.end()
    from flashlm_numba.kernels import _jit

    for part in parts:
        _jit.mark_compiled(part)


def main(arguments: list[str]) -> None:
    """The command line of both processes."""
    try:
        if arguments == [WORKER]:
            work()
        else:
            parts = [part for part in arguments if part != FOLLOW]
            if not parts or ALL in parts:
                parts = [*dict.fromkeys(task.part for task in TASKS.values()), ALL]
            compile_parts(parts, follow=FOLLOW in arguments)
    except KeyboardInterrupt:  # the waiting process reports it
        raise SystemExit(130) from None
    except (OSError, MemoryError) as error:
        raise SystemExit(
            f"{SORRY}: {error}; free some space, or give Numba another folder with the variable NUMBA_CACHE_DIR."
        ) from None
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(sys.argv[1:])
