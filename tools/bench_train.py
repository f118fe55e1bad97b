"""Train heads and settings, ours and PyTorch's, on the same data with the same budget, and compare their NLL.

\b
    python tools/bench_train.py DATA results/NAME.json --tokens 300000 dense tree    equal tokens
    python tools/bench_train.py DATA results/NAME.json --minutes 10 dense tree       equal time of training
    python tools/bench_train.py DATA results/NAME.json --tokens 300000 --set adamw_lr=1e-3,2e-3,4e-3 dense tree
    python tools/bench_train.py --table results/NAME.json                             the rows as a Markdown table

torch:transformer is another architecture, and has settings of its own: layers, width, heads, phases=ROWSxCONTEXT and
others. Compare runs on data of different vocabularies by bits per byte.

With --minutes and --speeds FILE, a run gets the tokens that so many minutes are worth at the speed that bench_speed.py
measured alone and wrote into FILE. Such runs may share the machine, and be made on several days.

With --minutes, --marks 1,5,7 also scores every run at these minutes of training, outside the clock. Our runs generate a
text at each mark and at the end, and their metrics.jsonl is saved in results/NAME/. With --runs DIR the runs are saved
in DIR, and an interrupted run continues there.

DATA is a folder written by `flashlm-numba prepare`. Every run is a separate process, and is scored on all validation
documents by the rule of `flashlm-numba eval`. A row is written as soon as its run ends. A run whose row is already in
the file, with the current recipe, is skipped, so the same command continues after an interruption or on another day.
Runs with equal tokens may share the machine with other work, but then their times are meaningless. Runs with equal time
need the machine alone. An interrupted baseline starts again.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.data.shards import open_tokens
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.threads import available_cores
from tools.bench import allocators, output
from tools.bench.processes import RunFailed
from tools.bench.rows import add_row, read_rows, table, uneven
from tools.bench.speeds import speed_of
from tools.bench.train_candidates import BASELINES, OURS
from tools.bench.train_jobs import Job, expand
from tools.bench.train_runs import measured


@click.command(help=__doc__)
@click.argument("data_and_results", nargs=-1, metavar="[DATA RESULTS.json NAME...]")
@click.option("--tokens", type=click.IntRange(min=1), help="Budget of every run in tokens.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Budget in minutes of training.")
@click.option(
    "--speeds",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="With --minutes: turn them into tokens by the speeds of this file.",
)
@click.option("--marks", default="", metavar="A,B", help="Score each run at these minutes of training too.")
@click.option("--runs", type=click.Path(path_type=Path, file_okay=False), help="Keep the runs here, and resume them.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(1,), show_default=True)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=A,B", help="A setting, or several in turn; [A,B] is one."
)
@click.option("--threads", type=click.IntRange(min=1), default=available_cores(), show_default=True)
@click.option("--table", "table_path", type=click.Path(path_type=Path, exists=True), help="Print this file's rows.")
def main(
    data_and_results: tuple[str, ...],
    tokens: int | None,
    minutes: float | None,
    speeds: Path | None,
    marks: str,
    runs: Path | None,
    seeds: tuple[int, ...],
    settings: tuple[str, ...],
    threads: int,
    table_path: Path | None,
) -> None:
    if table_path is not None:
        say_table(read_rows(table_path))
        return
    if len(data_and_results) < 3 or (tokens is None) == (minutes is None):
        raise click.UsageError("Give DATA, RESULTS.json, one name or more, and either --tokens or --minutes.")
    data, path, names = Path(data_and_results[0]).resolve(), Path(data_and_results[1]), data_and_results[2:]
    check_names(names, with_tokens=tokens is not None)
    output.check_writable(path)
    read_rows(path)
    at = read_marks(marks, minutes)
    if speeds is not None and (minutes is None or at):
        raise click.UsageError("--speeds belongs to --minutes, without --marks.")
    jobs = [
        Job(name, combination, seed, tokens, minutes, threads, at)
        for combination in expand(settings)
        for seed in seeds
        for name in names
    ]
    check_settings(jobs)
    size = text_tokens(data)
    if speeds is not None:
        jobs = [in_tokens(job, size, read_rows(speeds)) for job in jobs]
    runs = None if runs is None else runs.resolve()
    failures = []
    for number, job in enumerate(jobs, 1):
        if any(job.made(row) and row.get("data", size) == size for row in read_rows(path)):
            click.echo(f"[{number}/{len(jobs)}] {path} has its row already: {' '.join(job.command)}", err=True)
            continue
        click.echo(f"[{number}/{len(jobs)}] {' '.join(job.command)}", err=True)
        try:
            row = {**measured(job, data, path, runs), "data": size}
        except (RunFailed, UserError) as error:
            click.echo(f"Error: {error}", err=True)
            failures.append(job)
            continue
        try:
            add_row(path, row)
        except (OSError, click.ClickException) as error:  # hours of work: the row is not lost
            click.echo(json.dumps(row))
            why = error.message if isinstance(error, click.ClickException) else error.strerror
            raise click.ClickException(f"{path} cannot be written ({why}); the row is above.") from None
        click.echo(table([row]).splitlines()[-1], err=True)
    if failures:
        failed = ", ".join(" ".join([job.name, *job.settings]) for job in failures)
        raise click.ClickException(f"{len(failures)} of {len(jobs)} runs failed, see above: {failed}.")


def say_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows as Markdown, and which of them cannot be compared."""
    click.echo(table(rows))
    for sentence in uneven(rows):
        click.echo(f"\n{sentence}")


