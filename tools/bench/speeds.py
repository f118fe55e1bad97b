"""Speeds of training, measured alone, by which bench_train.py turns minutes into tokens.

Tokens do not depend on what else the machine does, so that runs of "ten minutes" can be made on any day, on any
machine, and beside other work: all of them get what ten minutes are worth on the machine that measured the speeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from tools.bench.train_jobs import Job

RESERVE = 0.02  # the share of its minutes that `train --minutes` keeps for starting and validating
RATES = ("adamw_lr", "normuon_lr", "nonembedding_lr_scale")  # learning rates: a step takes as long with any value


@dataclass(frozen=True)
class Speed:
    """How fast a candidate trains: the median of several turns."""

    start_seconds: float  # for the initial embedding and the tree
    tokens_per_second: float
    turns: int

    def tokens(self, minutes: float) -> int:
        """The tokens of a run of so many minutes. Raises ClickException if its start takes them all."""
        seconds = 60 * minutes * (1 - RESERVE) - self.start_seconds
        if seconds <= 0:
            raise click.ClickException(
                f"{minutes:g} minutes are too few: starting alone takes {self.start_seconds:.0f} seconds."
            )
        return int(seconds * self.tokens_per_second)


def speed_of_log(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """A turn's metrics.jsonl, without its first step. Raises ClickException for fewer than three steps."""
    if len(lines) < 3:
        raise click.ClickException(f"A turn of {len(lines)} steps says nothing about the speed; give more --seconds.")
    first, last = lines[0], lines[-1]
    per_token = (last["seconds"] - first["seconds"]) / (last["tokens"] - first["tokens"])
    return {
        "start_seconds": round(max(0.0, first["seconds"] - first["tokens"] * per_token), 3),
        "tokens_per_second": round(1 / per_token, 1),
    }


def same_work(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without its learning rates."""
    return {name: value for name, value in recipe.items() if name.partition(".")[2] not in RATES}


def speed_of(job: Job, data: Mapping[str, int], rows: Iterable[Mapping[str, Any]]) -> Speed:
    """The speed of a job on data of these sizes, by the rows of bench_speed.py. Raises ClickException if none is there.

    data : tokens of text in each split
    """
    work = same_work(job.recipe)
    turns = [
        row
        for row in rows
        if row["name"] == job.name
        and row["data"] == data
        and row["threads"] == job.threads
        and same_work(row["recipe"]) == work
    ]
    if not turns:
        words = " ".join([job.name, *job.settings])
        raise click.ClickException(
            f"The file of speeds has none of {words} on this data with {job.threads} threads; "
            "measure it with tools/bench_speed.py."
        )
    return Speed(
        statistics.median(row["start_seconds"] for row in turns),
        statistics.median(row["tokens_per_second"] for row in turns),
        len(turns),
    )
