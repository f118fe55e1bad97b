"""Write docs/results.md and its chart from the rows that tools/bench_train.py measured at marks of training time.

\b
    python tools/train_report.py results/2026-11-26-textbooks-72min.json docs/results.md docs/results.png
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flashlm_numba.system.display import plural
from tools.bench import charts, output
from tools.bench.rows import read_rows, uneven
from tools.bench.train_runs import PROMPT

Row = Mapping[str, Any]

HEADER = """# Results: what minutes of CPU time buy

Written by `tools/train_report.py` from [results/{name}](../results/{name}); don't edit it by hand.

The table shows the NLL in nats per token, with bits per byte in brackets, of all validation documents, by the rule of
`flashlm-numba eval`. The training clock counts the initial embedding, the tree, steps and checkpoints, but not
compiling, preparing and scoring. A value before the end is taken while the learning rate is still high. All runs but
`v3` and `torch:v3` end with a rate that has fallen to 0. Peak memory is that of the training process: ours includes its
last validation on a 32,768-token subset, and the baselines' excludes scoring.
"""

# the chart's words for a run; the table and the commands keep the names that bench_train.py takes
TITLES = {
    "tree": "flashlm-numba: tree head (default)",
    "dense": "flashlm-numba: exact softmax",
    "v3": "flashlm-numba: FlashLM v3's recipe",
    "torch:v3": "PyTorch: FlashLM v3's recipe",
    "torch:adaptive": "PyTorch: adaptive softmax on our trunk",
    "torch:adaptive@random": "PyTorch: adaptive softmax on our trunk",
    "torch:transformer": "PyTorch: transformer",
}


def points(row: Row) -> list[tuple[float, float, float]]:
    """(minutes, NLL, bits per byte) at every mark of a run and at its end."""
    marks = [(m["seconds"] / 60, m["nll"], m["bits_per_byte"]) for m in row.get("marks", [])]
    return [*marks, (row["seconds"] / 60, row["nll"], row["bits_per_byte"])]


def labelled(rows: Sequence[Row]) -> list[Row]:
    """The rows, with the date as "label" for runs that share a name with another recipe."""
    count = Counter(label(row) for row in rows)
    return [{**row, "label": f"{label(row)}, {row['date']}"} if count[label(row)] > 1 else row for row in rows]


def label(row: Row) -> str:
    """Name, budget and, if they are few, settings of a run.

    >>> label({"name": "tree", "settings": ["clip=1"], "minutes_asked": 10.0, "seed": 1})
    'tree clip=1, 10 minutes'
    """
    if "label" in row:
        return row["label"]
    settings = (
        row["settings"] if len(row["settings"]) <= 2 else [f"with {len(row['settings'])} settings (see Commands)"]
    )
    words = " ".join([row["name"], *settings])
    return f"{words}, {row['minutes_asked']:g} minutes" + (f", seed {row['seed']}" if row["seed"] != 1 else "")


def table(rows: Sequence[Row]) -> str:
    """A Markdown table with one line per run and one column per mark."""
    at = sorted({m["minutes"] for row in rows for m in row.get("marks", [])})
    lines = [
        f"| run | parameters | tokens/s | peak MB | {' | '.join(f'{mark:g} min' for mark in at)} | end |",
        "| --- " + "| ---: " * (4 + len(at)) + "|",
    ]
    for row in rows:
        found = {m["minutes"]: f"{m['nll']:.3f} ({m['bits_per_byte']:.3f})" for m in row.get("marks", [])}
        end = f"{row['nll']:.3f} ({row['bits_per_byte']:.3f}), {row['seconds'] / 60:.1f} min"
        cells = [label(row), f"{row['parameters']:,}", f"{row['tokens'] / row['seconds']:,.0f}"]
        cells += [f"{row['peak_rss_mb']:,.0f}", *(found.get(mark, "-") for mark in at), end]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machines(rows: Sequence[Row]) -> str:
    """One sentence per machine on which the rows were measured."""
    found: dict[str, list[str]] = {}
    for row in rows:
        m = row["machine"]
        found.setdefault(f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads", []).append(label(row))
    return "\n".join(f"- {machine}: {plural(len(names), 'run')}" for machine, names in found.items())


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines that explain the numbers: a row's "note", written by hand, and runs that cannot be compared."""
    lines = [f"- {label(row)}: {row['note']}" for row in rows if "note" in row]
    lines += [f"- {sentence}" for sentence in uneven(rows)]
    return ["", *lines] if lines else []


