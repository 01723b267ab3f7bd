"""What a change did, as a picture: layers from top to bottom, and for each figure that changed a column of bars.

A bar goes to the left for less and to the right for more, in the same row in every column. So one sees at a glance
that a block that saves less takes longer for it, and which layers paid without a gain.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memseg.reports.comparison import Change, Comparison, LayerChange, Measure
from memseg.reports.comparison_view import difference_line, format_amount, label_of, settings_line

TOP = 24
"""Layers that are drawn where nobody asks for more or fewer."""
MOST_DRAWN = 200
"""Layers; a longer picture is none."""

_LESS, _MORE = "#1a9850", "#d73027"
_WIDTH = 16.0
_ROW_HEIGHT = 0.3
_SHORT = 160
"""Characters of a line above the picture."""
_TITLES = {
    Measure.SAVED: "saved",
    Measure.PEAK: "peak while it works",
    Measure.PARAMETERS: "parameters",
    Measure.TIME: "forward + backward",
}


def save_comparison_picture(
    comparison: Comparison, layers: Sequence[LayerChange], path: Path, *, names: tuple[str, str]
) -> None:
    """Write the picture as a PNG, 1600 pixels wide and as high as the layers need.

    Args:
        comparison: To draw.
        layers: Of it, in order; those that are as before are left out.
        path: Of the PNG.
        names: Of the two profiles.

    Raises:
        OSError: the file cannot be written.
    """
    changed = [layer for layer in layers if layer.differs][:MOST_DRAWN]
    measures = [measure for measure in Measure if any(layer.changes[measure].differs for layer in changed)]
    figure = Figure(figsize=(_WIDTH, 2.2 + _ROW_HEIGHT * max(3, len(changed))), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("\n".join(_short(line) for line in _headlines(comparison, names)), x=0.01, ha="left", fontsize=13)
    columns = figure.subplots(1, max(1, len(measures)), sharey=True, squeeze=False)[0]
    if not measures:
        columns[0].set_axis_off()
        columns[0].annotate("no layer differs", (0.5, 0.5), xycoords="axes fraction", ha="center", fontsize=16)
    for axes, measure in zip(columns, measures, strict=False):
        _draw(axes, [layer.changes[measure] for layer in changed], measure, comparison.total(measure))
    if measures:
        columns[0].set_yticks(range(len(changed)), [_short(label_of(layer), 40) for layer in changed])
        columns[0].set_ylim(len(changed) - 0.4, -0.6)
        others = sum(layer.differs for layer in comparison.layers) - len(changed)
        if others > 0:
            figure.supxlabel(f"{others} more changed less, or come later, and are not drawn", fontsize=10)
    figure.savefig(path, format="png")


def _headlines(comparison: Comparison, names: tuple[str, str]) -> list[str]:
    peak, step = comparison.figures["peak_allocated_bytes"], comparison.figures["step_seconds"]
    return [
        f"{names[0]} → {names[1]}: {difference_line(comparison)}",
        settings_line(comparison.same_settings),
        f"peak {_arrow(peak)} allocated, step {_arrow(step, is_time=True)}",
    ]


def _arrow(change: Change, *, is_time: bool = False) -> str:
    old, new = (format_amount(one, is_time=is_time) for one in (change.before, change.after))
    percent = "" if change.percent is None or not change.differs else f" ({change.percent:+.1f} %)"
    return f"{old} → {new}{percent}" if change.differs else f"{new}, as before"


def _draw(axes: Axes, changes: Sequence[Change], measure: Measure, total: Change) -> None:
    """One column: bars, each with its difference beside it, and room for the text on either side."""
    is_time = measure is Measure.TIME
    values = [change.difference or 0 for change in changes]
    most = max(abs(value) for value in values)
    low, high = min(0, *values), max(0, *values)
    axes.barh(range(len(values)), values, color=[_LESS if value < 0 else _MORE for value in values], height=0.72)
    axes.axvline(0, color="black", linewidth=0.8)
    room = 0.55 * (high - low)
    axes.set_xlim(low - (room if low < 0 else 0.02 * most), high + (room if high > 0 else 0.02 * most))
    for row, (change, value) in enumerate(zip(changes, values, strict=True)):
        if not change.differs:
            continue
        left = value < 0
        text = format_amount(value, is_time=is_time, sign=True)
        where = ((-4, 0), "right") if left else ((4, 0), "left")
        axes.annotate(text, (value, row), where[0], textcoords="offset points", ha=where[1], va="center", fontsize=9)
    whole = "largest" if measure is Measure.PEAK else "all"
    axes.set_title(f"{_TITLES[measure]}\n{whole}: {_arrow(total, is_time=is_time)}", fontsize=11, loc="left")
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)


def _short(text: str, most: int = _SHORT) -> str:
    """The end of a long name tells more than its beginning."""
    return text if len(text) <= most else f"…{text[1 - most :]}" if " " not in text else f"{text[: most - 1]}…"
