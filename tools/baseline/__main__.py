"""FlashLM v3 trained and timed in PyTorch: the baseline of the benchmarks.

\b
    python -m tools.baseline head                      linear + cross-entropy, and the adaptive head
    python -m tools.baseline trunk                     hidden states, forward and backward
    python -m tools.baseline step                      a whole training step, and the share of each part
    python -m tools.baseline train DATA --minutes 10   training on prepared shards (`flashlm-numba prepare`)

It needs the extra `baseline` (pip install -e '.[baseline]'). Every result is one JSON object per line.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from flashlm_numba.model.settings import parse_phase
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.threads import available_cores
from tools.baseline import speed
from tools.baseline.train import Settings, train
from tools.bench import machine, timing

Command = Callable[..., None]


def emit(**result: Any) -> None:
    """Print one JSON object on a line, floats to five decimals."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: short(item) for name, item in value.items()}
        return round(value, 5) if isinstance(value, float) else value

    click.echo(json.dumps(short(result)))


def timed(command: Command) -> Command:
    """The options of all timing commands."""
    for option in (
        click.option("--data", type=click.Path(path_type=Path), help="Prepared tokens; default: Zipf's law."),
        click.option("--seed", default=0, show_default=True),
        click.option("--repeats", default=5, show_default=True),
        click.option("--threads", default=available_cores(), show_default=True),
    ):
        command = option(command)
    return command


def set_up(threads: int, seed: int) -> None:
    """Fix torch's threads and seed, and print the machine."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    emit(**machine.environment(threads))


@click.group(help=__doc__)
def main() -> None:
    """See the module's docstring."""


@main.command("head")
@timed
@click.option("--rows", "rows_list", multiple=True, type=int, default=(512, 2048), show_default=True)
@click.option("--vocab", default=50_257, show_default=True)
@click.option("--dim", default=256, show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Also torch.compile (needs a C++ compiler).")
def head_command(threads: int, rows_list: tuple[int, ...], vocab: int, dim: int, **options: Any) -> None:
    """Forward and backward of the heads, positions per second."""
    set_up(threads, options["seed"])
    for rows in rows_list:
        for name, seconds in speed.measure_heads(rows, vocab, dim, **options).items():
            emit(head=name, rows=rows, seconds=seconds, positions_per_s=timing.rate(seconds, rows))


@main.command("trunk")
@timed
@click.option("--batch", default="16x128", show_default=True, help="ROWSxLENGTH")
def trunk_command(threads: int, batch: str, **options: Any) -> None:
    """Hidden states, forward and backward, with the embedding's gradient; tokens per second."""
    set_up(threads, options["seed"])
    phase = parse_phase(batch)
    seconds = speed.measure_trunk(phase, **options)
    emit(trunk=batch, seconds=seconds, tokens_per_s=timing.rate(seconds, phase.batch_size * phase.seq_len))


@main.command("step")
@timed
@click.option("--batch", "batches", multiple=True, default=("16x128",), show_default=True, help="ROWSxLENGTH[xMICRO]")
@click.option("--head", type=click.Choice(["dense", "adaptive"]), default="dense", show_default=True)
@click.option("--div-value", default=4.0, show_default=True, help="Of the adaptive head; 4 is torch's default.")
@click.option("--positions", "fractions", multiple=True, type=float, default=(1.0, 0.25), show_default=True)
@click.option("--label-smoothing", default=0.0, show_default=True)
@click.option("--z-loss", default=0.0, show_default=True)
@click.option("--normuon", type=click.Choice(["v3", "published"]), default="v3", show_default=True)
@click.option("--fused", is_flag=True, help="torch's fused AdamW.")
def step_command(
    threads: int,
    batches: tuple[str, ...],
    head: str,
    div_value: float,
    fractions: tuple[float, ...],
    **options: Any,
) -> None:
    """Complete training steps: tokens per second, and the shares of head, trunk and optimiser."""
    set_up(threads, options["seed"])
    name = head
    if head == "adaptive":
        name = f"adaptive-div{div_value:g}"
        options["adaptive_div"] = div_value
        del options["label_smoothing"], options["z_loss"]  # it knows none
    for batch in batches:
        for positions in fractions:
            result = speed.measure_step(parse_phase(batch), positions=positions, **options)
            emit(batch=batch, positions=positions, head=name, **result)


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


if __name__ == "__main__":
    main()
