"""Whether the kernels are compiled, and asking a process of its own to compile them.

Code that a process has just compiled and the same code loaded from the cache were seen to differ in the last bit. (Why
is not established; perhaps a helper already in memory is taken in place of the copy inside its caller.) A process that
trains therefore never compiles: it loads what training/precompile.py has put into the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import numba

from flashlm_numba.kernels import _jit
from flashlm_numba.system.process import run_apart


def ensure_compiled(note: Callable[[str], None]) -> None:
    """Fill the cache of compiled kernels if that was not done yet; note gets a sentence before (it takes a minute)."""
    if numba.config.DISABLE_JIT or not _jit.cache_is_cold():
        return
    often = f"each time, since {_jit.cache_root()} cannot be written" if _jit.CACHE_IS_TEMPORARY else "once"
    note(f"Compiling the kernels ({often}; one to two minutes) ...")
    # the folder of this process, which may be a temporary one where the user's cache cannot be written
    run_apart(["-m", "flashlm_numba.training.precompile"], NUMBA_CACHE_DIR=str(_jit.CACHE_FOLDER.parent))
