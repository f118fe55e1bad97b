"""What this machine has, whether the kernels compute correctly on it, and what is wrong: `flashlm-numba doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from flashlm_numba.system.display import Display
from flashlm_numba.system.threads import available_cores

PACKAGES = ("flashlm-numba", "numpy", "scipy", "numba", "llvmlite", "tiktoken", "datasets", "safetensors", "torch")
FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512vnni", "neon", "dotprod")  # what the kernels care about
GENERIC = ("Prescott", "Core2", "Nehalem", "Generic", "armv8")  # OpenBLAS's names for processors without wide registers
TOLERANCE = 1e-4  # of the largest value; float32 rounding stays below a tenth of it
READ_BYTES = 1 << 28  # beyond most last caches
ROOM = 2 << 30  # bytes of disk that a run and the caches may need


def cpu_name() -> str:
    """Model name of the processor, as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def blas_libraries() -> list[dict[str, Any]]:
    """Every BLAS loaded so far: library, version, the kind of core it chose its code for, file name, threads."""
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
    """Version of Python and of each package, None where it is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


# --- self-checks: each returns its error relative to the largest value ---


def _relative(found: np.ndarray, truth: np.ndarray) -> float:
    error = np.abs(found.astype(np.float64) - truth).max(initial=0.0)
    return float(error / max(float(np.abs(truth).max(initial=0.0)), 1e-30))


def _worst(errors: Iterable[float]) -> float:
    """The largest; NaN if there is one, which max() would pass over."""
    return float(np.max(list(errors)))


def _check_dense_head() -> float:
    from flashlm_numba.heads.dense import DenseHead
    from flashlm_numba.kernels import reference

    rng = np.random.default_rng(0)
    h, weight = rng.standard_normal((37, 48), np.float32), rng.standard_normal((1_501, 48), np.float32)
    targets, weights = rng.integers(0, 1_501, 37).astype(np.int32), rng.random(37, np.float32)
    head = DenseHead(weight, np.zeros_like(weight))
    loss, _, dh = head.forward_backward(h, targets, weights)
    h64, weight64, weights64 = (a.astype(np.float64) for a in (h, weight, weights))
    want_loss, _, _ = reference.dense_head_forward(h64, weight64, targets)
    want_dh, want_dweight = reference.dense_head_backward(weights64, h64, weight64, targets)
    pairs = (loss, want_loss), (dh, want_dh), (head.dweight, want_dweight)
    return _worst(_relative(found, truth) for found, truth in pairs)


def _check_tree_head() -> float:
    from flashlm_numba.heads.tree import TreeHead
    from flashlm_numba.heads.tree_shapes import build_tree
    from flashlm_numba.kernels import reference_tree

    rng = np.random.default_rng(1)
    tree = build_tree("adaptive", np.arange(1_501)[::-1])
    h, weight = rng.standard_normal((37, 48), np.float32), rng.standard_normal((1_501, 48), np.float32)
    targets, weights = rng.integers(0, 1_501, 37).astype(np.int32), rng.random(37, np.float32)
    head = TreeHead(tree, weight, np.zeros_like(weight))
    loss, _, dh = head.forward_backward(h, targets, weights)
    h64, weight64, nodes64, weights64 = (a.astype(np.float64) for a in (h, weight, head.nodes, weights))
    dweight, dnodes = np.zeros(weight.shape), np.zeros(head.nodes.shape)
    want_loss, _, want_dh = reference_tree.tree_head_forward_backward(
        h64, weight64, nodes64, tree.spans, tree.row_of_token[targets], weights64, dweight, dnodes
    )
    pairs = (loss, want_loss), (dh, want_dh), (head.dweight, dweight), (head.dnodes, dnodes)
    return _worst(_relative(found, truth) for found, truth in pairs)


def _small_model() -> Any:
    """A narrow model with all that a trunk can have, none of it zero."""
    from flashlm_numba.heads.dense import DenseHead
    from flashlm_numba.model.config import ModelConfig
    from flashlm_numba.model.model import Model, initial_parameters

    config = ModelConfig(
        97,
        48,
        70,
        3,
        dilations=(1, 2, 8),
        mixer_residual_scale=2**-3,
        ffn_residual_scale=2**-10,
        leaky_decay=0.9,
        ngram_copy_orders=(1,),
    )

    def make_head(weight: np.ndarray, dweight: np.ndarray) -> Any:
        return DenseHead(weight, dweight)

    parameters = initial_parameters(config, 0, embedding_std=0.5)
    for name, value in parameters.items():
        if name.startswith(("mixer.average.", "induction.")):
            value[:] = 0.5  # they start at zero
    return Model(config, parameters, make_head)


def _check_trunk() -> float:
    """A pass over a text against the decoder, which shares none of its products."""
    model = _small_model()
    ids = np.random.default_rng(2).integers(0, 97, (1, 40)).astype(np.int32)
    whole = model.forward(ids).copy()
    state, first = model.prefill(ids[0, :1])
    steps = [first[0].copy(), *(model.decode_step(state, int(token))[0].copy() for token in ids[0, 1:])]
    return _relative(np.array(steps), whole.astype(np.float64))


def _check_trunk_gradients() -> float:
    """Hidden states and all gradients against the plain NumPy of the kernels' reference, in float64."""
    from flashlm_numba.kernels import reference_trunk

    model = _small_model()
    config = model.config
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 20, (2, 40)).astype(np.int32)  # few different ones: they repeat, and have followers
    dout = rng.standard_normal((ids.size, config.dim), np.float32)
    want, saved = reference_trunk.trunk_forward(
        {name: value.astype(np.float64) for name, value in model.parameters.items()},
        ids,
        groups=config.groups,
        dilations=config.dilations,
        n_passes=config.n_passes,
        mixer_residual_scale=config.mixer_residual_scale,
        ffn_residual_scale=config.ffn_residual_scale,
        leaky_decay=config.leaky_decay,
        ternary_threshold=config.ternary_threshold,
        ngram_copy_orders=config.ngram_copy_orders,
        ngram_copy_reach=config.ngram_copy_reach,
    )
    error = _relative(model.forward(ids), want)
    model.backward(dout)
    gradients = reference_trunk.trunk_backward(dout.astype(np.float64), saved)
    return _worst([error, *(_relative(model.gradients[name], truth) for name, truth in gradients.items())])


