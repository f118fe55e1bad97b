"""What Python does before it enters a region over threads.

Numba has three threading layers, and two of them have limits that end the process (NUMBA_THREADING_LAYER chooses one):

- workqueue: two regions must not run at the same time, so the Python threads of this process take turns.
- omp with GNU's OpenMP: a child that was forked after Numba had started its threads must not enter a region, so the
  call is refused. A child that was forked earlier starts threads of its own.

tbb has neither limit.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from typing import Any

import numba

FORKED = (
    "This process was forked after Numba had started its threads, and GNU OpenMP cannot run in such a child. Start the "
    'process with multiprocessing.get_context("spawn"), or fork before the first computation, or start Python with '
    "the environment variable NUMBA_THREADING_LAYER=workqueue."
)

_ready = False  # whether this process may enter regions; False until the first one, and in a forked child
_forked = False  # whether Numba's threads were started by a process of which this one is a fork
_turn: threading.Lock | None = None  # held during a region, under workqueue
_starting = threading.Lock()


def _layer() -> str:
    """Numba's threading layer, or "" before it has started its threads."""
    try:
        return numba.threading_layer()
    except ValueError:
        return ""


def _after_fork() -> None:
    global _ready, _forked, _turn, _starting
    _ready, _forked, _turn = False, _forked or bool(_layer()), None
    _starting = threading.Lock()  # the old one may be held by a thread that the child does not have


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _start() -> None:
    """Find out what regions need in this process. Raises RuntimeError if it must not enter any."""
    global _ready, _turn
    numba.get_num_threads()  # starts Numba's threads
    layer = _layer()
    if _forked and layer == "omp" and importlib.import_module("numba.np.ufunc.omppool").openmp_vendor == "GNU":
        raise RuntimeError(FORKED)
    with _starting:
        if not _ready:
            _turn = threading.Lock() if layer == "workqueue" else None
            _ready = True


class Region:
    """A compiled function over threads, as Python calls it. Its other attributes are those of Numba's dispatcher."""

    def __init__(self, compiled: Any) -> None:
        functools.update_wrapper(self, compiled)
        self.compiled = compiled

    def __call__(self, *arguments: Any) -> Any:
        """Call the function, after the turns of other threads where they must not run together."""
        if not _ready:
            _start()
        if _turn is None:
            return self.compiled(*arguments)
        with _turn:
            return self.compiled(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.compiled, name)
