"""Which classes are taken for which: a confusion matrix as a picture.

Classes differ in size by factors of thousands, so each row is shown in percent of its own class. Most shares that
matter are small, beside a diagonal that is large; so colours go by the square root of the share. Up to 30 classes each
cell has its number too.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from memseg.files import replace_file

_NUMBERED_CLASSES = 30
"""More of them have cells too small for numbers."""
_CELL_INCHES, _SMALL_CELL_INCHES = 0.42, 0.15
_MARGIN_INCHES = 3.2
"""For names and the scale of colours."""
_SHOWN_PERCENT = 0.5
"""Smaller shares round to 0 and get no number."""
_LONGEST_NAME = 28
_NOT_THERE = "#e8e8e8"


def save_confusion_picture(counts: npt.NDArray[np.int64], names: Sequence[str], path: Path, *, title: str) -> None:
    """Write the picture as a PNG, 1700 pixels wide for 30 classes, 2700 for 150.

    Args:
        counts: Pixels by their true class (rows) and predicted class (columns).
        names: Of the classes; long ones are cut.
        path: Of the PNG.
        title: Above the picture.

    Raises:
        OSError: the file cannot be written.
    """
    numbered = len(names) <= _NUMBERED_CLASSES
    side = len(names) * (_CELL_INCHES if numbered else _SMALL_CELL_INCHES)
    figure = Figure(figsize=(max(side, 4) + _MARGIN_INCHES + 1, max(side, 4) + _MARGIN_INCHES), dpi=100)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    pixels = counts.sum(axis=1, keepdims=True)
    percent = np.divide(100.0 * counts, pixels, out=np.full(counts.shape, np.nan), where=pixels > 0)
    axes.set_facecolor(_NOT_THERE)
    image = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100))
    size = 8 if numbered else 6.5
    shares = (pixels[:, 0] / max(1, pixels.sum())).tolist()
    rows = [f"{_cut(name)}  {share:6.2%}" for name, share in zip(names, shares, strict=True)]
    axes.set_yticks(range(len(names)), rows, fontsize=size, parse_math=False)
    axes.set_xticks(range(len(names)), [_cut(name) for name in names], fontsize=size, rotation=90, parse_math=False)
    axes.tick_params(length=2)
    axes.set_ylabel("true class, and its share of labelled pixels")
    axes.set_xlabel("predicted class")
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    if numbered:
        for row, column in np.argwhere(percent >= _SHOWN_PERCENT).tolist():
            ink = "white" if percent[row, column] > 35 else "black"
            axes.text(column, row, f"{percent[row, column]:.0f}", ha="center", va="center", fontsize=7.5, color=ink)
    bar = figure.colorbar(image, ax=axes, shrink=min(0.8, 6 / side), pad=0.01)
    bar.set_label("percent of the pixels of the true class; grey: no pixel is of this class")
    picture = BytesIO()
    figure.savefig(picture, format="png")
    replace_file(path, picture.getvalue())


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