def in_tokens(job: Job, size: dict[str, int], speeds: Sequence[dict[str, Any]]) -> Job:
    """A job in minutes as one in tokens, by the rows of bench_speed.py. Raises ClickException without its speed."""
    assert job.minutes is not None
    speed = speed_of(job, size, speeds)
    return replace(job, tokens=speed.tokens(job.minutes), minutes=None, speed={"minutes": job.minutes, **asdict(speed)})


def check_names(names: Sequence[str], with_tokens: bool) -> None:
    """Raise UsageError for an unknown name, or one that cannot run here or with a budget in tokens."""
    if unknown := [name for name in names if name not in OURS and name not in BASELINES]:
        raise click.UsageError(f"There is no {unknown[0]}; there are {', '.join([*OURS, *BASELINES])}.")
    if with_tokens and (own := [name for name in names if "total" in BASELINES.get(name, {})]):
        raise click.UsageError(
            f"{own[0]} has a schedule of its own and is stopped by --minutes; --tokens is for others."
        )
    if importlib.util.find_spec("torch") is None and (baselines := [name for name in names if name in BASELINES]):
        raise click.UsageError(f"{baselines[0]} needs torch, which is not installed: pip install -e '.[baseline]'")


def read_marks(text: str, minutes: float | None) -> tuple[float, ...]:
    """Sorted minutes from "1,5,7". Raises UsageError for marks outside the minutes of a run."""
    try:
        marks = tuple(sorted(float(mark) for mark in text.split(",") if mark.strip()))
    except ValueError:
        raise click.UsageError(f"--marks takes minutes separated by commas, got '{text}'.") from None
    if marks and (minutes is None or not 0 < marks[0] <= marks[-1] < minutes):
        raise click.UsageError("--marks must lie between 0 and --minutes.")
    return marks


def check_settings(jobs: Iterable[Job]) -> None:
    """Raise UsageError for an unknown setting or a wrong value, before the first run."""
    try:
        for job in jobs:
            _ = job.recipe
            if job.name in BASELINES:
                check_baseline(job)
    except UserError as error:
        raise click.UsageError(str(error)) from None


def check_baseline(job: Job) -> None:
    """Raise UserError or UsageError for a wrong value of a baseline's settings."""
    from tools.baseline.__main__ import check  # it needs torch, which only baselines do

    check(job.baseline_words(1))
    if not job.published:
        _ = job.tokens_per_step


def text_tokens(data: Path) -> dict[str, int]:
    """Tokens of text in each split of prepared data. Raises UsageError without data or validation documents."""
    try:
        splits = open_tokens(data).manifest.splits
    except UserError as error:
        raise click.UsageError(str(error)) from None
    size = {name: split.text_tokens for name, split in splits.items()}
    if not size["validation"]:
        raise click.UsageError(f"{data} holds no validation text to score by; prepare it with some.")
    return size


if __name__ == "__main__":
    allocators.restart()
    main()
