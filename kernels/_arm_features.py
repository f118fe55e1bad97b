"""Features of an Arm processor (64 bits) that the ternary products use, as the operating system reports them.

LLVM, which Numba asks, reads a part of the features from Linux and none from macOS. It knows the others of a processor
by its name, but has no name for an Apple processor in a virtual machine, nor for a newer one than itself.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Any

IS_ARM = platform.machine() in ("aarch64", "arm64")
# for Linux (arch/arm64/include/uapi/asm/hwcap.h): the entry of the auxiliary vector, AT_HWCAP or AT_HWCAP2, and the bit
LINUX = {"+dotprod": (16, 20), "+i8mm": (26, 13)}
MACOS = {"+dotprod": b"hw.optional.arm.FEAT_DotProd", "+i8mm": b"hw.optional.arm.FEAT_I8MM"}


def _on_linux(library: Any) -> set[str]:
    library.getauxval.restype, library.getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return {name for name, (entry, bit) in LINUX.items() if library.getauxval(entry) >> bit & 1}


def _on_macos(library: Any) -> set[str]:
    found = set()
    for name, key in MACOS.items():
        value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        failed = library.sysctlbyname(key, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
        if not failed and value.value:
            found.add(name)
    return found


def arm_features() -> set[str]:
    """The names, as LLVM spells them, of those features that this processor has; none unless it is an Arm processor."""
    if not IS_ARM:
        return set()
    always = {"+neon"}  # compilers for these processors take it for granted
    ask = {"linux": _on_linux, "darwin": _on_macos}.get(sys.platform)
    try:
        return always | (ask(ctypes.CDLL(None)) if ask else set())
    except (OSError, AttributeError):  # no such function
        return always
