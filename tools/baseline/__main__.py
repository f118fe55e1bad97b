"""FlashLM v3, or a transformer, trained in PyTorch: the baselines of the benchmarks.

\b
    python -m tools.baseline train DATA --minutes 10   training on prepared shards (`flashlm-numba prepare`)

It needs the extra `baseline` (pip install -e '.[baseline]'). Every result is one JSON object per line.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from flashlm_numba.system.errors import UserError
from tools.baseline.train import Settings, train

Command = Callable[..., None]


def emit(**result: Any) -> None:
    """Print one JSON object on a line, floats to five decimals."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: short(item) for name, item in value.items()}
        return round(value, 5) if isinstance(value, float) else value

    click.echo(json.dumps(short(result)))


@click.group(help=__doc__)
def main() -> None:
    """See the module's docstring."""


def trained(command: Command) -> Command:
    """Add one option per field of Settings."""
    for item in reversed(dataclasses.fields(Settings)):
        more = dict(item.metadata)
        declared = "--" + more.pop("name", item.name).replace("_", "-")
        if choices := more.pop("choices", None):
            more["type"] = click.Choice(choices)
        if item.default == ():
            more |= {"multiple": True, "type": float}
        if item.default is False:
            more["is_flag"] = True
        command = click.option(declared, item.name, default=item.default, show_default=True, **more)(command)
    return command


@main.command("train")
@click.argument("data", type=click.Path(path_type=Path))
@trained
def train_command(data: Path, **settings: Any) -> None:
    """Train on prepared tokens; validates outside the clock by the rule of `flashlm-numba eval`."""
    try:
        train(data, Settings(**settings), emit)
    except UserError as error:
        raise click.UsageError(str(error)) from None


def check(words: Sequence[str]) -> None:
    """Raise UserError unless `train` can start with these options, given as words of a command line."""
    try:
        options = train_command.make_context("train", [*words, "DATA"]).params
        Settings(**{name: value for name, value in options.items() if name != "data"}).check()
    except click.UsageError as error:
        raise UserError(error.format_message()) from None


if __name__ == "__main__":
    main()