def data(rows: Sequence[Row]) -> str:
    """A sentence about the amount of text that the runs used."""
    sizes = dict.fromkeys((row["data"]["train"], row["data"]["validation"]) for row in rows if "data" in row)
    texts = [f"{train:,} tokens to train on and {validation:,} to validate" for train, validation in sizes]
    return f"The runs' text: {'; '.join(texts)}." if texts else ""


def samples(rows: Sequence[Row]) -> str:
    """The texts that each run generated at its marks and at its end."""
    parts = []
    for row in rows:
        texts = [(m["minutes"], m["text"]) for m in row.get("marks", []) if m.get("text")]
        texts += [(round(row["seconds"] / 60, 1), row["text"])] if row.get("text") else []
        if texts:
            parts.append(f"**{label(row)}**\n")
            parts += [f"- {minutes:g} min: *{' '.join(text.replace('*', ' ').split())}*" for minutes, text in texts]
            parts.append("")
    return "\n".join(parts)


def commands(rows: Sequence[Row]) -> str:
    """The bench_train.py commands that produce these rows, one per budget and set of settings."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        marks = tuple(m["minutes"] for m in row.get("marks", []))
        names = groups.setdefault((row["minutes_asked"], marks, tuple(row["settings"]), row["seed"]), [])
        if row["name"] not in names:
            names.append(row["name"])
    lines = []
    for (minutes, marks, settings, seed), names in groups.items():
        words = ["python tools/bench_train.py TOKENS RESULTS.json", f"--minutes {minutes:g}"]
        words += [f"--marks {','.join(f'{mark:g}' for mark in marks)}"] if marks else []
        words += [*(f"--set {setting}" for setting in settings), f"--seed {seed}", *names]
        lines.append("    " + " ".join(words))
    return "\n".join(lines)


def page(rows: Sequence[Row], results: Path, chart: str) -> str:
    """The text of docs/results.md."""
    rows = sorted(rows, key=lambda row: (row["minutes_asked"], row["bits_per_byte"]))
    return "\n".join(
        [
            HEADER.format(name=results.name),
            table(rows),
            *notes(rows),
            "",
            f"![NLL against minutes of training]({chart})",
            "",
            "## Machines",
            "",
            machines(rows),
            "",
            "## Commands",
            "",
            f"TOKENS is a folder that `flashlm-numba prepare` made. {data(rows)}",
            "",
            commands(rows),
            "",
            f'## What the models write after "{PROMPT}"',
            "",
            "Temperature 0.8, the 40 likeliest tokens, at the marks and the end. The PyTorch baselines write none.",
            "",
            samples(rows),
        ]
    )


def draw(rows: Sequence[Row]) -> Any:
    """Draw NLL against minutes of training, with logarithmic axes and one line per run."""
    figure = charts.new_figure(9, 6)
    axes = figure.subplots()
    known = Counter(TITLES.get(row["name"], label(row)) for row in rows)
    titles = {label(row): TITLES.get(row["name"], label(row)) for row in rows}
    titles = {name: title if known[title] == 1 else name for name, title in titles.items()}  # two runs of one title
    for row in sorted(rows, key=lambda row: row["nll"]):
        at = points(row)
        torch = row["name"].startswith("torch")
        axes.plot([p[0] for p in at], [p[1] for p in at], "--s" if torch else "-o", label=titles[label(row)])
    ticks = [1, 2, 5, 7, 10, 30, 72]
    axes.set(xscale="log", yscale="log", xlabel="minutes of training", ylabel="validation NLL, nats per token")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1f}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:.1f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    return figure


@click.command(help=__doc__)
@click.argument("results", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("markdown", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("chart", type=click.Path(path_type=Path, dir_okay=False))
def main(results: Path, markdown: Path, chart: Path) -> None:
    rows = labelled([row for row in read_rows(results) if "minutes_asked" in row])
    if not rows:
        raise click.UsageError(f"{results} has no runs of so many minutes; make some with bench_train.py --minutes.")
    if not charts.can_plot():
        raise click.UsageError("The chart needs matplotlib: pip install -e '.[dev]'")
    text, figure = page(rows, results, chart.name), draw(rows)
    if chart.suffix[1:] not in (kinds := figure.canvas.get_supported_filetypes()):
        raise click.UsageError(f"{chart} must end in one of .{', .'.join(kinds)}.")
    for path in (markdown, chart):
        output.check_writable(path)
    figure.savefig(chart, dpi=120)
    markdown.write_text(text, encoding="utf-8")
    click.echo(f"Wrote {markdown} and {chart}.")


if __name__ == "__main__":
    main()
