"""The first minutes: seconds from an empty cache to the first training step, and to the first generated token.

\b
    python tools/bench_cold_start.py                     three times each
    python tools/bench_cold_start.py --json out.json     write what was measured

Every measurement is a process with an empty cache folder of its own. `train --steps 1` on the built-in text prepares
the text, computes the initial embedding, compiles the kernels and builds the head; the program stops the clock when the
step stands in metrics.jsonl. `generate` reads a file made by `export` and compiles the kernels that it needs; the clock
stops at the first byte of text. Between them the training command runs again, with everything cached. Use a quiet
machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.heads import HEADS
from tools.bench import machine, output, timing

POLL = 0.02  # seconds


def command(cache: Path, *arguments: object) -> subprocess.Popen[bytes]:
    """Start a command of the program with this cache folder."""
    variables = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    return subprocess.Popen(
        [sys.executable, "-m", "flashlm_numba", *map(str, arguments)],
        env=variables | {"XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        cwd=machine.ROOT,
    )


def seconds_until(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> float:
    """Seconds from now until `reached`, after which the process may end. Raises ClickException if it fails."""
    began, passed = time.perf_counter(), None
    while passed is None:
        if reached():
            passed = time.perf_counter() - began
        elif process.poll() is not None and not reached():
            raise click.ClickException(f"{' '.join(map(str, process.args))} ended with status {process.returncode}.")
        time.sleep(POLL)
    if process.wait():
        raise click.ClickException(f"{' '.join(map(str, process.args))} ended with status {process.returncode}.")
    return passed


def first_step(cache: Path, run: Path, head: str) -> float:
    """Seconds from the start of a training command to its first step."""
    metrics = run / "metrics.jsonl"
    process = command(cache, "train", "--steps", 1, "--head", head, "--out", run)
    assert process.stdout is not None
    return seconds_until(process, lambda: metrics.exists() and metrics.stat().st_size > 0)


def first_token(cache: Path, exported: Path) -> float:
    """Seconds from the start of a generating command to its first text."""
    process = command(cache, "generate", exported, "--max-tokens", 20, "--seed", 1)
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    return seconds_until(process, lambda: bool(process.stdout.read()))


@click.command(help=__doc__)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Measurements of each.")
@click.option("--head", type=click.Choice(HEADS), default="tree", show_default=True, help="Of the trained model.")
@click.option("--only", type=click.Choice(["train", "generate"]), help="Leave the other one out of the repetitions.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results to this file.")
def main(repeats: int, head: str, only: str | None, json_path: Path | None) -> None:
    """See the module's docstring."""
    if json_path is not None:
        output.check_writable(json_path)
    found: dict[str, list[float]] = {"train": [], "train, cached": [], "generate": []}
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        exported = here / "model.safetensors"
        for turn in range(repeats):
            cache = here / f"cache-{turn}"
            if only != "generate" or turn == 0:
                found["train"].append(first_step(cache, here / f"run-{turn}", head))
                found["train, cached"].append(first_step(cache, here / f"again-{turn}", head))
            if turn == 0 and command(cache, "export", here / "run-0", exported).wait():
                raise click.ClickException("The export failed.")
            if only != "train":
                found["generate"].append(first_token(here / f"generating-{turn}", exported))
            for name, seconds in found.items():
                if seconds:
                    click.echo(f"  {name:<16} {seconds[-1]:6.1f} s")
    summaries = {name: timing.summary(seconds) for name, seconds in found.items() if seconds}
    for name, row in summaries.items():
        click.echo(f"{name:<18} {row['median']:6.1f} s, the median of {row['repeats']}")
    if json_path is not None:
        output.write_json(json_path, {**machine.stamp(), "head": head, "seconds": summaries})


if __name__ == "__main__":
    main()
