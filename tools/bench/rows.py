"""Rows of a results file: reading, adding rows from several processes, and printing as a table."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from tools.bench import output

UNEVEN = 1.05  # the ratio of two speeds above which runs of equal minutes are not compared


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none if it does not exist. Raises BadParameter if it holds something else."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise TypeError("rows")
        return rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise click.BadParameter(
            f"{path} is no results file of this program ({type(error).__name__}); name another, or a new one."
        ) from None


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to the current file, to which other processes may have added rows, and write it atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed
        output.write_json(path, {"rows": [*read_rows(path), row]})
    finally:
        os.close(folder)


def uneven(rows: Iterable[dict[str, Any]]) -> list[str]:
    """A sentence for each candidate whose runs of equal minutes saw unequal numbers of tokens, by more than UNEVEN.

    A difference of settings cannot be told from a difference of training between such rows.

    >>> uneven([{"name": "tree", "minutes_asked": 7, "tokens": tokens, "seconds": 420.0} for tokens in (10, 20)])
    ['tree: the runs of 7 minutes trained at unequal speeds, up to a factor of 2.00; compare them at equal tokens.']
    """
    rates: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        if "minutes_asked" in row:
            rates.setdefault((row["name"], row["minutes_asked"]), []).append(row["tokens"] / row["seconds"])
    return [
        f"{name}: the runs of {minutes:g} minutes trained at unequal speeds, up to a factor of "
        f"{max(found) / min(found):.2f}; compare them at equal tokens."
        for (name, minutes), found in rates.items()
        if max(found) > UNEVEN * min(found)
    ]


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as a Markdown table, by budget, then bits per byte, which do not depend on the vocabulary."""
    lines = [
        "| head | settings | seed | budget | NLL | bits/byte | seconds | tokens | tokens/s | parameters | peak MB |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def budget(row: dict[str, Any]) -> str:
        if "speed" in row:
            return f"{row['speed']['minutes']:g} minutes' worth"
        return f"{row['tokens_asked']:,} tokens" if "tokens_asked" in row else f"{row['minutes_asked']:g} minutes"

    for row in sorted(rows, key=lambda row: (budget(row), row["bits_per_byte"])):
        lines.append(
            f"| {row['name']} | {' '.join(row['settings']) or '-'} | {row['seed']} | {budget(row)} | {row['nll']:.3f} "
            f"| {row['bits_per_byte']:.4f} | {row['seconds']:.0f} | {row['tokens']:,} "
            f"| {row['tokens'] / row['seconds']:,.0f} "
            f"| {row['parameters']:,} | {row['peak_rss_mb']:,.0f} |"
        )
    return "\n".join(lines)
