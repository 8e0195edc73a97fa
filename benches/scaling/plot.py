"""Draws the figures of docs/performance.md from the numbers of benches/scaling/run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot, ticker
from matplotlib.axes import Axes

# Colours that stay apart for colour-blind people (Okabe and Ito), and markers that stay apart in print.
STYLES = {"article": ("#0072B2", "o"), "conv": ("#0072B2", "o"), "dense": ("#D55E00", "s"), "wide": ("#009E73", "^")}

# Title, label of the horizontal axis.
SERIES = {
    "batch": ("Batch size", "samples in a global batch"),
    "width": ("Width of a dense model", "units of the first layer"),
    "filters": ("Width of a convolutional model", "filters of the first layer"),
    "image": ("Image size", "pixels along an edge"),
    "thread": ("Threads of one process", "threads"),
    "worker": ("Worker processes of one thread each", "worker processes"),
}


def main() -> None:
    numbers, out = Path(sys.argv[1]), Path(sys.argv[2])
    data = json.loads(numbers.read_text())
    pyplot.rcParams.update(
        {
            # Text stays text: smaller files, and the reader's own font.
            "svg.fonttype": "none",
            # The same numbers give the same file.
            "svg.hashsalt": "lockstep",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    draw(data, ["batch", "thread", "worker"], out / "scaling-run")
    draw(data, ["width", "filters", "image"], out / "scaling-model")


def draw(data: dict[str, Any], names: list[str], path: Path) -> None:
    """One figure of several panels side by side."""
    figure, axes = pyplot.subplots(1, len(names), figsize=(3.3 * len(names), 3.1), layout="constrained")
    for name, panel in zip(names, axes):
        draw_panel(panel, name, data[name])
    axes[0].set_ylabel("µs for a sample")
    # Every name once: panels share their models' styles.
    named = {label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named), frameon=False)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)


def draw_panel(axes: Axes, name: str, curves: dict[str, list[dict[str, Any]]]) -> None:
    """The curves of one series over the line that the multiply-adds' rate allows."""
    title, label = SERIES[name]
    for model, points in curves.items():
        colour, marker = STYLES[model]
        xs = [point["x"] for point in points]
        median, low, high = ([point["microseconds"][end] for point in points] for end in ("median", "min", "max"))
        errors = [[a - b for a, b in zip(median, low)], [b - a for a, b in zip(median, high)]]
        axes.errorbar(
            xs, median, errors, color=colour, marker=marker, markersize=4, linewidth=1, elinewidth=0.7, label=model
        )
        if "ideal_microseconds" in points[0]:
            axes.plot(xs, [point["ideal_microseconds"] for point in points], color=colour, linestyle=":", linewidth=1)
    axes.set(title=title, xlabel=label, xscale="log", yscale="log")
    xs = sorted({point["x"] for points in curves.values() for point in points})
    axes.set_xticks(ticks_of(xs))
    axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="y", linewidth=0.3)
    if any("ideal_microseconds" in points[0] for points in curves.values()):
        axes.plot([], [], color="gray", linestyle=":", linewidth=1, label="multiply-adds alone")


def ticks_of(xs: list[int]) -> list[int]:
    """As many of the points as have room for their numbers."""
    if len(xs) <= 6:
        return xs
    step = -(-len(xs) // 6)
    return xs[::-step][::-1]


main()
