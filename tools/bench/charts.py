"""Charts with matplotlib, which is imported only for drawing: figures without a display, and the roofline."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Any:
    """A figure drawn without a display, and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_roofline(result: Mapping[str, Any]) -> Any:
    """Draw work per byte against work per second of every kernel, with the limits of memory and matrix products.

    result : result of bench_trunk.py. Ternary products count two operations per weight, though they do not multiply.
    """
    figure = new_figure(9, 5.5)
    axes = figure.subplots()
    peak, bandwidth = result["gemm_gflops"], result["read_gbytes_per_s"]
    points = result["roofline"]
    intensity = {name: point["flop"] / point["bytes"] for name, point in points.items()}
    low, high = min(intensity.values()) / 3, max(intensity.values()) * 3
    corner = peak / bandwidth
    axes.plot([low, corner], [low * bandwidth, peak], color="black", label=f"reading memory, {bandwidth:.0f} GB/s")
    axes.plot([corner, high], [peak, peak], color="grey", label=f"float32 matrix products, {peak:.0f} GFLOP/s")
    for name, point in points.items():
        rate = point["flop"] / point["seconds"] * 1e-9
        axes.plot(intensity[name], rate, marker="o")
        side = "right" if intensity[name] > (low * high) ** 0.5 else "left"
        axes.annotate(name, (intensity[name], rate), textcoords="offset points", xytext=(0, -14), fontsize=9, ha=side)
    axes.legend(frameon=False, loc="lower right")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s")
    axes.grid(alpha=0.3)
    return figure
