"""The memory of the machine, and what of it is free."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def available_mb() -> int | None:
    """MB (1e6 bytes) that processes can still take without swapping; None if the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024 // 10**6
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 10**6
    except (AttributeError, ValueError, OSError):
        return None


def machine_bytes() -> int | None:
    """Bytes of memory that this process can have at most: the machine's, or a cgroup's limit; None if unknown."""
    found = []
    with contextlib.suppress(AttributeError, ValueError, OSError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # a container's
        try:
            found.append(int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # "max" is no limit
            continue
    return min((size for size in found if size > 0), default=None)
