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
    """Compile what the cache of kernels lacks (one to two minutes if it is empty); note receives a sentence first."""
    if numba.config.DISABLE_JIT:
        return
    lost = _jit.lost_files()
    if lost == []:
        return
    root = _jit.cache_root()
    if lost is not None:
        note(f"Compiled kernels in {_jit.CACHE_FOLDER} are missing or damaged ({len(lost)} of the files).")
        how = "anew"
    elif _jit.CACHE_IS_TEMPORARY:
        how = f"each time, since {root} cannot be written; one to two minutes"
    elif _jit.CACHE_FOLDER.parent != root:
        how = f"once, into {_jit.CACHE_FOLDER.parent}, since {root} cannot be written; one to two minutes"
    else:
        how = "once; one to two minutes"
    note(f"Compiling the kernels ({how}) ...")
    _jit.remove_damaged()
    # this process's folder, which is a temporary one if the user's cache cannot be written
    run_apart(["-m", "flashlm_numba.training.precompile"], NUMBA_CACHE_DIR=str(_jit.CACHE_FOLDER.parent))
