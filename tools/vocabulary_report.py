"""Print the table of vocabularies and draw its chart, from rows of tools/bench_train.py --speeds.

\b
    python tools/vocabulary_report.py RESULTS.json --plot CHART.png
    python tools/vocabulary_report.py results/2026-12-01-textbooks-2min-vocabulary-rates.json --best adamw_lr
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

if __package__ in (None, ""):  # run as a file, the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.bench import charts, output
from tools.bench.rows import read_rows

Row = Mapping[str, Any]


def mixer(row: Row) -> str:
    """The mixer of a row's recipe."""
    return row["recipe"].get("model.mixer", "conv")


def groups(rows: Iterable[Row]) -> dict[tuple[int, str, str], list[Row]]:
    """The rows by size of the vocabulary, head and mixer; a group's rows differ by seed or by settings."""
    found: dict[tuple[int, str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["vocab_size"], row["name"], mixer(row), row["seed"])):
        found.setdefault((row["vocab_size"], row["name"], mixer(row)), []).append(row)
    return found


def table(rows: Iterable[Row]) -> str:
    """A Markdown table with one line per vocabulary, head and mixer: the mean over its seeds."""
    lines = [
        "| vocabulary | tokens | head | mixer | bits/byte | by seed | parameters | packed MB | tokens seen | tokens/s "
        "| kB/s | peak MB |",
        "| --- | ---: | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (size, name, kind), same in groups(rows).items():
        first, scores = same[0], [row["bits_per_byte"] for row in same]
        # the speed by which the minutes became tokens, measured alone
        speed = first["speed"]["tokens_per_second"]
        cells = [
            *(first["vocabulary"], f"{size:,}", name, kind, f"{statistics.fmean(scores):.4f}"),
            ", ".join(f"{score:.4f}" for score in scores),
            *(f"{first['parameters']:,}", f"{first['packed_bytes'] / 1e6:.2f}", f"{first['tokens'] / 1e6:.2f}M"),
            *(f"{speed:,.0f}", f"{speed * first['train_bytes_per_token'] / 1e3:.1f}"),
            f"{max(row['peak_rss_mb'] for row in same):,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def best(rows: Iterable[Row], setting: str) -> str:
    """A Markdown table of the bits per byte by each value of a setting, with the best one in bold."""
    lines = [f"| vocabulary | head | mixer | bits/byte by {setting} |", "| --- | --- | --- | --- |"]
    for (_, name, kind), same in groups(rows).items():
        scores = {
            words.partition("=")[2]: row["bits_per_byte"]
            for row in same
            for words in row["settings"]
            if words.partition("=")[0] == setting
        }
        low = min(scores.values(), default=0.0)
        words = [
            f"**{value}: {score:.4f}**" if score == low else f"{value}: {score:.4f}" for value, score in scores.items()
        ]
        lines.append(f"| {same[0]['vocabulary']} | {name} | {kind} | {', '.join(words)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row]) -> Any:
    """Draw bits per byte against the size of the vocabulary, one line per head; other mixers are points."""
    figure = charts.new_figure(8, 5)
    axes = figure.subplots()
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for (size, name, kind), same in groups(rows).items():
        lines.setdefault((name, kind), []).append((size, statistics.fmean(row["bits_per_byte"] for row in same)))
    for (name, kind), points in lines.items():
        words = f"{name} head" if kind == "conv" else f"{name} head, {kind} mixer"
        axes.plot(*zip(*points, strict=True), "-o" if kind == "conv" else "s", label=words)
    sizes = sorted({row["vocab_size"] for row in rows})
    axes.set(xscale="log", xlabel="tokens in the vocabulary", ylabel="validation, bits per byte")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


@click.command(help=__doc__)
@click.argument("results", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--best", "setting", metavar="SETTING", help="Show which of its values is best instead.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the chart into this PNG file.")
def main(results: Path, setting: str | None, plot: Path | None) -> None:
    rows = [row for row in read_rows(results) if "speed" in row]
    if not rows:
        raise click.UsageError(f"{results} has no rows of bench_train.py --speeds.")
    click.echo(table(rows) if setting is None else best(rows, setting))
    if plot is None:
        return
    if not charts.can_plot():
        raise click.UsageError("The chart needs matplotlib: pip install -e '.[dev]'")
    output.check_writable(plot)
    draw(rows).savefig(plot, dpi=120)


if __name__ == "__main__":
    main()
