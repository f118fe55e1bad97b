"""Memory that is free for use."""

from __future__ import annotations

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
