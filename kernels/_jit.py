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
- Allocate nothing, and assign arrays element by element: x[i] = y[j] ends with "NRT required but not enabled".
- A jitclass cannot be cached (#1681).
- A call from Python with 16 fields costs about 3 microseconds: negligible per step, but measurable per decoded token.

A prange index is unsigned and becomes a float when mixed with signed integers; use np.int64(index).
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
from numba.core.codegen import get_host_cpu_features

from flashlm_numba.kernels import _cache
from flashlm_numba.kernels._arm_features import arm_features
from flashlm_numba.kernels._entry import Region

# fastmath=True would also assume that no NaN and no infinity occurs and delete the checks for them (np.isnan
# returns False). These flags only let LLVM vectorise reductions and fuse multiply-adds.
FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}
# Without "reassoc", which would merge the two-constant range reduction of exp, or a compensated sum, into one step.
EXACT = FASTMATH - {"reassoc"}


def numba_features() -> str:
    """Features that Numba compiles for, separated by commas: this processor's, unless Numba is configured otherwise."""
    text = numba.config.CPU_FEATURES
    return get_host_cpu_features() if text is None else text


def target_features() -> set[str]:
    """Features that the kernels may use, such as "+avx2": Numba's, and on an Arm processor those that it misses."""
    return set(numba_features().split(",")) | (arm_features() if numba.config.CPU_FEATURES is None else set())


def _complete() -> str:
    """First part of the names of the files that mark what is compiled, for one processor."""
    processor = numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name(), ",".join(sorted(target_features()))
    return f"complete-{hashlib.sha256(' '.join(processor).encode()).hexdigest()[:16]}"


COMPLETE = _complete()
WHOLE = "all"  # the part of the kernels that is all of them


def source_hash(folder: Path | None = None) -> str:
    """Hash of the kernels' sources: 16 hexadecimal digits over the name and text of every .py file in folder."""
    digest = hashlib.sha256()
    for path in sorted((folder or Path(__file__).resolve().parent).glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def folder_name() -> str:
    """Name of the cache folder, a hash of the kernels' sources and the compiler, so that versions do not mix."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    # Numba's cache tells processors apart by the features that it knows
    unknown = sorted(target_features() - set(numba_features().split(",")))
    parts = " ".join([source_hash(), python, numba.__version__, llvmlite.__version__, *unknown])
    return f"kernels-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"


def cache_root() -> Path:
    """Parent folder of the cache of compiled kernels: NUMBA_CACHE_DIR, or the user's cache folder."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    return Path(given).absolute() if given else _cache.user_root()


def _usable(folder: Path) -> bool:
    """Whether only this user may write to folder, since Numba's cache contains pickles, and it can hold the kernels.

    A complete cache need not be writable, and may be root's, as in a read-only image.
    """
    if _cache.is_writable(folder):
        return _cache.is_private(folder)
    return _cache.is_private(folder, or_roots=True) and _lost(folder, WHOLE) == []


def cache_folder() -> Path:
    """Folder of the compiled kernels, named by a hash of their sources and the compiler.

    Numba detects a change in the file of the cached function, but not in a helper of another file or in a flag of this
    file. One folder per version of the sources rules out stale kernels, and all installations of a version share it. If
    cache_root cannot be used, this is in the user's folder among the temporary ones; if that cannot be used either, it
    is for this process only.
    """
    folder = cache_root() / folder_name()
    if _usable(folder):
        return folder
    root = _cache.temporary_root()
    if root is not None and _cache.is_writable(root) and _cache.is_private(root) and _usable(root / folder.name):
        return root / folder.name
    try:
        temporary = Path(tempfile.mkdtemp(prefix="flashlm-numba-"))
    except OSError as error:
        why = "no folder for the compiled kernels can be written, so set NUMBA_CACHE_DIR to one that can"
        raise OSError(error.errno, why, str(cache_root())) from None
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    (temporary / folder.name).mkdir(mode=0o700)
    return temporary / folder.name


def _lost(folder: Path, part: str) -> list[Path] | None:
    return _cache.lost_files(folder / f"{COMPLETE}-{part}", folder)


CACHE_FOLDER = cache_folder()
# if so, the next process compiles everything again
CACHE_IS_TEMPORARY = CACHE_FOLDER.parent not in (cache_root(), _cache.temporary_root())


def lost_files(part: str) -> list[Path] | None:
    """The compiled kernels that were in the cache with this part of them, and are missing or damaged.

    None if flashlm_numba.training.precompile has never compiled this part.
    """
    return _lost(CACHE_FOLDER, part)


def is_compiled(part: str) -> bool:
    """Whether all kernels of this part are in the cache, undamaged."""
    return lost_files(part) == []


def mark_compiled(part: str) -> None:
    """Note that all kernels of this part are in the cache, once nothing is written there any more."""
    _cache.write_mark(CACHE_FOLDER / f"{COMPLETE}-{part}", CACHE_FOLDER)


def remove_damaged() -> None:
    """Delete the damaged files of the cache, which are then compiled anew."""
    _cache.remove_damaged(CACHE_FOLDER)


_new_cache = _cache.cache_for(CACHE_FOLDER)


def _njit(cache: bool = False, **flags: Any) -> Callable[[Callable], Any]:
    def decorate(function: Callable) -> Any:
        # error_model="numpy", because the default's zero-division check prevents vectorising 1 / (1 + exp).
        # _nrt=False, because kernels allocate no array: without it, every helper counts references to its arrays,
        # which takes a tenth of a decoded token. A helper that returns a part of an array must be a `view`.
        made = numba.njit(error_model="numpy", nogil=True, _nrt=False, **flags)(function)
        if cache and made is not function:  # without a compiler it is the function itself
            made._cache = _new_cache(function)
        return made

    return decorate


_parallel = _njit(parallel=True, cache=True, fastmath=FASTMATH)


def kernel(function: Callable) -> Any:
    """Compile a region over threads; arguments are outputs, scratch, saved values, inputs, scalars.

    Never raise or assert inside a prange, because Numba then runs the loop serially. Never enter a region for
    microseconds of work. Only Python can call it, since _entry.Region decides whether and when a thread may enter.
    """
    compiled = _parallel(function)
    return compiled if numba.config.DISABLE_JIT else Region(compiled)


# A serial entry point, called from Python.
serial_kernel = _njit(cache=True, fastmath=FASTMATH)
# A serial entry point whose floating-point operations must keep their order.
exact_kernel = _njit(cache=True, fastmath=EXACT)
# A row or tile helper, which only kernels call; Numba compiles it into its callers.
helper = _njit(fastmath=FASTMATH)
# A helper that returns a part of an array. Numba copies it into its callers; no arithmetic belongs in it.
view = _njit(fastmath=FASTMATH, inline="always")
# A helper whose floating-point operations must keep their order.
exact_helper = _njit(fastmath=EXACT)
# A helper that rounds every operation separately, as NumPy does, without fused multiply-adds.
strict_helper = _njit(fastmath=False)
