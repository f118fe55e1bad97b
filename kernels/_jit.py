"""The decorators of every kernel: compiler flags with their reasons, and the cache of compiled code.

Arrays that are passed together form a NamedTuple, so that no function takes more than twelve arguments. These rules
apply to them (observed with Numba 0.68; the numbers are those of its issue tracker):

- Use one level only, because a tuple inside a tuple fails in prange (#5703). Use at most 100 fields.
- Define the class at module level, as the cache requires.
- Never store through a field in the body of a parallel function, nor through a name bound to one, because the store can
  be lost silently (#5872, #7135, #10338). A helper that it calls may store. A prange body therefore only calls a
  helper. tests/kernels/test_signatures.py finds such stores and counts arguments.
- Never let one prange loop follow another: where their bodies only call helpers, Numba fuses them without a barrier,
  since it does not see that one needs what the other wrote. One prange inside a loop over the halves is safe. The same
  test finds such neighbours.
- No cached kernel may close over another dispatcher, because its cache key would change with every process. For a
  choice, such as the trunk's mixer, a factory makes a helper, and a short kernel at module level calls it.
- A jitclass cannot be cached (#1681).
- A call from Python with 16 fields costs about 3 microseconds: negligible per step, but measurable per decoded token.

A prange index is unsigned and becomes a float when mixed with signed integers; use np.int64(index).
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

# fastmath=True would also assume that no NaN and no infinity occurs and delete the checks for them (np.isnan
# returns False). These flags only let LLVM vectorise reductions and fuse multiply-adds.
FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}
# Without "reassoc", which would merge the two-constant range reduction of exp, or a compensated sum, into one step.
EXACT = FASTMATH - {"reassoc"}


def target_features() -> set[str]:
    """Features that Numba compiles for, such as "+avx2": this processor's, unless Numba is configured otherwise."""
    text = numba.config.CPU_FEATURES
    return set((get_host_cpu_features() if text is None else text).split(","))


def _complete() -> str:
    """First part of the names of the files that mark what is compiled, for one processor and one folder of sources.

    Numba's cache depends on the folder of the sources, so a second checkout does not find the code of the first.
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
    """Name of the cache folder, a hash of the kernels' sources and the compiler, so that versions do not mix."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    parts = " ".join([source_hash(), python, numba.__version__, llvmlite.__version__])
    return f"kernels-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"


def _writable(folder: Path) -> bool:
    """Whether folder can be created and only this user may write to it, since Numba's cache contains pickles."""
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
    """Parent folder of the cache of compiled kernels: NUMBA_CACHE_DIR, or the user's cache folder."""
    return Path(os.environ.get("NUMBA_CACHE_DIR") or user_cache_dir("flashlm-numba", appauthor=False))


def cache_folder() -> Path:
    """Folder of the compiled kernels, named by a hash of their sources and the compiler.

    Numba detects a change in the file of the cached function, but not in a helper of another file or in a flag of this
    file. One folder per version of the sources rules out stale kernels. If cache_root cannot be written, this is a
    temporary folder for this process only.
    """
    folder = cache_root() / folder_name()
    if _writable(folder):
        return folder
    temporary = Path(tempfile.mkdtemp(prefix="flashlm-numba-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    (temporary / folder.name).mkdir(mode=0o700)
    return temporary / folder.name


CACHE_FOLDER = cache_folder()
CACHE_IS_TEMPORARY = CACHE_FOLDER.parent != cache_root()  # if so, the next process compiles everything again


def is_compiled(part: str) -> bool:
    """Whether flashlm_numba.training.precompile has compiled this part of the kernels into the cache."""
    return (CACHE_FOLDER / f"{COMPLETE}-{part}").exists()


def mark_compiled(part: str) -> None:
    """Note that all kernels of this part are in the cache, once nothing is written there any more."""
    (CACHE_FOLDER / f"{COMPLETE}-{part}").touch()


def _njit(**flags: Any) -> Callable[[Callable], Any]:
    def decorate(function: Callable) -> Any:
        # Numba reads CACHE_DIR when it decorates a function; restoring it leaves the caches of other packages alone.
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(CACHE_FOLDER)
        try:
            # error_model="numpy", because the default's zero-division check prevents vectorising 1 / (1 + exp)
            return numba.njit(error_model="numpy", nogil=True, **flags)(function)
        finally:
            numba.config.CACHE_DIR = before

    return decorate


# A region over threads; arguments are outputs, scratch, saved values, inputs, scalars. Never raise or assert inside a
# prange, because Numba then runs the loop serially. Never enter one for microseconds of work or in a forked child.
kernel = _njit(parallel=True, cache=True, fastmath=FASTMATH)
# A serial entry point, called from Python.
serial_kernel = _njit(cache=True, fastmath=FASTMATH)
# A serial entry point whose floating-point operations must keep their order.
exact_kernel = _njit(cache=True, fastmath=EXACT)
# A row or tile helper, which only kernels call; Numba compiles it into its callers.
helper = _njit(fastmath=FASTMATH)
# A helper whose floating-point operations must keep their order.
exact_helper = _njit(fastmath=EXACT)
# A helper that rounds every operation separately, as NumPy does, without fused multiply-adds.
strict_helper = _njit(fastmath=False)
