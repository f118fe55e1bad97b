"""The machine code of variants for processors that the tests may not run on."""

import os
import platform
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 only")

COMPILE = """
import numba
from numba import int32, int64, float32, uint8, int8
from flashlm_numba.kernels import _ternary_dots, {module} as module
assert _ternary_dots.available()[-1] == "avxvnni", _ternary_dots.available()
kernel = getattr(module, "{kernel}")
kernel.compile({signature})
print(kernel.inspect_asm(kernel.signatures[0]))
"""
KERNELS = {
    "ternary_gemv": ("_serial_avxvnni", "(int32[:, ::1], uint8[:, ::1], int8[:, ::1])"),
    "ternary_gemm": (
        "_rows_avxvnni",
        "(float32[:, ::1], float32[:, ::1], float32[:, ::1], uint8[:, :, ::1], int8[::1], float32[::1], int32[::1], "
        "float32[::1], int64, int64)",
    ),
}


@pytest.mark.parametrize("module", KERNELS)
def test_avxvnni_is_the_short_encoding_of_laptops_without_avx512(module, tmp_path):
    kernel, signature = KERNELS[module]
    laptop = {
        "NUMBA_CPU_NAME": "alderlake",
        "NUMBA_CPU_FEATURES": "+sse2,+avx,+avx2,+fma,+bmi,+bmi2,+avxvnni",
        "NUMBA_CACHE_DIR": str(tmp_path),  # what is compiled here must not run here
    }
    code = COMPILE.format(module=module, kernel=kernel, signature=signature)
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **laptop}, capture_output=True, text=True, check=True
    )
    dots = [line for line in run.stdout.splitlines() if "vpdpbusd" in line]
    assert dots
    assert all(re.search(r"\{vex\}\s+vpdpbusd\s.*%ymm", line) for line in dots), dots
    assert "%zmm" not in run.stdout
