"""The memory of one training step as a picture: what is allocated when, by category, up to the peak and down again.

A step has thousands of instants, and the peak often stands for one of them alone: a workspace that lives while one
convolution runs. Drawn as they are, most instants would share a pixel and the peak would fade away. So the step is cut
into about as many columns as the picture has pixels, and each column shows its fullest instant.
"""

from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from memseg.files import replace_file
from memseg.planning.cards import Card
from memseg.profiling.timeline import Phase, Timeline
from memseg.reports.colours import CATEGORY_COLOURS
from memseg.reports.phases import phase_spans
from memseg.reports.profile import ProfileReport
from memseg.units import GIB, format_bytes

COLUMNS = 1200

_LIMIT_COLOUR = "#cc0000"
_PHASE_SHADES = {Phase.FORWARD: "#f2f7fb", Phase.BACKWARD: "#fdf3ea", Phase.OPTIMIZER: "#f0f0f0"}


def save_memory_curve(report: ProfileReport, path: Path) -> None:
    """Write the picture as a PNG of 1600x800 pixels.

    Raises:
        OSError: the file cannot be written.
    """
    timeline = report.timeline
    phases = phase_spans(timeline)
    start, end = phases[0].start, phases[-1].end
    instants, stack = _columns(timeline, start, end)
    size = timeline.peak_allocated_bytes
    unit, unit_name = (GIB, "GiB") if size >= GIB else (2**20, "MiB")
    figure = Figure(figsize=(16, 8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlim(0, end - start)
    axes.set_ylim(0, 1.18 * size / unit)
    for phase, left, right in phases:
        axes.axvspan(left - start, right - start, color=_PHASE_SHADES[phase], zorder=0)
        at = ((left - start) / (end - start), 1)
        axes.annotate(phase, at, (4, -6), "axes fraction", "offset points", va="top", fontsize=12, color="#555555")
    drawn = [row for row, sizes in enumerate(stack) if sizes.any()]
    categories = [list(CATEGORY_COLOURS)[row] for row in drawn]
    colours = [CATEGORY_COLOURS[category] for category in categories]
    axes.stackplot(instants - start, stack[drawn] / unit, labels=categories, colors=colours, linewidth=0)
    if report.judge_fit:
        _draw_limit(axes, report.card, unit)
    _draw_peak(axes, (timeline.peak_instant - start, size / unit), f"{format_bytes(size)}, {report.peak_moment}")
    axes.set_xlabel("allocations and frees of one step, in order")
    axes.set_ylabel(f"allocated, {unit_name}")
    axes.set_title(f"{report.headline()}: peak {format_bytes(size)}", loc="left", fontsize=13)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    picture = BytesIO()
    figure.savefig(picture, format="png")
    replace_file(path, picture.getvalue())


def _draw_peak(axes: Axes, at: tuple[float, float], label: str) -> None:
    axes.plot(*at, marker="v", color="black", markersize=8)
    late = at[0] > axes.get_xlim()[1] / 2
    offset, side = ((-10, 8), "right") if late else ((10, 8), "left")
    axes.annotate(label, at, offset, textcoords="offset points", ha=side, fontsize=12, fontweight="bold")


def _draw_limit(axes: Axes, card: Card, unit: int) -> None:
    """A line at what the card has to fill, where the picture is high enough for it."""
    limit = card.available_bytes / unit
    if limit > axes.get_ylim()[1]:
        return
    axes.axhline(limit, color=_LIMIT_COLOUR, linestyle="--", linewidth=1.5)
    label, at = f"{card.name} has {format_bytes(card.available_bytes)}", (axes.get_xlim()[1], limit)
    axes.annotate(label, at, (-4, 4), textcoords="offset points", ha="right", color=_LIMIT_COLOUR)


def _columns(timeline: Timeline, start: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The fullest instant of each column, (columns,), and bytes of each category there, (categories, columns)."""
    row_of = {category: row for row, category in enumerate(CATEGORY_COLOURS)}
    change = np.zeros((len(row_of), timeline.instants + 1))
    for one in timeline.allocations:
        change[row_of[one.category], one.born] += one.size_bytes
        change[row_of[one.category], one.died] -= one.size_bytes
    allocated = change.cumsum(axis=1)
    total = allocated.sum(axis=0)
    edges = np.unique(np.linspace(start, end, COLUMNS + 1).astype(np.int64))
    fullest = np.array([left + int(total[left:right].argmax()) for left, right in pairwise(edges.tolist())])
    return fullest, allocated[:, fullest]
