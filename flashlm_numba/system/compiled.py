"""Check which kernels are compiled, and compile the missing ones in separate processes.

Freshly compiled code and the same code loaded from the cache have been seen to differ in the last bit. The cause is not
established; perhaps Numba uses a helper already in memory in place of the copy inlined in its caller. A training
process therefore never compiles kernels. It loads those that training/precompile.py has put into the cache.

The kernels have parts, such as the trunk's forward pass or a head, and a command names the parts that it needs.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path
from types import TracebackType

import numba

from flashlm_numba.kernels import _cache, _jit
from flashlm_numba.system.display import Progress, plural
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.process import PYTHON, environment

ALL = _jit.WHOLE  # instead of names of parts
FOLLOW = "--end-with-parent"  # even if the parent is killed


def lost_files(parts: Collection[str]) -> dict[str, list[Path] | None]:
    """What _jit.lost_files says of each part. Most files belong to several of them, and each is read once: 20 MB."""

    @functools.cache
    def is_lost(path: Path) -> bool:
        return _cache.read_sealed(path) is None

    found: dict[str, list[Path] | None] = {}
    for part in parts:
        names = _cache.read_sealed(_jit.CACHE_FOLDER / f"{_jit.COMPLETE}-{part}")
        paths = [_jit.CACHE_FOLDER / name for name in names.decode().split("\n")] if names else []
        found[part] = [path for path in paths if is_lost(path)] if names else None
    return found


class Compilation:
    """The compilation of some parts of the kernels, which starts at once if they are not compiled already.

    parts : names of parts, those of training/precompile.py, or ALL
    As a context manager it ends the processes on the way out if they have not been waited for.
    """

    def __init__(self, parts: Collection[str], progress: Progress) -> None:
        self._progress = progress
        self._process: subprocess.Popen[str] | None = None
        found = {} if numba.config.DISABLE_JIT else lost_files(parts)
        missing = [part for part, lost in found.items() if lost != []]
        if not missing:
            return
        self._lost = len({path for part in missing for path in found[part] or ()})
        _jit.remove_damaged()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  a pipe that nobody reads yet could fill
        self._process = subprocess.Popen(
            [*PYTHON, "-m", "flashlm_numba.training.precompile", FOLLOW, *missing],
            # this process's folder, which is a temporary one if the user's cache cannot be written
            env=environment(NUMBA_CACHE_DIR=str(_jit.CACHE_FOLDER.parent)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def wait(self) -> None:
        """Show a bar until everything is compiled. Raises UserError if a process fails."""
        if self._process is None:
            return
        root = _jit.cache_root()
        if self._lost:
            self._progress.note(
                f"Compiled kernels in {_jit.CACHE_FOLDER} are missing or damaged ({plural(self._lost, 'file')})."
            )
            how = "anew"
        elif _jit.CACHE_IS_TEMPORARY:
            how = f"each time, since {root} cannot be written"
        elif _jit.CACHE_FOLDER.parent != root:
            how = f"once, into {_jit.CACHE_FOLDER.parent}, since {root} cannot be written"
        else:
            how = "once"
        self._progress.note(f"Compiling the kernels ({how}) ...")
        lines = (line.split() for line in self._process.stdout or ())
        reports = ((int(line[1]), int(line[2])) for line in lines if line[:1] == ["compiled"])
        before, total = next(reports, (0, 0))
        with self._progress.functions("compiling", total) as bar:
            for done, _ in reports:
                bar.advance(done - before)
                before = done
        status = self._process.wait()
        if status:
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise UserError(last or f"The compilation of the kernels ended with status {status}; start it again.")
        self.close()

    def close(self) -> None:
        """End the processes if they still run."""
        if self._process is None:
            return
        process, self._process = self._process, None
        if process.poll() is None:
            process.terminate()  # the processes that it has started end with their standard input
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Compilation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ensure_compiled(parts: Collection[str], progress: Progress) -> None:
    """Compile those of these parts of the kernels that are not compiled, and show a bar meanwhile."""
    with Compilation(parts, progress) as compilation:
        compilation.wait()
