"""A curve of characters: as many values as a run has steps, in as few columns as a terminal has.

Each column is the mean of its share of the run, so that noise goes and the course stays.
"""

from collections.abc import Sequence

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_MOST = 256
"""Means that are kept; more columns than a panel has."""


class Curve:
    """The values of a run so far, as few means over equal parts of it.

    >>> curve = Curve()
    >>> for step in range(1000):
    ...     curve.add(float(step))
    >>> len(curve.means), curve.means[0], curve.means[-1]
    (250, 1.5, 997.5)
    """

    def __init__(self) -> None:
        self._means: list[float] = []
        self._each = 1
        """Values in each of them."""
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        """One more at the end."""
        self._pending.append(value)
        if len(self._pending) < self._each:
            return
        self._means.append(_mean(self._pending))
        self._pending = []
        if len(self._means) == _MOST:
            self._means = [_mean(self._means[at : at + 2]) for at in range(0, _MOST, 2)]
            self._each *= 2

    @property
    def means(self) -> tuple[float, ...]:
        """Of equal parts, the first one first; the last may not be complete."""
        return (*self._means, *([_mean(self._pending)] if self._pending else []))


def curve_lines(values: Sequence[float], *, width: int, height: int) -> list[str]:
    """The area under a curve, from the smallest value at the bottom to the largest at the top.

    Args:
        values: Finite, at least one.
        width: Columns; fewer values take a column each.
        height: Lines, the top one first.

    >>> print(*curve_lines([15.0, 11.0, 7.0, 3.0, 0.0], width=5, height=2), sep="|")
    █▄|███▄▁
    """
    columns = [_mean(values[part]) for part in _parts(len(values), width)]
    low, high = min(columns), max(columns)
    scale = (8 * height - 1) / (high - low) if high > low else 0.0
    eighths = [1 + round((value - low) * scale) for value in columns]
    return [
        "".join(_EIGHTHS[min(8, max(0, level - 8 * line))] for level in eighths).rstrip()
        for line in reversed(range(height))
    ]


def _parts(count: int, width: int) -> list[slice]:
    width = min(count, width)
    return [slice(count * part // width, count * (part + 1) // width) for part in range(width)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
