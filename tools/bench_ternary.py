"""Speed of the packed ternary products, 2 bits per weight, compared with the memory bandwidth.

\b
    python tools/bench_ternary.py               every shape
    python tools/bench_ternary.py --quick       small shapes only
    python tools/bench_ternary.py --json FILE   write what was measured

The baseline is NumPy's float32 product with the same weights. First the program compares every candidate, bit for bit,
with the integer product in NumPy. A wrong result ends the program with status 1. Then it times the candidates
alternately and prints medians with the 20 % and 80 % quantiles. The bandwidth is that of the fastest of three plain
readers over 512 MB with the same threads. Use a quiet machine.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numba
import numpy as np
from threadpoolctl import threadpool_limits

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.kernels import _ternary_dots
from flashlm_numba.kernels.ternary import pack_ternary
from flashlm_numba.kernels.ternary_gemv import best_variant, quantize_rows, ternary_gemv_int8, ternary_matvec
from flashlm_numba.system.threads import set_threads
from tools.bench import bandwidth, machine, output, timing

# rows, columns, rows of activations, threads (0: all)
QUICK = ((768, 256, 1, 1), (768, 256, 16, 1))
SHAPES = (
    *QUICK,
    (4096, 4096, 1, 1),
    (4096, 4096, 16, 1),
    (4096, 4096, 64, 1),
    (16384, 16384, 1, 1),
    (16384, 16384, 1, 0),
)
FLOAT_BYTES = 2**29  # beyond this, NumPy's float32 matrix is not made


def exact_product(weight: np.ndarray, q: np.ndarray) -> np.ndarray:
    """q (N, K) int8 times weight (R, K) int8 of -1, 0, +1, (N, R) int32. float64 represents every sum exactly."""
    chunks = [q.astype(np.float64) @ weight[r : r + 1024].T.astype(np.float64) for r in range(0, len(weight), 1024)]
    return np.concatenate(chunks, axis=1).astype(np.int32)


def make_calls(
    rows: int, columns: int, inputs: int, product: Callable[..., np.ndarray] | None = None
) -> dict[str, Callable[[], Any]]:
    """The checked candidates for a shape. Raises timing.WrongResultError naming a wrong candidate."""
    product = product or ternary_gemv_int8
    rng = np.random.default_rng(0)
    weight = rng.integers(-1, 2, (rows, columns), np.int8)
    packed = np.concatenate([pack_ternary(weight[r : r + 1024].astype(np.float32)) for r in range(0, rows, 1024)])
    x = rng.standard_normal((inputs, columns), np.float32)
    q, _ = quantize_rows(x)
    expected = exact_product(weight, q[:, :columns])
    calls: dict[str, Callable[[], Any]] = {}
    for variant in _ternary_dots.available():
        run = functools.partial(product, packed, q, variant=variant)
        if not np.array_equal(run(), expected):
            raise timing.WrongResultError(f"{variant}: {rows} x {columns}, {inputs} rows: not the exact product")
        calls[variant] = run
    calls["with rounding"] = lambda: product(packed, quantize_rows(x)[0])
    if not np.array_equal(calls["with rounding"](), expected):
        raise timing.WrongResultError(f"with rounding: {rows} x {columns}, {inputs} rows: not the exact product")
    if 4 * rows * columns <= FLOAT_BYTES:
        floats = weight.astype(np.float32)
        calls["numpy float32"] = lambda: x @ floats.T
        if inputs == 1:
            calls["float activations"] = lambda: ternary_matvec(packed, x[0])
            if not np.allclose(calls["float activations"](), calls["numpy float32"](), atol=1e-4 * columns**0.5):
                raise timing.WrongResultError(f"float activations: {rows} x {columns}: not NumPy's product")
    return calls


def measure_shape(rows: int, columns: int, inputs: int, threads: int, repeats: int) -> dict[str, Any]:
    """Gweights/s (weights times rows of activations), GB/s of codes, by candidate."""
    calls = make_calls(rows, columns, inputs)
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        with threadpool_limits(threads, user_api="blas"):
            seconds = timing.measure(calls, repeats)
    finally:
        numba.set_num_threads(before)
    work = rows * columns * inputs * 1e-9
    return {name: timing.rate(found, work) for name, found in seconds.items()}


@click.command(help=__doc__)
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True, help="Timed turns of each.")
@click.option("--threads", type=click.IntRange(min=1), help="Where all threads are used. Default: every core.")
@click.option("--quick", is_flag=True, help="Small shapes, and no bandwidth.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results to this file.")
def main(repeats: int, threads: int | None, quick: bool, json_path: Path | None) -> None:
    """See the module's docstring."""
    if json_path is not None:
        output.check_writable(json_path)
    try:
        threads = set_threads(threads)
        best = best_variant()
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    stamp = machine.stamp(threads)
    click.echo(
        f"{stamp['machine']['cpu']}, {threads} threads; variant {best}, of {', '.join(_ternary_dots.available())}"
    )
    reading: dict[int, dict[str, Any]] = {}
    if not quick:
        for count in sorted({1, threads}):
            reading[count] = bandwidth.read_bandwidth(count, repeats=repeats)
            click.echo(f"  reading, {count} threads: {reading[count]['best']:.1f} GB/s")
    shapes = []
    for rows, columns, inputs, wanted in QUICK if quick else SHAPES:
        count = wanted or threads
        try:
            rates = measure_shape(rows, columns, inputs, count, repeats)
        except timing.WrongResultError as error:
            click.echo(f"Wrong result: {error}.", err=True)
            sys.exit(1)
        click.echo(f"{rows:,} x {columns:,}, {inputs} rows of activations, {count} threads")
        for name, rate in rates.items():
            extra = ""
            if count in reading and inputs == 1 and name in _ternary_dots.VARIANTS:
                extra = f", {rate['median'] / 4 / reading[count]['best']:.0%} of the read bandwidth"
            click.echo(
                f"  {name:<18} {rate['median']:>8.1f} Gweights/s  ({rate['p20']:.1f} to {rate['p80']:.1f}){extra}"
            )
        shapes.append({"rows": rows, "columns": columns, "inputs": inputs, "threads": count, "gweights_per_s": rates})
    if json_path is not None:
        result = {
            **stamp,
            "best_variant": best,
            "bandwidth": {str(count): found for count, found in reading.items()},
            "shapes": shapes,
        }
        output.write_json(json_path, result)


if __name__ == "__main__":
    main()
