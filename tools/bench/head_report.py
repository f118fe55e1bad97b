"""Markdown tables and charts of the results of tools/bench_head.py, from the object that its --json writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashlm_numba.model.settings import parse_phase
from tools.bench.charts import new_figure

# of the summary: label, candidate among the heads, candidate among the steps
SUMMARY = (
    ("PyTorch {torch}, dense head, as installed", "torch:eager@untuned", "torch@untuned"),
    ("PyTorch, dense head, freed memory kept", "torch:eager", "torch"),
    ("the same through `torch.compile`", "torch:compile", "torch:compile"),
    ("**ours, dense head**", "dense", "dense"),
    ("PyTorch, AdaptiveLogSoftmaxWithLoss, `div_value` 1", "torch:adaptive", "torch:adaptive"),
    ("PyTorch, AdaptiveLogSoftmaxWithLoss, `div_value` 4", "torch:adaptive-div4", "torch:adaptive-div4"),
    ("the same, its trunk through `torch.compile`", None, "torch:adaptive-div4:compile"),
    ("PyTorch, our tree by hand", "torch:tree", None),
    ("ours, tree head, float32 activations", None, "tree@float"),
    ("**ours, tree head (default)**", "tree:default", "tree"),
)
# of the ratios: "heads" or "steps", ours, PyTorch's candidates for the same work
DENSE_PEERS = ("torch", "torch:compile")
ADAPTIVE_PEERS = ("torch:adaptive", "torch:adaptive-div4", "torch:adaptive-div4:compile")
RATIOS = (
    ("heads", "dense", ("torch:eager", "torch:compile")),
    ("heads", "dense", ("torch:eager@untuned",)),
    ("heads", "tree:default", ("torch:tree", "torch:tree-1thread")),
    ("steps", "dense", DENSE_PEERS),
    ("steps", "dense@v3-loss", ("torch@v3-loss",)),
    ("steps", "dense@0.25", ("torch@0.25",)),
    ("steps", "tree", DENSE_PEERS),
    ("steps", "tree", ("torch@untuned",)),
    ("steps", "tree", ADAPTIVE_PEERS),
    ("steps", "tree@float", ADAPTIVE_PEERS),
)
BARS = {
    "torch": "PyTorch, dense",
    "torch:compile": "PyTorch, dense, compiled",
    "dense": "ours, dense",
    "torch@0.25": "PyTorch, dense, 25 % of positions",
    "dense@0.25": "ours, dense, 25 % of positions",
    "torch:adaptive-div4": "PyTorch, adaptive softmax, div_value 4",
    "tree@float": "ours, tree, float32 activations",
    "tree": "ours, tree (default)",
}
COLORS = {"head": "#d1495b", "trunk": "#6fa8dc", "optimizer": "#edae49", "embedding": "#66a182", "rest": "#dddddd"}


def _cell(value: float | None, form: str) -> str:
    """A number for a table, or a dash if there is none."""
    return "-" if value is None else format(value, form)


def summary_table(result: Mapping[str, Any]) -> str:
    """The README's table in Markdown: head alone, whole training step, the head's share of it.

    >>> entry = {"positions_per_s": {"median": 2000.4}}
    >>> print(summary_table({"heads": {"dense": entry}, "steps": {}, "shares": {}}).splitlines()[-1])
    | **ours, dense head** | 2,000 | - | - |
    """
    version = (result.get("machine", {}).get("versions", {}).get("torch") or "").split("+")[0]
    lines = [
        "| | head alone, positions/s at 4,096 | training, tokens/s | head's share of a step |",
        "| --- | ---: | ---: | ---: |",
    ]
    for label, head, step in SUMMARY:
        entry, whole = result["heads"].get(head or ""), result["steps"].get(step or "")
        if head == "torch:tree":  # the faster of the two
            found = [result["heads"].get(name) for name in (head, "torch:tree-1thread")]
            entry = max(filter(None, found), key=lambda e: e["positions_per_s"]["median"], default=None)
        if not entry and not whole:
            continue
        alone = entry["positions_per_s"]["median"] if entry else None
        rate = whole["tokens_per_s"]["median"] if whole else None
        share = result["shares"].get(step, {}).get("head")
        name = label.format(torch=version.removesuffix(".0"))
        lines.append(
            f"| {name} | {_cell(alone, ',.0f')} | {_cell(rate, ',.0f')} | {_cell(share, '.0%').replace('%', ' %')} |"
        )
    return "\n".join(lines)


def _rate(entry: Mapping[str, Any]) -> float:
    """The median of an entry of either kind, positions or tokens per second."""
    return (entry.get("positions_per_s") or entry["tokens_per_s"])["median"]


def fastest(entries: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The fastest of the named entries that were measured, or None."""
    return max((name for name in names if entries.get(name)), key=lambda name: _rate(entries[name]), default=None)


