"""Charts of runs from their logs: loss, validation, speed, and what the time went into."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashlm_numba.system.errors import UserError
from flashlm_numba.training.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"minutes": "minutes of training", "steps": "steps", "tokens": "million tokens"}
PARTS = ("embedding", "trunk", "head", "optimizer")
FORMATS = (".png", ".svg", ".pdf")
_WINDOW = 0.02  # share of a run's lines over which a curve is averaged
# of Okabe and Ito 2008, which colour-blind readers can tell apart; in an order that also differs in lightness
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_PART_COLOURS = ("#56B4E9", "#0072B2", "#D55E00", "#009E73", "#BBBBBB")


def check_package() -> None:
    """Raise UserError if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("`plot` needs matplotlib; install it with `pip install 'flashlm-numba[plot]'`.")


def averaged(values: np.ndarray) -> np.ndarray:
    """A curve (n,) with each value replaced by the mean of those around it, of fewer at its ends.

    >>> averaged(np.arange(5.0)).tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    reach = int(len(values) * _WINDOW / 2)
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    at = np.arange(len(values))
    wide = np.minimum(np.minimum(at, len(values) - 1 - at), reach)
    return (sums[at + wide + 1] - sums[at - wide]) / (2 * wide + 1)


def plot_runs(folders: Sequence[Path], out: Path, *, x: str = "minutes") -> Path:
    """Draw runs into one file, .png, .svg or .pdf. x : one of AXES. Returns out.

    Raises UserError if a run has no log or no line yet, the name of the file ends otherwise, or matplotlib is missing.
    """
    check_package()
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"The name of the chart must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, got {out}.")
    logs = []
    for folder in folders:
        lines = read_metrics(folder)
        if not lines:
            raise UserError(f"The log of {folder} has no line yet; wait for the first step.")
        logs.append(lines)
    figure = _figure(_names(folders), logs, x)
    from flashlm_numba.system.files import write_atomically, writing_to

    kind = out.suffix.lower().removeprefix(".")
    with writing_to(out.absolute().parent, "choose another --out"):
        write_atomically(out, lambda file: figure.savefig(file, format=kind, dpi=150))
    return out


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of the runs, short but different."""
    short = [folder.absolute().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _figure(names: list[str], logs: list[list[dict[str, Any]]], x: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    (loss, validation), (speed, shares) = figure.subplots(2, 2)
    for n, (name, lines) in enumerate(zip(names, logs, strict=True)):
        colour = _COLOURS[n % len(_COLOURS)]
        _curve(loss, lines, x, "nll", colour, name)
        _points(validation, lines, x, colour, name)
        _curve(speed, lines, x, "tokens_per_s", colour, name)
    for axes, title, unit in (
        (loss, "Training NLL", "nats per token"),
        (validation, "Validation NLL (a fixed subset)", "nats per token"),
        (speed, "Speed", "tokens per second"),
    ):
        axes.set(title=title, ylabel=unit, xlabel=AXES[x])
        axes.grid(alpha=0.3)
    if not validation.lines:
        validation.text(0.5, 0.5, "not validated yet", ha="center", va="center", transform=validation.transAxes)
    speed.set_ylim(bottom=0)
    _focus(loss, logs)
    _share_bars(shares, names, logs)
    handles, labels = loss.get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    else:
        figure.suptitle(names[0])
    return figure


def _at(lines: list[dict[str, Any]], x: str) -> np.ndarray:
    """Where lines are on the axis x."""
    key, unit = {"minutes": ("seconds", 60.0), "steps": ("step", 1.0), "tokens": ("tokens", 1e6)}[x]
    return np.array([line[key] for line in lines]) / unit


def _curve(axes: Axes, lines: list[dict[str, Any]], x: str, key: str, colour: str, name: str) -> None:
    """Every value faintly, and their average."""
    at, values = _at(lines, x), np.array([line[key] for line in lines], float)
    if len(at) > 1:
        axes.plot(at, values, color=colour, alpha=0.2, linewidth=0.8)
    axes.plot(at, averaged(values), color=colour, label=name, marker="o" if len(at) == 1 else "")


def _points(axes: Axes, lines: list[dict[str, Any]], x: str, colour: str, name: str) -> None:
    for key, style in (("val_nll", "o-"), ("val_nll_ema", "s--")):
        found = [line for line in lines if key in line]
        if found:
            label = name if key == "val_nll" else f"{name}, EMA"
            values = [line[key] for line in found]
            axes.plot(_at(found, x), values, style, color=colour, markersize=4, label=label)
            axes.annotate(
                f"{values[-1]:.3f}", (_at(found, x)[-1], values[-1]), xytext=(4, 4), textcoords="offset points"
            )


def _focus(axes: Axes, logs: list[list[dict[str, Any]]]) -> None:
    """Cut off the first steps, whose loss is far above all others."""
    values = np.concatenate([averaged(np.array([line["nll"] for line in lines], float)) for lines in logs])
    low, high = float(values.min()), float(np.quantile(values, 0.98))
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low) - 0.02, high + 0.1 * (high - low))


def _share_bars(axes: Axes, names: list[str], logs: list[list[dict[str, Any]]]) -> None:
    """A bar per run: mean shares of a step's time."""
    left = np.zeros(len(logs))
    means = [[float(np.mean([line["shares"].get(part, 0) for line in lines])) for part in PARTS] for lines in logs]
    rest = [max(0.0, 1 - sum(row)) for row in means]
    for part, colour, sizes in zip((*PARTS, "rest"), _PART_COLOURS, [*np.transpose(means).tolist(), rest], strict=True):
        axes.barh(range(len(logs)), sizes, left=left, color=colour, label=part)
        for n, size in enumerate(sizes):
            if size > 0.06:
                axes.text(left[n] + size / 2, n, f"{size:.0%}", ha="center", va="center", color="white", fontsize=9)
        left += sizes
    axes.set(title="Shares of a step's time", xlim=(0, 1), yticks=range(len(names)), yticklabels=names)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=5, frameon=False, fontsize=9)
