"""Training speed by number of threads, and what more threads would bring.

\b
    python tools/bench_scaling.py                   1, 2, ... threads of this machine
    python tools/bench_scaling.py --json out.json   write what was measured
    python tools/bench_scaling.py --count-only      count the work per thread for up to 64 threads; measures nothing

The program trains the default recipe on the built-in text, a few steps with each number of threads in turn. It prints
tokens/s, and fits to the time of every part of a step (trunk, head, optimiser, ...) a serial share and a share that is
divided among the threads. From these it predicts the speed with more threads than the machine has. The prediction knows
how evenly the work divides, but neither the memory's limit nor a clock that falls when more cores work. Use a quiet
machine.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.data.builtin import default_corpus
from flashlm_numba.data.shards import TokenData, open_tokens
from flashlm_numba.model import build
from flashlm_numba.model.recipes import RECIPES, from_recipe
from flashlm_numba.system.errors import UserError
from flashlm_numba.system.threads import available_threads, set_threads
from flashlm_numba.training.optimizer import Optimizer
from flashlm_numba.training.session import Session
from flashlm_numba.training.step import train_step
from tools.bench import machine, output, scaling, timing

PREDICTED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
PARTS = ("trunk", "head", "optimizer", "embedding", "rest")
SECONDS = 1.0  # of steps with each number of threads, per turn


def new_session(data: TokenData, recipe: str, threads: int, settings: tuple[str, ...] = ()) -> Session:
    """A model of the recipe before its first step, with a random embedding, which is as fast as any."""
    run = from_recipe(recipe, ["embedding_init=random", *settings])
    run = dataclasses.replace(run, threads=threads, data=str(data.folder), data_hash=data.hash)
    model, _ = build.new_model(run, data, lambda line: None)
    return Session(run, data.folder, data, model, Optimizer(model.parameters, model.gradients, run.optimizer), {})


def steps(session: Session, threads: int) -> Iterator[dict[str, float]]:
    """Seconds of every part of some steps; the first, which allocates, is left out."""
    set_threads(threads)
    phase, began, step = session.run.training.phases[-1], 0.0, 0
    while not began or time.perf_counter() - began < SECONDS:
        done = train_step(session, phase, step + 1, lr=1e-3)
        if step:
            parts = {name: share * done.seconds for name, share in done.shares.items()}
            yield {**parts, "rest": done.seconds - sum(parts.values()), "step": done.seconds}
        step, began = step + 1, began or time.perf_counter()


def measure(session: Session, counts: list[int], turns: int) -> dict[int, dict[str, Any]]:
    """By number of threads, the summary of every part's seconds; the numbers of threads take turns."""
    found: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    with click.progressbar(range(turns), label="Measuring", file=sys.stderr) as bar:
        for _ in bar:
            for count in counts:
                found[count] += steps(session, count)
    return {
        count: {name: timing.summary([row[name] for row in rows]) for name in (*PARTS, "step")}
        for count, rows in found.items()
    }


def predict(measured: dict[int, dict[str, Any]], shares: dict[int, float]) -> dict[str, Any]:
    """Serial and divided seconds of every part, and the seconds of a step by number of threads.

    They are fitted to the fastest of all steps, because other work on the machine only adds to a time.
    """
    fits = {}
    for name in PARTS:
        own = {count: share if name == "trunk" else 1 / count for count, share in shares.items()}
        fits[name] = scaling.fit({count: row[name]["min"] for count, row in measured.items()}, own)
    seconds = {
        count: sum(
            serial + divided * (share if name == "trunk" else 1 / count) for name, (serial, divided) in fits.items()
        )
        for count, share in shares.items()
    }
    parts = {name: {"serial_s": serial, "divided_s": divided} for name, (serial, divided) in fits.items()}
    return {"parts": parts, "step_s": seconds}