def ratios(result: Mapping[str, Any]) -> list[tuple[str, str, str, float]]:
    """("heads" or "steps", ours, PyTorch's fastest for the same work, ours divided by it) for all that were measured.

    Raises ValueError if the two have different losses, since such a ratio would not be of equal work.
    """
    found = []
    for kind, ours, peers in RATIOS:
        entries = result[kind]
        peer = fastest(entries, peers)
        if peer is None or not entries.get(ours):
            continue
        if entries[ours]["loss"] != entries[peer]["loss"]:
            raise ValueError(f"{ours} and {peer} have different losses")
        found.append((kind, ours, peer, _rate(entries[ours]) / _rate(entries[peer])))
    return found


def ratios_table(result: Mapping[str, Any]) -> str:
    """Our rates divided by those of PyTorch's fastest candidate with the same loss, in Markdown; "" without PyTorch."""
    found = ratios(result)
    if not found:
        return ""
    labels = {"heads": "head alone", "steps": "training step"}
    lines = [f"| {labels[kind]} | `{ours}` | `{peer}` | {ratio:.2f} |" for kind, ours, peer, ratio in found]
    return "\n".join(["| | ours | PyTorch's | ours / PyTorch's |", "| --- | --- | --- | ---: |", *lines])


def savings_table(result: Mapping[str, Any]) -> str:
    """Where the tree's step saves time against PyTorch's fastest adaptive step, in Markdown; "" if not measured."""
    steps = result["steps"]
    peer = fastest(steps, ADAPTIVE_PEERS)
    if peer is None or not steps.get("tree"):
        return ""
    tokens = parse_phase(result["batch"]).tokens

    def milliseconds(name: str, part: str) -> float:
        return 1e3 * tokens / _rate(steps[name]) * steps[name]["shares"].get(part, 0.0)

    columns = [f"`{peer}`, ms", *(f"`{name}`, ms" for name in ("tree@float", "tree") if steps.get(name)), "saved, ms"]
    lines = ["| part of a step | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for label, parts in (
        ("head", ["head"]),
        ("trunk and embedding", ["trunk", "embedding"]),
        ("optimizer", ["optimizer"]),
    ):
        times = [
            sum(milliseconds(name, part) for part in parts) for name in (peer, "tree@float", "tree") if name in steps
        ]
        lines.append(f"| {label} | " + " | ".join(f"{ms:.1f}" for ms in [*times, times[0] - times[-1]]) + " |")
    return "\n".join(lines)


