"""Lock a folder for this process, also on file systems that know no locks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from flashlm_numba.system.errors import warn_once
from flashlm_numba.system.files import parse_json

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
WAIT_SECONDS = 0.2  # between attempts
_ours: set[Path] = set()  # marks of this process


class LockedError(Exception):
    """Another process holds the lock. `advice` is empty, or says what to do if that process no longer exists."""

    def __init__(self, advice: str = "") -> None:
        super().__init__(advice)
        self.advice = advice


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock the file `path`, which is created. Raises LockedError if another process holds it, unless wait is True.

    The operating system releases the lock when the process ends, however it ends. On a file system without locks, a
    file beside `path` names the process instead; the file of a process that no longer exists is replaced.
    """
    with path.open("a+") as file:
        try:
            _lock(file, wait)
        except (BlockingIOError, PermissionError):  # PermissionError on Windows
            raise LockedError from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warn_once(
                "lock", f"The file system of {path.parent} has no locks ({error.strerror}); a file there replaces them."
            )
            with _marked(path.with_name(f"{path.name}.held"), wait):
                yield
            return
        yield


def _lock(file: IO[Any], wait: bool) -> None:
    if sys.platform == "win32":
        import msvcrt

        while True:
            try:
                return msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            except PermissionError:
                if not wait:
                    raise
                time.sleep(WAIT_SECONDS)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def is_locked(path: Path) -> bool | None:
    """Whether a process holds the lock of a file, without touching it; None where that cannot be told.

    Linux lists the locks. A try to lock the file would refuse a process that wants it at this moment.
    """
    try:
        number = str(path.stat().st_ino)
        lines = Path("/proc/locks").read_text("ascii", "replace").splitlines()
    except FileNotFoundError:
        return False if Path("/proc/locks").exists() else None
    except OSError:
        return None
    # "1: FLOCK ADVISORY WRITE pid major:minor:inode 0 EOF"; a waiting process has "->" before FLOCK. The device is
    # another one than stat's on some file systems, so that only the inode is compared.
    held = (words for words in map(str.split, lines) if len(words) > 5 and words[1] == "FLOCK")
    return any(words[5].rpartition(":")[2] == number for words in held) or path.with_name(f"{path.name}.held").exists()


# --- without locks: a file that names the process ---


@contextlib.contextmanager
def _marked(mark: Path, wait: bool) -> Iterator[None]:
    mark = mark.absolute()
    while not _create(mark):
        if not wait:
            raise LockedError(f"If there is none, delete {mark}.")
        time.sleep(WAIT_SECONDS)
    _ours.add(mark)
    try:
        yield
    finally:
        _ours.discard(mark)
        mark.unlink(missing_ok=True)


def _create(mark: Path) -> bool:
    """Create the mark, and replace one whose process has ended. Returns False if a process may hold it."""
    for _ in range(2):
        with contextlib.suppress(FileExistsError), mark.open("x", encoding="utf-8") as file:
            json.dump(_process(os.getpid()), file)
            return True
        if not _remove_left_over(mark):
            return False
    return False


def _remove_left_over(mark: Path) -> bool:
    """Remove the mark of a process that no longer exists. Returns False if the process exists or is unknown."""
    try:
        text = mark.read_text(encoding="utf-8")
        holder = parse_json(text)
        if holder["host"] != socket.gethostname() or mark in _ours or holder == _process(int(holder["pid"])):
            return False
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    taken = mark.with_name(f"{mark.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(mark, taken)  # one of several processes that come here succeeds
        if taken.read_text(encoding="utf-8") != text:  # another process has created a mark meanwhile
            os.rename(taken, mark)
            return False
        taken.unlink()
    return True


def _process(pid: int) -> dict[str, Any]:
    """What identifies a process on any host. A process that no longer exists has another description."""
    found: dict[str, Any] = {"host": socket.gethostname(), "pid": pid, "boot": None, "started": None}
    with contextlib.suppress(OSError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    try:
        # the start is field 22; the second, the program's name in parentheses, may contain spaces
        found["started"] = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[19]
    except OSError:  # not Linux, or there is no such process
        if not _exists(pid):
            found["started"] = "ended"
    return found


def _exists(pid: int) -> bool:
    if os.name != "posix":
        return True  # cannot be told; the message says which file to delete
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
