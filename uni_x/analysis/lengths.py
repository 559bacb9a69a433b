"""A picture of how long the sequences of some data are."""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from uni_x.analysis.plots import COLOURS, PALETTE, figure_to_svg
from uni_x.data.stats import KINDS, DataStatistics
from uni_x.errors import UsageError
from uni_x.runs import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TONES = {"draw": "image", "describe": "shared", "converse": "text", "text": "faint"}


def save_histogram(statistics: DataStatistics, path: Path) -> None:
    """Draws the lengths, stacked by kind, with a line at `max_length`, as SVG or PNG by the path's suffix.

    Raises `UsageError` for another suffix, `RunError` where the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix == ".svg":
        lengths = statistics.lengths
        label = f"Lengths of {statistics.total.sequences:,} sequences, from {lengths.shortest} to {lengths.longest}"
        write_atomically(path, figure_to_svg(_draw(statistics, COLOURS), label, "lengths"))
    elif suffix == ".png":
        light = PALETTE[: PALETTE.index("@media")]
        stream = io.BytesIO()
        colours = dict(re.findall(r"--ux-(\w+): (#\w+)", light))
        _draw(statistics, colours).savefig(stream, format="png", dpi=160, facecolor=colours["paper"])
        write_atomically(path, stream.getvalue())
    else:
        raise UsageError(f"{path}: a picture's name ends in .svg or .png")


def _draw(statistics: DataStatistics, colours: Mapping[str, str]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    histogram, max_length = statistics.histogram, statistics.max_length
    figure = Figure(figsize=(6.4, 3.4))
    axes = figure.add_axes((0.13, 0.15, 0.84, 0.74))
    axes.patch.set_visible(False)
    bars = len(next(iter(histogram.counts.values())))
    places = np.arange(bars) * histogram.width
    below = np.zeros(bars)
    for kind, counts in histogram.counts.items():
        axes.bar(
            places, counts, histogram.width, below, align="edge", color=colours[_TONES[kind]], linewidth=0, label=kind
        )
        below += counts
    right = max(bars * histogram.width, max_length) * 1.04
    axes.axvline(max_length, color=colours["ink"], linewidth=1.2, linestyle=(0, (4, 3)))
    side = -1 if max_length > right / 2 else 1  # of the line, on which there is room for its name
    axes.annotate(
        f"max_length {max_length:,}",
        (max_length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4 * side, -9),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        color=colours["ink"],
        size=9,
    )
    axes.set_xlim(0, right)
    axes.set_ylim(0, below.max() * 1.12)
    beyond = ", and longer ones in the last bar" * (statistics.lengths.longest >= bars * histogram.width)
    axes.set_xlabel(f"tokens in a sequence{beyond}", color=colours["faint"], size=9, labelpad=4)
    axes.set_ylabel("sequences", color=colours["faint"], size=9, labelpad=4)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y", color=colours["line"], linewidth=0.8)
    axes.tick_params(length=0, labelsize=9, labelcolor=colours["faint"], pad=5)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(colours["line"])
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(KINDS), frameon=False, fontsize=9,
        labelcolor=colours["faint"], handlelength=1, handleheight=1, borderpad=0,
    )  # fmt: skip
    return figure
