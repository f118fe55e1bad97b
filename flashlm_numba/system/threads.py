"""One thread count for Numba, NumPy and SciPy."""

from __future__ import annotations

import math
import os
import threading

from flashlm_numba.system.cpu_quota import cpu_quota
from flashlm_numba.system.errors import UserError

_chosen: tuple[int, ...] = ()  # the number given to set_threads, in a tuple of its own per call
_local = threading.local()  # adopted: the tuple that this Python thread has adopted


def available_cores() -> int:
    """Logical cores that this process may use: those it is bound to, limited to its CPU quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else min(cores, max(1, math.ceil(quota)))


def available_threads() -> int:
    """The default number of threads: every core of this process, limited to the threads that Numba started with."""
    import numba

    return min(available_cores(), numba.config.NUMBA_NUM_THREADS)


def set_threads(threads: int | None = None) -> int:
    """Use this many threads in Numba and in NumPy's BLAS (default: available_threads). Returns the number.

    Numba counts for each Python thread; the others adopt the number with their next call of a head or a model. SciPy's
    BLAS gets one thread, because several Numba threads call it at the same time (kernels/_blas.py).
    Raises ValueError if threads is below 1 or above the number that Numba started with, and UserError if Numba cannot
    load its threading layer.
    """
    import numba
    from threadpoolctl import ThreadpoolController

    from flashlm_numba.kernels import _blas

    if threads is None:
        threads = available_threads()
    if not 1 <= threads <= numba.config.NUMBA_NUM_THREADS:
        raise ValueError(
            f"threads must be between 1 and {numba.config.NUMBA_NUM_THREADS} on this machine, got {threads}"
        )
    try:
        numba.set_num_threads(threads)
    except ValueError as error:  # several lines, about the requested threading layer
        raise UserError(
            f"Numba cannot start its threads: {str(error).splitlines()[0].rstrip('.')}; "
            "unset NUMBA_THREADING_LAYER, or install that threading layer."
        ) from None
    ThreadpoolController().select(user_api="blas").limit(limits=threads)
    _blas.pin_to_one_thread()
    global _chosen
    _chosen = _local.adopted = (threads,)
    return threads


def adopt_threads() -> None:
    """Let this Python thread use as many threads as set_threads chose last, in whichever Python thread.

    After that, numba.set_num_threads changes the number for this Python thread alone, until the next set_threads.
    """
    chosen = _chosen
    if chosen is not getattr(_local, "adopted", ()):
        import numba

        numba.set_num_threads(*chosen)
        _local.adopted = chosen
