"""One thread count for everything that computes."""

from __future__ import annotations

import os

from flashlm_numba.system.errors import UserError


def available_cores() -> int:
    """Logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_threads() -> int:
    """Threads to use when nobody says how many: every core of this process, as far as Numba was started with them."""
    import numba

    return min(available_cores(), numba.config.NUMBA_NUM_THREADS)


def set_threads(threads: int | None = None) -> int:
    """Use this many threads in Numba and in NumPy's BLAS (default: available_threads); returns the number.

    SciPy's BLAS is pinned to one thread: Numba's threads call it side by side (kernels/_blas.py).
    Raises ValueError if threads is below 1 or above what Numba was started with, UserError if Numba has no such layer.
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
    except ValueError as error:  # several lines, of a threading layer that was asked for
        raise UserError(
            f"Numba cannot start its threads: {str(error).splitlines()[0].rstrip('.')}; "
            "unset NUMBA_THREADING_LAYER, or install that layer."
        ) from None
    ThreadpoolController().select(user_api="blas").limit(limits=threads)
    _blas.pin_to_one_thread()
    return threads