def _check_weight_gradients() -> float:
    """The int8 gradients of ternary weights, of whole numbers that rounding leaves as they are: exact, or not."""
    from flashlm_numba.kernels.ternary_wgrad import weight_gradient

    rng = np.random.default_rng(4)
    a, b = (rng.integers(-127, 128, (37, columns)).astype(np.float32) for columns in (21, 70))
    a[0], b[:, 0] = 127, 127  # the largest of each column, and of each row
    return _relative(weight_gradient(a, b), a.astype(np.float64).T @ b)


def _check_ternary() -> float:
    """Every variant of the packed ternary product that this processor has, against plain loops: exact, or not."""
    from flashlm_numba.kernels import _ternary_dots
    from flashlm_numba.kernels import ternary_gemv as ternary_matmul

    return max(0.0 if ternary_matmul._agrees_with_plain(name) else 1.0 for name in _ternary_dots.available())


CHECKS: dict[str, Callable[[], float]] = {
    "dense head": _check_dense_head,
    "tree head": _check_tree_head,
    "trunk": _check_trunk,
    "trunk's gradients": _check_trunk_gradients,
    "int8 gradients": _check_weight_gradients,
    "ternary products": _check_ternary,
}


# --- measurements: short ones, to tell a slow machine from a fast one ---


def _best_seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


def gemm_gflops() -> float:
    """GFLOP/s of NumPy's float32 product of 2048 x 2048 matrices, the best of five."""
    a = np.ones((2_048, 2_048), np.float32)
    out = np.empty_like(a)
    return 2e-9 * 2_048**3 / _best_seconds(lambda: np.matmul(a, a, out=out))


