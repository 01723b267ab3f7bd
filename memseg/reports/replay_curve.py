"""A recording under several settings as a picture: what each would reserve over the events, and what is allocated.

A recording can have a hundred thousand events, so each column of the picture shows the most of its events. What is
allocated is drawn once, for it is what was asked for; where settings round requests up it is drawn for them too.
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from memseg.reports.replay import DeviceTrials, ReplayReport, Trial
from memseg.reports.replay_view import Unit

COLUMNS = 1200
MOST_DEVICES = 8
"""That are drawn, one below the other."""

_COLOURS = ("#222222", "#2f7ed8", "#e8743b", "#8e4ec6", "#1f9e89", "#e2a90a", "#c2185b", "#6d4c41")
_VISIBLE = 0.01
"""Share of the peak."""
_LIMIT_COLOUR = "#cc0000"


def save_replay_curve(report: ReplayReport, path: Path, *, name: str) -> None:
    """Write the picture as a PNG, 1600 pixels wide and 600 high for each device.

    Raises:
        OSError: the file cannot be written.
    """
    devices = report.devices[:MOST_DEVICES]
    figure = Figure(figsize=(16, 6 * len(devices)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, device in zip(figure.subplots(len(devices), 1, squeeze=False)[:, 0], devices, strict=True):
        _draw(axes, device, report.capacity_bytes)
        axes.set_title(f"{name}, device {device.recording.device}", loc="left", fontsize=13)
    if len(report.devices) > len(devices):
        figure.supxlabel(f"{len(report.devices) - len(devices)} more devices are not drawn")
    figure.savefig(path, format="png")


def _draw(axes: Axes, device: DeviceTrials, capacity_bytes: int | None) -> None:
    num_events = len(device.recording.events)
    most = max(trial.replay.peak_reserved_bytes for trial in device.trials)
    limit = capacity_bytes if capacity_bytes is not None and capacity_bytes < 1.5 * most else None
    unit = Unit.suiting(most)
    top = max(1.0, 1.08 * max(most, limit or 0) / unit.size_bytes)
    # What was asked for is known to the end by whoever gets to the end.
    longest = max((trial.replay.allocated_curve for trial in device.trials), key=len)
    at, allocated = columns(longest)
    axes.fill_between(at, allocated / unit.size_bytes, color="#c9d4e0", linewidth=0, label="allocated")
    for index, trial in enumerate(device.trials):
        colour = _COLOURS[index % len(_COLOURS)]
        _draw_trial(axes, trial, unit, colour, width=max(1.4, 3.4 - 0.6 * index))
        if _rounds_up(trial.replay.allocated_curve, longest):
            at, allocated = columns(trial.replay.allocated_curve)
            label = f"allocated, {trial.name}: {unit.text(trial.replay.peak_allocated_bytes)}"
            axes.plot(at, allocated / unit.size_bytes, color=colour, linestyle=":", linewidth=1, label=label)
    if limit is not None:
        axes.axhline(limit / unit.size_bytes, color=_LIMIT_COLOUR, linestyle="--", linewidth=1.2)
        note, at_right = f"capacity {unit.text(limit)}", (num_events, limit / unit.size_bytes)
        axes.annotate(note, at_right, (-4, 4), textcoords="offset points", ha="right", color=_LIMIT_COLOUR)
    if begins := device.recording.num_alive_before:
        axes.axvline(begins, color="#888888", linewidth=1)
        axes.annotate("the recording begins", (begins, top), (4, -14), textcoords="offset points", color="#555555")
    axes.set_xlim(0, max(1, num_events))
    axes.set_ylim(0, top)
    axes.set_xlabel("allocations and frees, in order")
    axes.set_ylabel(unit.name)
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=10)


def _draw_trial(axes: Axes, trial: Trial, unit: Unit, colour: str, *, width: float) -> None:
    """What is reserved; later lines are thinner, so that those below them can be seen."""
    found = trial.replay
    label = f"{trial.name}{' (own)' if trial.is_own else ''}:\n{unit.text(found.peak_reserved_bytes)} reserved"
    at, reserved = columns(found.reserved_curve)
    event = found.out_of_memory_event
    if event is not None:
        label = f"{label}, out of memory at {event + 1}"
        last = reserved[-1] / unit.size_bytes if len(reserved) else 0
        axes.plot(event, last, marker="x", color=colour, markersize=4 + 3 * width, markeredgewidth=width)
    axes.plot(at, reserved / unit.size_bytes, color=colour, linewidth=width, label=label)


def _rounds_up(curve: NDArray[np.int64], other: NDArray[np.int64]) -> bool:
    """Whether so much more is allocated for the same requests that one would see it."""
    shared = min(len(curve), len(other))
    return bool(shared) and int(abs(curve[:shared] - other[:shared]).max()) > _VISIBLE * int(curve.max())


def columns(curve: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places and values of at most `COLUMNS` points, each the most of its share of the curve.

    >>> places, values = columns(np.array([1, 5, 2]))
    >>> places.tolist(), values.tolist()
    ([0, 1, 2], [1, 5, 2])
    """
    if not len(curve):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    edges = np.unique(np.linspace(0, len(curve), min(COLUMNS, len(curve)) + 1).astype(np.int64))
    fullest = np.array([left + int(curve[left:right].argmax()) for left, right in pairwise(edges.tolist())])
    return fullest, curve[fullest]
