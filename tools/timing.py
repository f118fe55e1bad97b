"""What every benchmark here shares: the machine's description, alternating timings, its GEMM rate, JSON.

Seconds are wall clock (time.perf_counter). Quote medians with the 20 % and 80 % quantiles, on a quiet
machine.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from threadpoolctl import threadpool_limits

from flashlm_numba.cli.doctor import blas_libraries, cpu_name, package_versions
from flashlm_numba.system.files import write_atomically
from flashlm_numba.system.threads import available_cores

PACKAGES = ("flashlm-numba", "numpy", "scipy", "numba", "llvmlite", "torch")


class WrongResultError(Exception):
    """A candidate's result differs from the reference: it is not timed."""


def environment(threads: int | None = None) -> dict[str, Any]:
    """The machine and the libraries as one JSON-able dict; `threads` is what the benchmark was told to use.

    `blas` lists every BLAS loaded so far, with the kind of core that it chose its code for.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "threads": threads,
        "platform": platform.platform(),
        "load_1min": load,
        "blas": blas_libraries(),
        "versions": package_versions(PACKAGES),
    }


def commit() -> str | None:
    """The commit that is checked out, with a + where files differ from it; None outside a clone."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[1])]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed else "")


def summary(values: list[float]) -> dict[str, Any]:
    """Median, 20 % and 80 % quantiles, best and count of a list of measurements (seconds, or any unit)."""
    p20, median, p80 = np.quantile(values, [0.2, 0.5, 0.8])
    return {
        "median": float(median),
        "p20": float(p20),
        "p80": float(p80),
        "min": float(min(values)),
        "repeats": len(values),
    }


def rate(seconds: Mapping[str, Any], amount: float) -> dict[str, float]:
    """Amount per second from a summary of seconds; p20 becomes the slow end."""
    return {
        "median": amount / seconds["median"],
        "p20": amount / seconds["p80"],
        "p80": amount / seconds["p20"],
    }


def measure(
    candidates: Mapping[str, Callable[[], Any]],
    repeats: int = 5,
    warmup: int = 1,
    pause: float = 0.05,
    burst: float = 0.1,
) -> dict[str, dict[str, Any]]:
    """Time the candidates in turn, round after round, so that a drift of the machine meets all alike.

    Returns name -> summary of seconds per call, one value a round. `pause` (seconds) before every turn lets the idle
    threads of the candidate before, which spin for a moment, fall asleep. A call shorter than `burst` seconds is made
    again until they have passed, and the turn's value is the median without the first call, which wakes threads and
    fills caches: a head is called over and over by training. Raises ValueError for fewer than one repeat.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"measure: repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, run in candidates.items():
            time.sleep(pause)
            calls: list[float] = []
            before = began = time.perf_counter()
            while not calls or before - began < burst:
                run()
                now = time.perf_counter()
                calls.append(now - before)
                before = now
            if turn >= warmup:
                seconds[name].append(float(np.median(calls[1:] or calls)))
    return {name: summary(values) for name, values in seconds.items()}


def gemm_rate(
    threads: int, *, rows: int = 4096, dim: int = 256, vocab_size: int = 50_257, repeats: int = 5
) -> dict[str, Any]:
    """What NumPy's BLAS reaches in float32 on this machine: GFLOP/s by shape, and the best of them.

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


def check_writable(path: Path) -> None:
    """click.BadParameter unless a file can be written at path: said before hours of work, not after."""
    try:
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(20, "Not a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(21, "Is a directory")
        if path.exists() and not path.is_file():
            raise OSError(22, "Not a regular file")
        if path.exists():
            with path.open("ab"):
                pass
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be written: {error.strerror or error}.") from None


def write_json(path: str | Path, result: Mapping[str, Any]) -> None:
    """Write one object, indented, whole or not at all; ValueError for a number that is not finite: JSON has none."""
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    write_atomically(Path(path), lambda file: file.write(text.encode()))
