"""Check whether the kernels are compiled, and compile them in a separate process if they are not.

Freshly compiled code and the same code loaded from the cache have been seen to differ in the last bit. The cause is not
established; perhaps Numba uses a helper already in memory in place of the copy inlined in its caller. A training
process therefore never compiles kernels. It loads those that training/precompile.py has put into the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import numba

from flashlm_numba.kernels import _jit
from flashlm_numba.system.process import run_apart


def ensure_compiled(note: Callable[[str], None]) -> None:
    """Compile the kernels into the cache if it is empty (one to two minutes); note receives a sentence first."""
    if numba.config.DISABLE_JIT or not _jit.cache_is_cold():
        return
    often = f"each time, since {_jit.cache_root()} cannot be written" if _jit.CACHE_IS_TEMPORARY else "once"
    note(f"Compiling the kernels ({often}; one to two minutes) ...")
    # this process's folder; it is temporary if the user's cache cannot be written
    run_apart(["-m", "flashlm_numba.training.precompile"], NUMBA_CACHE_DIR=str(_jit.CACHE_FOLDER.parent))