def heads_table(result: Mapping[str, Any]) -> str:
    """Every head in Markdown: positions/s with quantiles, GFLOP/s, share of the GEMM rate, GB/s, scratch, error."""
    lines = [
        f"| N = {result['rows']:,}, V = {result['vocab_size']:,}, C = {result['dim']} | positions/s | 20 % to 80 % "
        "| GFLOP/s | of the GEMM rate | GB/s | scratch, MB | largest error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def line(name: str, head: Mapping[str, Any]) -> str:
        rate = head["positions_per_s"]
        cells = (
            name,
            f"{rate['median']:,.0f}",
            f"{rate['p20']:,.0f} to {rate['p80']:,.0f}",
            _cell(head.get("gflops"), ",.1f"),
            _cell(head.get("share_of_gemm"), ".0%").replace("%", " %"),
            _cell(head.get("gbytes_per_s"), ",.1f"),
            _cell(head.get("peak_scratch_mb"), ",.0f"),
            _cell(head.get("max_grad_error"), ".1e"),
        )
        return "| " + " | ".join(cells) + " |"

    for name, head in result["heads"].items():
        if head is None:
            continue
        lines.append(line(f"`{name}`", head))
        lines += [line(f"`{name}`, N = {int(n):,}", entry) for n, entry in head.get("by_rows", {}).items()]
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: Path) -> list[Path]:
    """Draw the shares of a step in path and, if measured, the scaling in a second file. Returns the paths written.

    The second file of shares.png is shares-scaling.png.
    """
    written = []
    if result["shares"]:
        _draw_shares(result).savefig(path, dpi=120)
        written.append(path)
    if result.get("scaling"):
        beside = path.with_name(f"{path.stem}-scaling{path.suffix}")
        _draw_scaling(result["scaling"]).savefig(beside, dpi=120)
        written.append(beside)
    return written


def _draw_shares(result: Mapping[str, Any]) -> Any:
    """Draw one bar per training step, scaled by its time, and the same bars scaled to 100 %."""
    names = [name for name in BARS if name in result["shares"]]
    figure = new_figure(11, 1.4 + 0.45 * len(names))
    share_axes, time_axes = figure.subplots(1, 2, sharey=True)
    for y, name in enumerate(names):
        shares = dict(result["shares"][name])
        shares["rest"] = max(0.0, 1 - sum(shares.values()))
        rate = result["steps"][name]["tokens_per_s"]["median"]
        for axes, whole in ((share_axes, 100.0), (time_axes, 1e6 / rate)):
            left = 0.0
            for part, color in COLORS.items():
                width = whole * shares.get(part, 0.0)
                axes.barh(y, width, left=left, color=color, label=part if y == 0 else None)
                if axes is share_axes and shares.get(part, 0.0) >= 0.06:
                    axes.text(left + width / 2, y, f"{shares[part]:.0%}", ha="center", va="center", fontsize=9)
                left += width
        time_axes.text(1e6 / rate, y, f" {rate:,.0f} tokens/s", va="center", fontsize=9)
    share_axes.set_yticks(range(len(names)), [BARS[name] for name in names])
    share_axes.invert_yaxis()
    share_axes.set(xlabel="share of a training step, %", xlim=(0, 100))
    time_axes.set(xlabel="time of a token, microseconds", xlim=(0, time_axes.get_xlim()[1] * 1.25))
    handles, labels = share_axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(COLORS), frameon=False)
    return figure


def _draw_scaling(scaling: Mapping[str, Any]) -> Any:
    """Draw microseconds per position against V and against N, with logarithmic axes."""
    figure = new_figure(11, 4.5)
    panels = (
        ("vocab", f"tokens in the vocabulary, V (N = {scaling['vocab_at_rows']:,})"),
        ("rows", f"positions in a batch, N (V = {scaling['rows_at_vocab']:,})"),
    )
    for axes, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, rates in scaling[key].items():
            sizes = [int(size) for size in rates]
            cost = [1e6 / rate["median"] for rate in rates.values()]
            low = [1e6 / rate["p80"] for rate in rates.values()]
            high = [1e6 / rate["p20"] for rate in rates.values()]
            (line,) = axes.plot(sizes, cost, marker="o", label=name)
            axes.fill_between(sizes, low, high, color=line.get_color(), alpha=0.2)
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="microseconds per position, forward and backward")
        axes.grid(alpha=0.3)
        if scaling[key]:
            axes.legend(frameon=False)
    return figure
