"""Options, arguments and types of values that commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from flashlm_numba.heads import HEADS
from flashlm_numba.model.config import ACTIVATIONS


class PathOrSource(click.Path):
    """A path, or a source's name; the empty one, as of an unset variable, is not the current folder here."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty.", param, ctx)
        return super().convert(value, param, ctx)


class Number(click.FloatRange):
    """A number in a range; NaN and infinity, which float() reads, are not numbers here."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class HeadName(click.Choice):
    """A name in HEADS, one that was registered after this module was imported too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        self.choices = tuple(HEADS)
        return super().convert(value, param, ctx)


threads = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads to compute with. Default: every core this process may use.",
)
checkpoint = click.option("--checkpoint", metavar="step-N", help="Checkpoint of the run to read. Default: the newest.")
ema = click.option("--ema", is_flag=True, help="Use the EMA of the weights, where the run keeps one (recipe v3).")
activations = click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    help="Arithmetic of the ternary layers: float, or int8, which rounds what goes into them: faster and slightly off "
    "(docs/kernels.md). Default: as the model was trained.",
)
json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
run = click.argument("run", type=PathOrSource(path_type=Path))
# of a source of documents
subset = click.option("--subset", help="Configuration of a Hugging Face dataset, such as sample-10BT.")
lines = click.option(
    "--lines", is_flag=True, help="Every line of a .txt file is a document, instead of the whole file."
)
column = click.option(
    "--column", default="text", show_default=True, help="Where parquet, JSON and hub rows keep the text."
)


def use_threads(threads: int | None) -> int:
    """Set the thread count; a number that this machine lacks is a usage error."""
    from flashlm_numba.system.threads import set_threads

    try:
        return set_threads(threads)
    except ValueError as error:
        raise click.BadParameter(f"{error}.", param_hint="'--threads'") from None
