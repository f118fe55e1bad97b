"""The memory allocator of a measured process.

glibc returns every large block to the kernel when it is freed, so a program that allocates its logits anew in every
step takes a page fault for each 4 KB of them. PyTorch spends up to half of a dense step in these faults. Its own tuning
guide recommends another allocator, and raising glibc's two thresholds has the same effect without installing anything.
An allocator is chosen when a process starts.
"""

from __future__ import annotations

import os
import sys

CHOICE = "FLASHLM_BENCH_ALLOCATOR"  # names the allocator that a process was started with
NEVER = str(1 << 40)  # bytes, more than any block or heap here
ALLOCATORS: dict[str, dict[str, str]] = {
    "keep": {"MALLOC_MMAP_THRESHOLD_": NEVER, "MALLOC_TRIM_THRESHOLD_": NEVER},  # freed memory stays in the process
    "default": {},  # as the system comes
}


def environment_of(allocator: str) -> dict[str, str]:
    """This process's environment, for a process with an allocator."""
    kept = {name: value for name, value in os.environ.items() if name not in ALLOCATORS["keep"]}
    return {**kept, **ALLOCATORS[allocator], CHOICE: allocator}


def current() -> str:
    """The name of this process's allocator; "default" if nobody chose one."""
    return os.environ.get(CHOICE, "default")


def restart(allocator: str = "keep") -> None:
    """Start this program again with an allocator, unless one was chosen. Call it before anything else."""
    if CHOICE not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment_of(allocator))
