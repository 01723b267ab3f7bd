"""The course of a training run as a picture: the loss of its steps above, the scores of its evaluations below."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_SMOOTHED_STEPS = 25
"""Logged steps that the drawn mean of the loss spans; the steps themselves are drawn behind it."""


def save_training_curves(records: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Write the picture as a PNG of 1400x900 pixels.

    Args:
        records: Lines of a run's metrics, oldest first; each has a `step`, and `loss` or `miou` and `pixel_accuracy`.
        path: Of the PNG.
        title: Above the picture.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(14, 9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    above.set_title(title, loc="left", fontsize=13)
    _draw_loss(above, *_series(records, "loss"))
    for name, label, colour in (("miou", "mIoU", "#1f78b4"), ("pixel_accuracy", "pixel accuracy", "#33a02c")):
        steps, values = _series(records, name)
        below.plot(steps, values * 100, marker="o", color=colour, label=label)
        if len(steps):
            note = f"{values[-1]:.1%}"
            below.annotate(note, (steps[-1], values[-1] * 100), (-6, 8), textcoords="offset points", ha="right")
    below.set_ylabel("val, %")
    below.set_ylim(0, 100)
    below.set_xlabel("step")
    below.legend(loc="lower right", frameon=False)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png")


def _draw_loss(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    axes.plot(steps, values, color="#d95f02", alpha=0.35, linewidth=1, label="loss of a step")
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - _SMOOTHED_STEPS)
    mean = (sums[ends] - sums[starts]) / (ends - starts)
    axes.plot(steps, mean, color="#d95f02", linewidth=2, label=f"mean of the last {_SMOOTHED_STEPS} logged steps")
    axes.set_ylabel("training loss")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", frameon=False)


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have a finite value of that name."""
    found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return np.array([step for step, _ in found]), np.array([value for _, value in found], dtype=float)