def report(rates: dict[int, dict[str, float]], measured: dict[int, dict[str, Any]], found: dict[str, Any]) -> None:
    """Print speeds, parts and predictions."""
    one, most = measured[1]["step"]["min"], max(rates)
    for count, rate in rates.items():
        times = rate["median"] / rates[1]["median"], one / measured[count]["step"]["min"]
        click.echo(
            f"{count:>3} threads  {rate['median']:>9,.0f} tokens/s  ({rate['p20']:,.0f} to {rate['p80']:,.0f})  "
            f"{times[0]:.2f} times one, the fastest step {times[1]:.2f}"
        )
    click.echo("Part of a step        one thread      serial   divided")
    for name, part in found["parts"].items():
        whole, serial, divided = (1e3 * t for t in (measured[1][name]["min"], part["serial_s"], part["divided_s"]))
        click.echo(f"  {name:<18} {whole:>9.2f} ms {serial:>8.2f} {divided:>9.2f}")
    click.echo("Predicted, if neither the memory nor the clock limits it:")
    for count, seconds in sorted(found["step_s"].items()):
        if count > most:
            click.echo(f"{count:>3} threads  {found['step_s'][1] / seconds:>6.2f} times one")
    serial = sum(part["serial_s"] for part in found["parts"].values()) / found["step_s"][1]
    bound = f", so at most {1 / serial:.0f} times one." if serial else "."
    click.echo(f"Serial: {serial:.1%} of a step on one thread{bound}")


@click.command(help=__doc__)
@click.option("--recipe", type=click.Choice(list(RECIPES)), default="default", show_default=True)
@click.option("--set", "settings", multiple=True, help="As in `train`.")
@click.option("--data", type=click.Path(path_type=Path), help="Prepared tokens. Default: the built-in text.")
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True, help="Turns, a second each.")
@click.option("--most", type=click.IntRange(min=1), help="Most threads. Default: every core.")
@click.option("--count-only", is_flag=True, help="Count the work per thread, and measure nothing.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results to this file.")
def main(
    recipe: str,
    settings: tuple[str, ...],
    data: Path | None,
    repeats: int,
    most: int | None,
    count_only: bool,
    json_path: Path | None,
) -> None:
    """See the module's docstring."""
    if json_path is not None:
        output.check_writable(json_path)
    try:
        run = from_recipe(recipe, settings)
        phase = run.training.phases[-1]
        batch = phase.batch_size, phase.seq_len
        most = most or available_threads()
        shares = {
            n: scaling.trunk_share(run.model, *batch, n) for n in sorted({*PREDICTED, *range(1, min(most, 8) + 1)})
        }
        if count_only:
            for count, share in shares.items():
                click.echo(f"{count:>3} threads: the busiest has {count * share:.2f} times the mean of the trunk")
            return
        counts = [n for n in shares if n < most] + [most]
        shares[most] = scaling.trunk_share(run.model, *batch, most)
        set_threads(most)
        session = new_session(open_tokens(data or default_corpus()), recipe, most, settings)
    except (UserError, ValueError) as mistake:
        raise click.ClickException(str(mistake)) from None
    click.echo(f"{machine.environment(most)['cpu']}; {recipe}, {batch[0]} x {batch[1]} tokens x {phase.grad_accum}")
    measured = measure(session, counts, repeats)
    found = predict(measured, shares)
    rates = {
        count: timing.rate(row["step"], phase.batch_size * phase.seq_len * phase.grad_accum)
        for count, row in measured.items()
    }
    report(rates, measured, found)
    if json_path is not None:
        result = {
            "recipe": recipe,
            "settings": list(settings),
            "batch": [*batch, phase.grad_accum],
            "tokens_per_s": rates,
        }
        times = {count: {name: row[name]["min"] for name in row} for count, row in measured.items()}
        output.write_json(
            json_path, {**machine.stamp(most), **result, "fastest_s": times, **found, "trunk_share": shares}
        )


if __name__ == "__main__":
    main()
