"""The environment of a benchmark: machine, libraries, commit, and the speed of matrix products."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from flashlm_numba.cli.doctor import blas_libraries, cpu_name, package_versions
from flashlm_numba.system.threads import available_cores
from tools.bench import allocators
from tools.bench.timing import measure, rate

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("flashlm-numba", "numpy", "scipy", "numba", "llvmlite", "torch")


def environment(threads: int | None = None) -> dict[str, Any]:
    """The machine and the libraries as a dict for JSON; `threads` is the number given to the benchmark.

    `allocator` is that of this process (allocators.py). `blas` lists every BLAS library loaded so far, with the core
    type that it optimises for.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "threads": threads,
        "platform": platform.platform(),
        "load_1min": load,
        "allocator": allocators.current(),
        "blas": blas_libraries(),
        "versions": package_versions(PACKAGES),
    }


def commit() -> str | None:
    """The checked-out commit, with a + if files differ from it; None outside a clone."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed else "")


def stamp(threads: int | None = None) -> dict[str, Any]:
    """Keys of every result: machine, commit and date."""
    return {"machine": environment(threads), "commit": commit(), "date": time.strftime("%Y-%m-%d")}


def gemm_rate(
    threads: int, *, rows: int = 4096, dim: int = 256, vocab_size: int = 50_257, repeats: int = 5
) -> dict[str, Any]:
    """GFLOP/s of NumPy's BLAS in float32 on this machine, by shape, and the best of them.

    Shapes: 2048 cubed and the three products of a dense head for N = rows, C = dim, V = vocab_size (logits,
    dh, dE), whose (N, V) operand takes 4*N*V bytes. Keys: "best", and for each shape the summary of GFLOP/s.
    """
    rng = np.random.default_rng(0)

    def matrix(m: int, n: int) -> np.ndarray:
        return rng.standard_normal((m, n), dtype=np.float32)

    square, h, weight = matrix(2048, 2048), matrix(rows, dim), matrix(vocab_size, dim)
    logits = np.empty((rows, vocab_size), np.float32)
    np.matmul(h, weight.T, out=logits)
    square_out, dh, dweight = np.empty_like(square), np.empty_like(h), np.empty_like(weight)
    head_flop = 2.0 * rows * dim * vocab_size
    products: dict[str, tuple[float, Callable[[], Any]]] = {
        "2048 cubed": (2.0 * 2048**3, lambda: np.matmul(square, square, out=square_out)),
        "logits": (head_flop, lambda: np.matmul(h, weight.T, out=logits)),
        "dh": (head_flop, lambda: np.matmul(logits, weight, out=dh)),
        "dE": (head_flop, lambda: np.matmul(logits.T, h, out=dweight)),
    }
    with threadpool_limits(threads, user_api="blas"):
        seconds = measure({name: run for name, (_, run) in products.items()}, repeats)
    rates = {name: rate(seconds[name], flop * 1e-9) for name, (flop, _) in products.items()}
    return {"best": max(r["median"] for r in rates.values()), "threads": threads, **rates}
