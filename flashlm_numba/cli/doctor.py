"""`flashlm-numba doctor`: describe this machine, check the kernels on it, and report problems."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from flashlm_numba.cli.self_checks import run_checks
from flashlm_numba.system.display import TERMINAL
from flashlm_numba.system.threads import available_cores

PACKAGES = ("flashlm-numba", "numpy", "scipy", "numba", "llvmlite", "tiktoken", "datasets", "safetensors", "torch")
# the features that the kernels use
FEATURES = ("avx2", "fma", "avxvnni", "avx512f", "avx512bw", "avx512vnni", "neon", "dotprod", "i8mm")
# by variant of the ternary products (kernels/_ternary_dots.py): the processors whose variant is the next better
FASTER = {
    "plain": "avx2, on x86 processors since 2013",
    "avx2": "avxvnni, on processors with AVX-VNNI: most laptops since 2021",
    "avxvnni": "vnni, on processors with AVX512-VNNI",
    "avx512": "vnni, on processors with AVX512-VNNI",
    "neon": "dotprod, on most Arm processors since 2018: Raspberry Pi 5, Apple M1",
    "dotprod": "in training i8mm, on newer Arm processors: Apple M2, Neoverse V1",
}
GENERIC = ("Prescott", "Core2", "Nehalem", "Generic", "armv8")  # OpenBLAS's names for processors without wide registers
READ_BYTES = 1 << 28  # larger than most last-level caches
ROOM = 2 << 30  # bytes of free disk space that a run and the caches may need


def cpu_name() -> str:
    """Model name of the processor, as the operating system reports it, or else as LLVM calls it: cortex-a76."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    import llvmlite.binding

    name = llvmlite.binding.get_host_cpu_name()
    return name if name not in ("", "generic") else platform.processor() or platform.machine()


def blas_libraries() -> list[dict[str, Any]]:
    """Every BLAS library loaded so far: name, version, the core type it optimises for, file name, threads."""
    from threadpoolctl import threadpool_info

    return [
        {
            "library": pool["internal_api"],
            "version": pool.get("version"),
            "core": pool.get("architecture"),
            "file": Path(pool["filepath"]).name,
            "threads": pool["num_threads"],
        }
        for pool in threadpool_info()
        if pool["user_api"] == "blas"
    ]


def package_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Version of Python and of each package; None for a package that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


# --- measurements: short, enough to tell a slow machine from a fast one ---


def _best_seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def gemm_gflops() -> float:
    """GFLOP/s of NumPy's float32 product of two 2048 x 2048 matrices, best of five."""
    a = np.ones((2_048, 2_048), np.float32)
    out = np.empty_like(a)
    return 2e-9 * 2_048**3 / _best_seconds(lambda: np.matmul(a, a, out=out))


