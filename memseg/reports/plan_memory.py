"""The memory of a plan's cards as bars to one scale: what is needed and what for, what is left, what is kept back."""

import math
from collections.abc import Sequence
from typing import Any

from memseg.planning import CardPlan
from memseg.reports.colours import CATEGORY_COLOURS
from memseg.reports.plan_parts import Kind, Part, memory_parts
from memseg.reports.sheet import BAD, DIM, EDGE, INK, Sheet, measured
from memseg.units import GIB

_BAR = 0.5
"""Width of a bar, in inches."""
_LINE_HEIGHT = 0.165
_FREE = "#f3f5f8"
_TICKS = 6


class MemoryScale:
    """Bytes to inches, the same for all cards.

    Args:
        cards: That are drawn.
        height: Of the largest, in inches.
    """

    def __init__(self, cards: Sequence[CardPlan], height: float) -> None:
        self.most = max(1, *(max(card.capacity_bytes, card.needed_bytes) for card in cards))
        self.height = height

    def inches(self, size: float) -> float:
        """The height of so many bytes."""
        return self.height * size / self.most

    def draw(self, sheet: Sheet, left: float, right: float, bottom: float) -> None:
        """Lines at round numbers of GiB behind the bars, and the numbers at the left of them."""
        step = _nice(self.most / GIB / _TICKS)
        for tick in range(int(self.most / GIB / step) + 1):
            y = bottom - self.inches(tick * step * GIB)
            style = {"color": "#e3e7ec", "zorder": 0.5} if tick else {"color": INK, "zorder": 4}
            sheet.line((left, right), (y, y), linewidth=0.8, **style)
            sheet.words(left - 0.08, y, f"{tick * step:g}", size=7.5, colour=DIM, align="right")
        sheet.words(left - 0.08, bottom - self.height - 0.2, "GiB", size=7.5, colour=DIM, align="right")


def draw_bar(
    sheet: Sheet, card: CardPlan, scale: MemoryScale, x: float, width: float, bottom: float, *, named: bool
) -> None:
    """One card's memory, and beside it the GiB of each part.

    Args:
        sheet: To draw on.
        card: Whose memory it is.
        scale: Of all cards.
        x: The left of the bar.
        width: Of the bar and what is said beside it.
        bottom: Of the bar.
        named: Are the parts called by name, beside their colour?
    """
    parts = memory_parts(card)
    for part in parts:
        _draw_part(sheet, part, scale, x, bottom)
    capacity = scale.inches(card.capacity_bytes)
    sheet.box(x, bottom - capacity, _BAR, capacity, facecolor="none", edgecolor=INK, linewidth=1.3, zorder=4)
    labels = [(part.start_bytes + part.size_bytes / 2, part.size_bytes, part.name, DIM) for part in parts]
    short = card.needed_bytes - card.available_bytes
    if short > 0:
        low, high = bottom - scale.inches(card.available_bytes), bottom - scale.inches(card.needed_bytes)
        sheet.box(x - 0.05, high, _BAR + 0.1, low - high, facecolor="none", edgecolor=BAD, linewidth=2.2, zorder=5)
        labels.append((card.available_bytes + short / 2, short, "short", BAD))
    _draw_labels(sheet, labels, scale, x + _BAR, width - _BAR, bottom, named=named)


def memory_legend(cards: Sequence[CardPlan]) -> list[Part]:
    """One part of each name that occurs, from the bottom of the bars to the top."""
    found = {part.name: part for card in cards for part in memory_parts(card)}
    order = [category.value for category in CATEGORY_COLOURS]
    kinds = list(Kind)
    return sorted(
        found.values(),
        key=lambda part: (kinds.index(part.kind), order.index(part.name) if part.name in order else len(order)),
    )


def fill_style(part: Part) -> dict[str, Any]:
    """How a part is filled: needed in its colour, free pale, reserve hatched."""
    if part.kind is Kind.RESERVE:
        return {"facecolor": "none", "edgecolor": EDGE, "hatch": "//////", "linewidth": 0}
    if part.kind is Kind.FREE:
        return {"facecolor": _FREE, "edgecolor": "none"}
    return {"facecolor": part.colour, "edgecolor": "white", "linewidth": 0.6}


def _draw_part(sheet: Sheet, part: Part, scale: MemoryScale, x: float, bottom: float) -> None:
    height = scale.inches(part.size_bytes)
    y = bottom - scale.inches(part.start_bytes) - height
    sheet.box(x, y, _BAR, height, zorder=1 if part.kind is Kind.RESERVE else 2, **fill_style(part))


def _draw_labels(
    sheet: Sheet, labels: Sequence[tuple[float, int, str, str]], scale: MemoryScale, x: float, width: float,
    bottom: float, *, named: bool,
) -> None:  # fmt: skip
    """Beside the middle of each part, moved apart where parts are thin."""
    labels = sorted(labels)
    middles = [bottom - scale.inches(middle) for middle, *_ in labels]
    figures = [gib(size) for _, size, _, _ in labels]
    widest = max(measured(figure, 7.5) for figure in figures)
    at = x + 0.26
    for middle, y, figure, (_, _, name, colour) in zip(
        middles, apart(middles, bottom - scale.height - 0.1, bottom), figures, labels, strict=True
    ):
        sheet.line((x + 0.02, x + 0.08, at - 0.1, at - 0.04), (middle, middle, y, y), color="#a9b2bd", linewidth=0.7)
        number = INK if colour == DIM else colour
        sheet.words(at + widest, y, figure, size=7.5, colour=number, align="right", ground="white")
        if named or colour != DIM:
            room = width - 0.34 - widest
            sheet.words(at + widest + 0.08, y, name, size=7.5, colour=colour, width=room, ground="white")


def apart(middles: Sequence[float], top: float, bottom: float) -> list[float]:
    """Places from the bottom up (larger is lower) near `middles`, a line's height or more from each other.

    >>> [round(y, 3) for y in apart([3.0, 2.99, 1.0], top=0.0, bottom=3.0)]
    [2.917, 2.752, 1.0]
    """
    lowest = bottom - _LINE_HEIGHT / 2
    places: list[float] = []
    for middle in middles:
        places.append(min(middle, lowest))
        lowest = places[-1] - _LINE_HEIGHT
    highest = top
    for index in reversed(range(len(places))):
        places[index] = max(places[index], highest)
        highest = places[index] + _LINE_HEIGHT
    return places


def gib(size: int) -> str:
    """A size in GiB with as many digits as tell it from nothing.

    >>> gib(2**30), gib(50 * 2**20), gib(2**20)
    ('1.00', '0.05', '<0.01')
    """
    return f"{size / GIB:.2f}" if size >= GIB / 200 else "<0.01"


def _nice(least: float) -> float:
    """1, 2 or 5 times a power of ten, not less than a number."""
    power = math.pow(10, math.floor(math.log10(least)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * least)
