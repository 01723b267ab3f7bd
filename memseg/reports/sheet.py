"""A sheet to draw boxes and words on, in inches from the upper left corner.

Axes suit curves. A diagram needs boxes as wide as the words in them, so words must be measured before there is a
picture, and words from elsewhere (names of layers and cards may be anything) must neither be cut off at an edge nor be
read as formulas.
"""

import re
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path as Outline

from memseg.files import replace_file

INK, DIM, BAD = "#1b1f26", "#5c6673", "#c62828"
"""Of words."""
EDGE, LINE = "#8a94a1", "#c9d0d8"
"""Of boxes."""
_DPI = 120
_SMALLEST = 6.5
"""Points, below which words are shortened instead."""


class Sheet:
    """A white sheet.

    Args:
        width: In inches, as all lengths here.
        height: Of the sheet.
    """

    def __init__(self, width: float, height: float) -> None:
        self._figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(self._figure)
        self._axes = self._figure.add_axes((0, 0, 1, 1))
        self._axes.set_axis_off()
        self._axes.set_xlim(0, width)
        self._axes.set_ylim(height, 0)

    def words(
        self, x: float, y: float, words: str, *, size: float = 8, bold: bool = False, colour: str = INK,
        align: str = "left", width: float | None = None, ground: str = "none",
    ) -> None:  # fmt: skip
        """Words on one line, at the middle of its height.

        Args:
            x: Where they start; with `align` "right" where they end, with "center" their middle.
            y: Where the middle of the line is.
            words: Shown as they are.
            size: In points.
            bold: Heavy letters.
            colour: Of the letters.
            align: "left", "center" or "right".
            width: What they may take; then they are set smaller or shortened.
            ground: Colour behind them, over what they cross.
        """
        if width is not None:
            words, size = fitted(words, width, size, bold=bold)
        self._axes.text(
            x, y, one_line(words), fontsize=size, fontweight="bold" if bold else "normal", color=colour, ha=align,
            va="center_baseline", parse_math=False, bbox={"facecolor": ground, "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip

    def box(self, x: float, y: float, width: float, height: float, *, rounded: float = 0, **style: Any) -> None:
        """A rectangle, its upper left corner at (x, y); `style` is matplotlib's."""
        if rounded:
            inner = (x + rounded, y + rounded)
            shape = f"round,pad={rounded},rounding_size={rounded}"
            sizes = (width - 2 * rounded, height - 2 * rounded)
            self._axes.add_patch(FancyBboxPatch(inner, *sizes, boxstyle=shape, mutation_aspect=1, **style))
        else:
            self._axes.add_patch(Rectangle((x, y), width, height, **style))

    def line(self, xs: Sequence[float], ys: Sequence[float], **style: Any) -> None:
        """A line through points; `style` is matplotlib's."""
        self._axes.plot(xs, ys, **style)

    def arrow(self, points: Sequence[tuple[float, float]]) -> None:
        """An arrow along straight lines through `points`."""
        path = Outline(points)
        self._axes.add_patch(
            FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=11, linewidth=1.6, color=INK, joinstyle="round")
        )

    def save(self, path: Path) -> None:
        """Write a PNG.

        Raises:
            OSError: the file cannot be written.
        """
        picture = BytesIO()
        with warnings.catch_warnings():
            # A letter that the font lacks is drawn as a box, which is seen.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            self._figure.savefig(picture, format="png")
        replace_file(path, picture.getvalue())


def one_line(words: str) -> str:
    """Without line breaks and other characters that are no letters.

    >>> one_line("a\\tb\\n c\\x00")
    'a b c'
    """
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", words).split())


def measured(words: str, size: float, *, bold: bool = False) -> float:
    """How wide a line of words is, in inches."""
    font = FontProperties(weight="bold" if bold else "normal", size=size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        width, _, _ = _renderer().get_text_width_height_descent(one_line(words), font, ismath=False)
    return float(width) / _DPI


def fitted(words: str, width: float, size: float, *, bold: bool = False) -> tuple[str, float]:
    """The words and their size, set smaller or shortened in the middle until they fit into a width."""
    words = one_line(words)
    needed = measured(words, size, bold=bold)
    if needed <= width:
        return words, size
    size = max(min(size, _SMALLEST), size * width / needed)
    if measured(words, size, bold=bold) <= width:
        return words, size
    narrower = bisect_right(
        range(len(words)), width, key=lambda kept: measured(_without_middle(words, kept), size, bold=bold)
    )
    return _without_middle(words, max(2, narrower - 1)), size


def wrapped(words: str, width: float, size: float, *, bold: bool = False) -> list[str]:
    """The words on as many lines as a width asks for; a single word that is too long is left to `fitted`."""
    lines: list[str] = []
    for word in words.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and measured(longer, size, bold=bold) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _without_middle(words: str, kept: int) -> str:
    """Both ends tell things apart: the part of a network, and the layer in it.

    >>> _without_middle("encoder.layer3.conv", 8)
    'enco…conv'
    """
    front = kept // 2
    return f"{words[:front]}…{words[len(words) - (kept - front) :]}"


@cache
def _renderer() -> Any:
    # matplotlib's own types leave it out.
    make: Any = RendererAgg
    return make(1, 1, _DPI)