def read_gbytes_per_s(threads: int) -> float:
    """GB/s (1e9 bytes) at which this many threads read 256 MB to find the maximum, best of five."""
    words = np.ones(READ_BYTES // 8, np.int64)
    parts = np.array_split(words, threads)
    with ThreadPoolExecutor(threads) as pool:  # NumPy's loops let other threads run
        seconds = _best_seconds(lambda: list(pool.map(np.max, parts)))
    return READ_BYTES * 1e-9 / seconds


def _memory_mb() -> dict[str, int] | None:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return {
            name: page * os.sysconf(key) // 10**6
            for name, key in (("total", "SC_PHYS_PAGES"), ("free", "SC_AVPHYS_PAGES"))
        }
    except (AttributeError, ValueError, OSError):
        return None


def examine(threads: int) -> dict[str, Any]:
    """The object that `doctor --json` prints: machine, libraries, checks, and lists of "problems" and "notes".

    threads : number of threads in use
    A problem makes results wrong or training impossible. A note is about something that costs speed.
    """
    from flashlm_numba.kernels import _jit
    from flashlm_numba.kernels.ternary_gemv import best_variant
    from flashlm_numba.system.cache import writable_cache
    from flashlm_numba.system.compiled import ALL, ensure_compiled

    ensure_compiled([ALL], TERMINAL)
    errors, problems = run_checks()
    features = {feature.removeprefix("+") for feature in _jit.target_features() if feature.startswith("+")}
    blas = blas_libraries()
    try:
        variant = best_variant()
    except ValueError as wrong:  # the environment variable that selects a variant is wrong
        variant = "none"
        problems.append(f"{wrong}.")
    caches = {"kernels": str(_jit.CACHE_FOLDER), "data": str(writable_cache())}
    memory = _memory_mb()
    notes = [  # taken before the measurements, which put load on the machine
        *_notes_on_products(features, blas, variant),
        *_notes_on_load(threads),
        *_notes_on_room(caches.values(), memory),
    ]
    return {
        "cpu": cpu_name(),
        "platform": platform.platform(),
        "cores": available_cores(),
        "threads": threads,
        "threading_layer": _threading_layer(),
        "features": [feature for feature in FEATURES if feature in features],
        "ternary_products": variant,
        "faster_products": FASTER.get(variant, ""),
        "blas": blas,
        "gemm_gflops": round(gemm_gflops(), 1),
        "read_gbytes_per_s": round(read_gbytes_per_s(threads), 1),
        "memory_mb": memory,
        "caches": caches,
        "versions": package_versions(PACKAGES),
        "checks": errors,
        "notes": notes,
        "problems": problems,
    }


def _notes_on_products(features: set[str], blas: list[dict[str, Any]], variant: str) -> Iterator[str]:
    """Notes on whatever makes matrix products slow."""
    if kind := os.environ.get("OPENBLAS_CORETYPE"):
        yield f"OPENBLAS_CORETYPE is set to {kind}, so BLAS uses the code for that processor, perhaps slow; unset it."
    if "avx2" in features:
        for pool in blas:
            if pool["core"] in GENERIC:
                yield (
                    f"BLAS ({pool['file']}) treats this processor as a {pool['core']} without wide registers, so "
                    "products are slow; a newer NumPy and SciPy may recognise it."
                )
    if variant == "plain":
        yield "This processor has no fast int8 products; train with --set activations=float, which is faster here."


def _notes_on_load(threads: int) -> Iterator[str]:
    """Notes on cores that are unused or busy."""
    cores = available_cores()
    if threads < cores:
        yield f"Only {threads} of {cores} cores are in use (NUMBA_NUM_THREADS, or --threads)."
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5 * cores:
        yield f"Other programs are running (load {load:.1f} on {cores} cores), so the measured speeds are low."


def _notes_on_room(caches: Iterable[str], memory: dict[str, int] | None) -> Iterator[str]:
    """Notes on too little disk space or memory."""
    from flashlm_numba.kernels import _jit

    if _jit.CACHE_IS_TEMPORARY:
        yield f"{_jit.cache_root()} cannot be written, so every process compiles the kernels again."
    elif _jit.CACHE_FOLDER.parent != _jit.cache_root():
        yield f"{_jit.cache_root()} cannot be written, so a folder that the system may delete is used instead."
    for place in {*caches, os.getcwd()}:
        free = shutil.disk_usage(place).free
        if free < ROOM:
            yield f"Only {free / 1e9:.1f} GB are free at {place}; a run takes up to half a gigabyte."
    if memory and memory["total"] < 2_000:
        yield f"This machine has {memory['total']:,} MB of memory; training takes about 750."


def _threading_layer() -> str:
    """Name of Numba's threading layer, if Numba has loaded one."""
    import numba

    try:
        return numba.threading_layer() if not numba.config.DISABLE_JIT else "none"
    except ValueError:  # with one thread nothing has run in parallel
        return "none yet"


def report(found: dict[str, Any]) -> str:
    """The result of examine() as readable lines; the last line is the verdict."""
    memory, features = found["memory_mb"], ", ".join(found["features"]) or "no wide registers"
    lines = [
        f"processor       {found['cpu']}, {found['cores']} cores ({features})",
        f"system          {found['platform']}",
        f"threads         {found['threads']}, by Numba's layer {found['threading_layer']}",
        *(
            f"BLAS            {pool['library']} {pool['version']} for {pool['core']}, {pool['threads']} threads "
            f"({pool['file']})"
            for pool in found["blas"]
        ),
        f"products        {found['gemm_gflops']:,.0f} GFLOP/s in float32",
        f"                ternary products with the {found['ternary_products']} kernel"
        + (f" (faster: {found['faster_products']})" if found["faster_products"] else ""),
        f"memory          {found['read_gbytes_per_s']:,.0f} GB/s"
        + (f", {memory['total']:,} MB, {memory['free']:,} MB free" if memory else ""),
        *(f"cache           {name}: {place}" for name, place in found["caches"].items()),
        "versions        " + ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version),
    ]
    for name, error in found["checks"].items():
        state = "failed" if error is None else f"error {error:.1e}"
        lines.append(f"self-check      {name}: {state}")
    lines += [f"note            {sentence}" for sentence in found["notes"]]
    lines += [f"problem         {sentence}" for sentence in found["problems"]]
    if found["problems"]:
        lines.append("Something is wrong on this machine; see the problems above.")
    else:
        lines.append(
            "All is well: the kernels compute correctly on this machine."
            + (" See the notes." if found["notes"] else "")
        )
    return "\n".join(lines)
