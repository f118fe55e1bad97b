"""The decorators of every kernel: which compiler flags, why, and where compiled code is cached.

Arrays that travel together are a NamedTuple, so that no function takes more than twelve arguments. What holds for them
(seen with Numba 0.68; numbers are of its issue tracker):

- One level only: a tuple inside a tuple fails in prange (#5703). At most 100 fields.
- The class stands at module level, for the cache.
- The body of a parallel function never stores through a field, nor through a name that was bound to one: the store can
  vanish without a word (#5872, #7135, #10338). A helper that it calls may. So a prange body only calls a helper.
  tests/kernels/test_signatures.py looks for such stores and for such neighbours, and counts arguments.
- Two prange loops never follow one another: Numba fuses them, without a barrier between, where their bodies only call
  helpers, since it does not see that one needs what the other wrote. One prange inside a loop over the halves is safe.
- No cached kernel closes over another dispatcher, since its key in the cache would change with every process. A choice,
  such as the trunk's mixer, is a helper made by a factory, and a short kernel at module level that calls it.
- A jitclass cannot be cached (#1681).
- A call from Python costs some 3 microseconds for 16 fields: nothing beside a step, measurable beside a decoded token.

A prange index is unsigned, and mixed with signed integers it becomes a float: np.int64(index).
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
from numba.core.codegen import get_host_cpu_features
from platformdirs import user_cache_dir

# fastmath=True would also assume that no NaN and no infinity occurs, and then delete the checks for them
# (np.isnan returns False). These let LLVM vectorise reductions and fuse multiply-adds, and nothing else.
FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}
# Without "reassoc", which folds the two-constant range reduction of exp, or a compensated sum, into one step.
EXACT = FASTMATH - {"reassoc"}


def target_features() -> set[str]:
    """What Numba compiles for, like "+avx2": this processor's features, unless its configuration says otherwise."""
    text = numba.config.CPU_FEATURES
    return set((get_host_cpu_features() if text is None else text).split(","))


def _complete() -> str:
    """Name of the file that marks a cache with every kernel in it: for one processor and one folder of sources.

    Numba keeps what it compiled by the sources' folder, so a second checkout finds nothing of the first one's.
    """
    processor = numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name(), ",".join(sorted(target_features()))
    parts = " ".join([*processor, str(Path(__file__).parent)])
    return f"complete-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"


COMPLETE = _complete()


def source_hash(folder: Path | None = None) -> str:
    """Hash of the kernels' sources: 16 hexadecimal digits over the name and text of every .py file in folder."""
    digest = hashlib.sha256()
    for path in sorted((folder or Path(__file__).resolve().parent).glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def folder_name() -> str:
    """Name of the cache's folder: for one text of the kernels, and one compiler, whose files others would replace."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    parts = " ".join([source_hash(), python, numba.__version__, llvmlite.__version__])
    return f"kernels-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"


def _writable(folder: Path) -> bool:
    """Whether folder can be made and written, and is ours: Numba's cache is pickle, so nobody else may write it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if hasattr(os, "getuid"):
            status = folder.stat()
            return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        return True
    except OSError:
        return False


def cache_root() -> Path:
    """Where the cache of compiled kernels belongs: NUMBA_CACHE_DIR, or the user's cache folder."""
    return Path(os.environ.get("NUMBA_CACHE_DIR") or user_cache_dir("flashlm-numba", appauthor=False))


def cache_folder() -> Path:
    """Folder of the compiled kernels, keyed by their sources and the compiler.

    Numba notices a change of the cached function's own file only, not of a helper in another file or of a flag
    here; a folder for each text of them makes a stale kernel impossible. Where cache_root cannot be written, a folder
    for this process only is used.
    """
    folder = cache_root() / folder_name()
    if _writable(folder):
        return folder
    temporary = Path(tempfile.mkdtemp(prefix="flashlm-numba-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    (temporary / folder.name).mkdir(mode=0o700)
    return temporary / folder.name


CACHE_FOLDER = cache_folder()
CACHE_IS_TEMPORARY = CACHE_FOLDER.parent != cache_root()  # everything is compiled again in the next process


def cache_is_cold() -> bool:
    """Whether the cache was not filled yet by flashlm_numba.training.precompile (which takes a minute)."""
    return not (CACHE_FOLDER / COMPLETE).exists()


def _njit(**flags: Any) -> Callable[[Callable], Any]:
    def decorate(function: Callable) -> Any:
        # Numba reads CACHE_DIR when a function is decorated; restoring it leaves other packages' caches alone.
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(CACHE_FOLDER)
        try:
            # error_model="numpy": the default model's zero-division check keeps 1 / (1 + exp) from vectorising
            return numba.njit(error_model="numpy", nogil=True, **flags)(function)
        finally:
            numba.config.CACHE_DIR = before

    return decorate


# A region over threads: outputs, scratch, saved values, inputs, scalars. Never raise or assert inside a prange
# (Numba then runs the loop serially), never enter one for work of a few microseconds or in a forked child.
kernel = _njit(parallel=True, cache=True, fastmath=FASTMATH)
# A serial entry point, called from Python.
serial_kernel = _njit(cache=True, fastmath=FASTMATH)
# A serial entry point whose floating-point operations must keep their order.
exact_kernel = _njit(cache=True, fastmath=EXACT)
# A row or tile helper, called from kernels only: compiled into its callers.
helper = _njit(fastmath=FASTMATH)
# A helper whose floating-point operations must keep their order.
exact_helper = _njit(fastmath=EXACT)
# A helper whose every operation is rounded by itself, as NumPy's are: no multiplication fused with an addition.
strict_helper = _njit(fastmath=False)
