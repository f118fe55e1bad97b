"""The command `plot`."""

from __future__ import annotations

from pathlib import Path

import click

from flashlm_numba.cli.options import PathOrSource, echo


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=PathOrSource(path_type=Path))
@click.option("--out", type=PathOrSource(path_type=Path), required=True, help="File for the chart: .png, .svg or .pdf.")
@click.option(
    "--x",
    type=click.Choice(["minutes", "steps", "tokens"]),
    default="minutes",
    show_default=True,
    help="The horizontal axis.",
)
def plot(runs: tuple[Path, ...], out: Path, x: str) -> None:
    """Draw the training of one RUN or of several: loss, validation, speed, and what the time went into.

    A run may still be training. The command needs the package of `pip install 'flashlm-numba[plot]'`.
    """
    from flashlm_numba.training.plots import plot_runs

    echo(str(plot_runs(runs, out, x=x)))
