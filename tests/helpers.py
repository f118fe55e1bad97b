"""What several test files need: the tolerance rule and the finite-difference check."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from flashlm_numba.cli.main import main

# settings of a run that takes milliseconds a step
TINY = (
    "dim=16",
    "ffn_dim=24",
    "groups=4",
    "dilations=1,2",
    "phases=2x16x2",
    "embedding_init=random",
    "warmup_steps=2",
    "validate_every=4",
    "validation_tokens=60",
    "checkpoint_every=4",
    "sample_tokens=3",
)


def import_torch() -> Any:
    """PyTorch; the calling test, or test file, is skipped where it is not installed, but in CI, which must have it."""
    if "CI" in os.environ:
        return importlib.import_module("torch")
    return pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[baseline]'")


def normal_arrays(rng: np.random.Generator, shapes: Sequence[Any]) -> list[np.ndarray]:
    """A float32 array of standard normal numbers for every shape."""
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def copies(lists: Sequence[Sequence[np.ndarray]]) -> list[list[np.ndarray]]:
    """Copies of lists of arrays."""
    return [[x.copy() for x in part] for part in lists]


def wide(lists: Sequence[Sequence[np.ndarray]]) -> list[list[np.ndarray]]:
    """Float64 copies of lists of arrays."""
    return [[x.astype(np.float64) for x in part] for part in lists]


def assert_as_accurate(got, ref32, ref64, slack: float = 4.0, name: str = "result") -> None:
    """Assert that got errs from the float64 truth at most slack times as far as plain float32 NumPy does.

    Errors are largest absolute differences. One float32 rounding of the largest value is always allowed, since the
    plain float32 result can be exact by luck. Source of the rule: Wijmans et al. 2024, arXiv:2411.09009, their tests.
    """
    got, ref32, ref64 = np.asarray(got), np.asarray(ref32), np.asarray(ref64)
    assert got.shape == ref64.shape, f"{name}: shape {got.shape}, expected {ref64.shape}"
    if ref64.size == 0:
        return
    assert np.isfinite(got).all() == np.isfinite(ref64).all(), f"{name}: not finite"
    scale = float(np.abs(ref64).max())
    yardstick = float(np.abs(ref32.astype(np.float64) - ref64).max())
    allowed = slack * (yardstick + np.finfo(np.float32).eps * scale) + 1e-30
    error = float(np.abs(got.astype(np.float64) - ref64).max())
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (values up to {scale:.3g})"


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of functions that start together, each in a thread of its own; raises what the first one raises."""
    start, results, errors = threading.Barrier(len(calls)), [None] * len(calls), []

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = calls[index]()
        except BaseException as error:  # handed to the caller
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def numeric_gradient(
    function: Callable[[], float], x: np.ndarray, step: float = 1e-5, places: Iterable[tuple[int, ...]] | None = None
) -> np.ndarray:
    """Central differences of function() with respect to elements of x (float64, changed in place).

    places : the indices of these elements; the others are 0; default: all elements
    """
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape) if places is None else places:
        before = x[i]
        x[i] = before + step
        high = function()
        x[i] = before - step
        low = function()
        x[i] = before
        gradient[i] = (high - low) / (2 * step)
    return gradient


def command(*arguments: object) -> Result:
    """`flashlm-numba` with these arguments, in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def some_counts(seed: int, vocab: int) -> np.ndarray:
    """Token counts (vocab,), a few of them large, one of them 0."""
    rng = np.random.default_rng(seed)
    counts = (rng.pareto(0.8, vocab) * 20).astype(np.int64)
    counts[rng.integers(0, vocab)] = 0
    return counts
