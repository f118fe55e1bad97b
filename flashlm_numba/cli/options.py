"""Options, arguments and parameter types that the commands share."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import click

from flashlm_numba.heads import HEADS
from flashlm_numba.model.config import ACTIVATIONS
from flashlm_numba.system.paths import printable


class PathOrSource(click.Path):
    """A path or the name of a source. An empty string, as from an unset shell variable, is an error.

    `~` is expanded here too, since a shell leaves it in --out=~/run.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty.", param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)


class Text(click.ParamType):
    """A text in UTF-8. In the locale C, Python decodes a command line as ASCII and keeps other bytes as surrogates."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            try:
                return os.fsencode(value).decode()
            except UnicodeError:
                self.fail("it is not UTF-8.", param, ctx)
        return value


class Number(click.FloatRange):
    """A finite number in a range. NaN and infinity, which float() accepts, are errors."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class HeadName(click.Choice):
    """A name in HEADS, including heads registered after this module was imported."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        self.choices = tuple(HEADS)
        return super().convert(value, param, ctx)


threads = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Number of threads. Default: every core that this process may use.",
)
checkpoint = click.option(
    "--checkpoint",
    metavar="step-N",
    help="Checkpoint of the run. Default: the best on the validation text, or, with --resume, the newest.",
)
ema = click.option("--ema", is_flag=True, help="Use the EMA of the weights, if the run has one (recipe v3).")
own_data = click.option(
    "--data",
    "own_data",
    metavar="DIR",
    type=PathOrSource(path_type=Path),
    help="Folder of the tokens that RUN was trained on, if they have moved. Default: where they were, seen from RUN.",
)
activations = click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    help="Arithmetic of the ternary layers: float, or int8, which quantises their inputs and is faster but less "
    "accurate (docs/kernels.md). Default: as the model was trained.",
)
json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
run = click.argument("run", type=PathOrSource(path_type=Path))
# options for a source of documents
subset = click.option("--subset", help="Configuration of a Hugging Face dataset, such as sample-10BT.")
lines = click.option(
    "--lines", is_flag=True, help="Treat each line of a .txt file as a document. Default: one document per file."
)
column = click.option(
    "--column",
    default="text",
    show_default=True,
    help="Column that holds the text in parquet, JSON and hub rows; a.b is field b of column a.",
)
skip_missing = click.option(
    "--skip-missing", is_flag=True, help="Leave out files without the column. Default: refuse them."
)


def echo(line: str, *, err: bool = False) -> None:
    """Print a line that may contain names of files."""
    click.echo(printable(line), err=err)


def use_threads(threads: int | None) -> int:
    """Set the number of threads. A number beyond what this machine has is a usage error."""
    from flashlm_numba.system.threads import set_threads

    try:
        return set_threads(threads)
    except ValueError as error:
        raise click.BadParameter(f"{error}.", param_hint="'--threads'") from None
