"""Measure how fast candidates train on prepared data, for tools/bench_train.py --speeds.

\b
    python tools/bench_speed.py results/SPEEDS.json --data TOKENS --data OTHER dense tree

Every turn is a run of `flashlm-numba train` for some seconds, without validation. The turns of all data and candidates
alternate, so that a drift of the machine affects all of them. The machine must be quiet. A row is written for each
turn; bench_train.py takes the median of the rows that fit, so that a second call adds turns. NAME is one of our
candidates of tools/bench_train.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.system.threads import available_cores
from tools.bench import allocators, machine, output
from tools.bench.processes import RunFailed
from tools.bench.rows import add_row, read_rows
from tools.bench.speeds import speed_of_log
from tools.bench.train_candidates import OURS
from tools.bench.train_jobs import Job, expand
from tools.bench_train import check_settings, text_tokens

ENDLESS = 1_000_000  # steps; a plan in minutes would measure the speed first
STOPPED = 130  # the exit status of `train` after SIGINT


@click.command(help=__doc__)
@click.argument("path", metavar="SPEEDS.json", type=click.Path(path_type=Path))
@click.argument("names", metavar="NAME...", nargs=-1, required=True, type=click.Choice(list(OURS)))
@click.option("--data", "folders", multiple=True, required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--set", "settings", multiple=True, metavar="KEY=A,B", help="As in bench_train.py.")
@click.option("--seconds", type=click.FloatRange(min=1), default=12.0, show_default=True, help="Training of a turn.")
@click.option("--turns", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=available_cores(), show_default=True)
def main(
    path: Path,
    names: tuple[str, ...],
    folders: tuple[Path, ...],
    settings: tuple[str, ...],
    seconds: float,
    turns: int,
    threads: int,
) -> None:
    output.check_writable(path)
    read_rows(path)
    combinations = expand(settings)
    jobs = [Job(name, combination, 1, None, 1, threads) for combination in combinations for name in names]
    check_settings(jobs)
    sizes = {folder.resolve(): text_tokens(folder) for folder in folders}
    for turn in range(1, turns + 1):
        for folder, size in sizes.items():
            for job in jobs:
                row = {
                    "name": job.name,
                    "settings": list(job.settings),
                    **measured(job, folder, seconds),
                    "data": size,
                    "recipe": job.recipe,
                    "threads": threads,
                    **machine.stamp(threads),
                }
                add_row(path, row)
                words = " ".join([folder.name, job.name, *job.settings])
                click.echo(f"[{turn}/{turns}] {words}: {row['tokens_per_second']:,.0f} tokens/s", err=True)


def measured(job: Job, data: Path, seconds: float) -> dict[str, Any]:
    """Train in a temporary folder until so many seconds have passed since the first step, and stop.

    Returns seconds of the start, tokens per second, and steps.
    """
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        words = ["train", *OURS[job.name], *(word for setting in job.settings for word in ("--set", setting))]
        words += ["--steps", str(ENDLESS), "--seed", str(job.seed), "--threads", str(job.threads), str(data.resolve())]
        words += ["--set", "validate_every=0", "--set", "sample_tokens=0", "--set", "log_every=1", "--out", str(run)]
        process = subprocess.Popen([sys.executable, "-m", "flashlm_numba", *words], cwd=machine.ROOT, process_group=0)
        try:
            while process.poll() is None and not is_past(run / "metrics.jsonl", seconds):
                time.sleep(0.25)
        finally:
            process.send_signal(signal.SIGINT)
            status = process.wait()
        if status != STOPPED:
            raise RunFailed(f"`{' '.join(words)}` ended with status {status}.")
        lines = logged(run / "metrics.jsonl")
    return {**speed_of_log(lines), "steps": len(lines)}


def is_past(log: Path, seconds: float) -> bool:
    """Whether a log has so many seconds of training after its first step, and three steps at least."""
    lines = logged(log)
    return len(lines) > 2 and lines[-1]["seconds"] - lines[0]["seconds"] >= seconds


def logged(log: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; none before it exists."""
    if not log.exists():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").split("\n")[:-1]]


if __name__ == "__main__":
    allocators.restart()
    main()