def read_gbytes_per_s(threads: int) -> float:
    """GB/s (1e9 bytes) at which so many threads read 256 MB for their maximum, the best of five."""
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
    """Everything that `doctor --json` prints: the machine, the libraries, the checks, "problems" and "notes" in words.

    threads : the number that is used. Problems make results wrong or training impossible; notes cost speed.
    """
    import numba

    from flashlm_numba.kernels import _jit
    from flashlm_numba.kernels.ternary_gemv import best_variant
    from flashlm_numba.system.cache import writable_cache
    from flashlm_numba.system.compiled import ensure_compiled

    with Display() as display:
        ensure_compiled(display.note)
    errors: dict[str, float | None] = {}
    problems, notes = [], []
    for name, check in CHECKS.items():
        try:
            error = errors[name] = check()
        except Exception as broken:  # whatever it is, the other lines help to find out
            errors[name] = None
            problems.append(f"The self-check of the {name} ended with {type(broken).__name__}: {broken}.")
            continue
        if not np.isfinite(error):
            errors[name] = None  # JSON has no NaN
        if not error <= TOLERANCE:
            problems.append(
                f"The self-check of the {name} failed: an error of {error:.2g} of the largest value, where at "
                f"most {TOLERANCE:g} was expected: results would be wrong. Please report it with all of this output."
            )
    features = {feature.removeprefix("+") for feature in _jit.target_features() if feature.startswith("+")}
    blas = blas_libraries()
    if kind := os.environ.get("OPENBLAS_CORETYPE"):
        notes.append(
            f"OPENBLAS_CORETYPE is set to {kind}, so BLAS computes as on that processor, perhaps slowly; unset it."
        )
    if "avx2" in features:
        notes += [
            f"BLAS ({pool['file']}) has taken this processor for a {pool['core']}, without wide registers, so products "
            "are slow; a newer NumPy and SciPy may know it."
            for pool in blas
            if pool["core"] in GENERIC
        ]
    try:
        variant = best_variant()
    except ValueError as wrong:  # of the environment variable that forces one
        variant = "none"
        problems.append(f"{wrong}.")
    if variant == "plain":
        notes.append(
            "No fast int8 products for this processor: train with --set activations=float, which is faster here."
        )
    cores = available_cores()
    if threads < cores:
        notes.append(f"{threads} of {cores} cores are used (NUMBA_NUM_THREADS, or --threads).")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5 * cores:
        notes.append(f"Other programs are at work (load {load:.1f} on {cores} cores), so the speeds here are low.")
    if _jit.CACHE_IS_TEMPORARY:
        notes.append(f"{_jit.cache_root()} cannot be written, so kernels are compiled anew by every process.")
    caches = {"kernels": str(_jit.CACHE_FOLDER), "data": str(writable_cache())}
    for place in {*caches.values(), os.getcwd()}:
        free = shutil.disk_usage(place).free
        if free < ROOM:
            notes.append(f"Only {free / 1e9:.1f} GB are free at {place}; a run takes up to half a gigabyte.")
    memory = _memory_mb()
    if memory and memory["total"] < 2_000:
        notes.append(f"This machine has {memory['total']:,} MB of memory; training takes about 750.")
    try:
        layer = numba.threading_layer() if not numba.config.DISABLE_JIT else "none"
    except ValueError:  # nothing has run in parallel: one thread
        layer = "none yet"
    return {
        "cpu": cpu_name(),
        "platform": platform.platform(),
        "cores": cores,
        "threads": threads,
        "threading_layer": layer,
        "features": [feature for feature in FEATURES if feature in features],
        "ternary_products": variant,
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


def report(found: dict[str, Any]) -> str:
    """What examine found, in lines for a person, the verdict last."""
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
        f"                ternary ones by the {found['ternary_products']} kernel",
        f"memory          {found['read_gbytes_per_s']:,.0f} GB/s"
        + (f", {memory['total']:,} MB, {memory['free']:,} MB of it free" if memory else ""),
        *(f"cache           {name}: {place}" for name, place in found["caches"].items()),
        "versions        " + ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version),
    ]
    for name, error in found["checks"].items():
        state = "failed" if error is None else f"error {error:.1e}"
        lines.append(f"self-check      {name}: {state}")
    lines += [f"note            {sentence}" for sentence in found["notes"]]
    lines += [f"problem         {sentence}" for sentence in found["problems"]]
    if found["problems"]:
        lines.append("Something is wrong here: see the problems above.")
    else:
        lines.append(
            "All is well: the kernels compute correctly on this machine."
            + (" See the notes." if found["notes"] else "")
        )
    return "\n".join(lines)
