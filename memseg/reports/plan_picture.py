"""A plan as a picture: the model from top to bottom, cut into the stages of each card, and how full the cards get.

A column is a card. Its segments stand at their place in the model, so a split is a staircase, and one sees where maps
cross to the next card. Below, or beside one or two cards, is the memory of all cards to one scale.

    +------+
    | stem |
    | ...  |
    +------+--+
              v
           +------+
           | ...  |
           | loss |
           +------+
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from memseg.planning import CardPlan, Plan
from memseg.reports.colours import ink_on
from memseg.reports.plan import (
    cards_in_order,
    place_words,
    replica_words,
    settings_line,
    share_words,
    shortage_lines,
    speed_line,
    strategy_line,
)
from memseg.reports.plan_memory import MemoryScale, draw_bar, fill_style, gib, memory_legend
from memseg.reports.plan_parts import LEVEL_COLOURS, LEVEL_WORDS
from memseg.reports.sheet import BAD, DIM, EDGE, INK, LINE, Sheet, measured, wrapped
from memseg.units import format_seconds

MOST_COLUMNS = 8
"""Cards beside each other; further replicas go below."""

_MARGIN = 0.35
_AXIS = 0.5
"""Left of the memory, for the numbers of its scale."""
_LEAST_WIDTH = 9.0
_LANE = (1.55, 3.2)
"""The least and the most width of a column; between them as long names ask for."""
_NAMED = (2.5, 4)
"""Width of a column of memory whose parts are called by name, and how many such columns there may be."""
_GAP, _GROUP_GAP = 0.36, 0.3
"""Between the cards of a replica, and between replicas."""
_PAD = 0.12
"""Of the ground of a replica around its columns."""
_BESIDE = 0.3
"""Between the segments and the memory at the right of them."""
_LINE = 0.19
_ROW = 0.27
_LEAST_BAR = 3.4
_TITLE_LINE, _LEGEND_LINE = 0.27, 0.28


@dataclass(frozen=True)
class _Band:
    """Replicas beside each other, and where their columns are."""

    replicas: list[list[CardPlan]]

    @property
    def cards(self) -> list[CardPlan]:
        return [card for replica in self.replicas for card in replica]

    def width(self, column: float) -> float:
        return self.lefts(column)[-1] + column + _PAD

    def lefts(self, column: float) -> list[float]:
        """Where the column of each card begins."""
        found, x = [], 0.0
        for replica in self.replicas:
            found += [x + _PAD + stage * (column + _GAP) for stage in range(len(replica))]
            x = found[-1] + column + _PAD + _GROUP_GAP
        return found


class _Layout:
    """How large everything is."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.bands = _bands(plan)
        cards = max(len(band.cards) for band in self.bands)
        self.beside = len(plan.cards) <= 2
        self.named = cards <= _NAMED[1]
        wanted = [measured(name, 8) + 0.2 for name in plan.segment_names]
        wanted += [measured(words, 8) for card in plan.cards for words in (*_about(plan, card), _fill(card))]
        self.lane = min(_LANE[1], max(_LANE[0], *wanted))
        self.memory = max(_NAMED[0], self.lane) if self.named else self.lane
        if not self.beside:
            self.lane = self.memory
        elif (spare := _LEAST_WIDTH - self._wide()) > 0:
            self.lane += spare / 2 / cards
            self.memory += spare / 2 / cards
        self.rows = _ROW * len(plan.segment_names)
        self.head = 0.36 + _LINE * max(len(_about(plan, card)) for card in plan.cards)
        self.head += 0.25 if plan.strategy.replicates else 0
        self.foot = 0.12 + _LINE * 4
        self.bar = max(_LEAST_BAR, self.head + self.rows - self.foot - 0.3) if self.beside else _LEAST_BAR
        segments, memory = self.head + self.rows + 2 * _PAD, 0.4 + self.bar + self.foot
        self.band_height = max(segments, memory) + 0.15 if self.beside else segments + memory + 0.3
        self.width = max(_LEAST_WIDTH, self._wide())
        self.scale = MemoryScale(plan.cards, self.bar)

    @property
    def lanes_width(self) -> float:
        """Of the segments of the widest band."""
        return max(band.width(self.lane) for band in self.bands)

    def _wide(self) -> float:
        wide = 2 * _MARGIN + self.lanes_width + _AXIS
        return wide + _BESIDE + max(band.width(self.memory) for band in self.bands) if self.beside else wide


def draw_plan(plan: Plan, path: Path) -> None:
    """Write the picture as a PNG, at least 1080 pixels wide, about 2000 with eight cards.

    Raises:
        OSError: the file cannot be written.
    """
    layout = _Layout(plan)
    room = layout.width - 2 * _MARGIN
    title, legends = _title(plan, room), _legends(plan, room)
    below_title = _MARGIN + _TITLE_LINE * len(title)
    top = below_title + _LEGEND_LINE * len(legends) + 0.2
    sheet = Sheet(layout.width, top + layout.band_height * len(layout.bands) + 0.1)
    for row, (line, style) in enumerate(title):
        sheet.words(_MARGIN, _MARGIN + _TITLE_LINE * row, line, **style)
    for row, entries in enumerate(legends):
        _draw_legend(sheet, below_title + _LEGEND_LINE * row + 0.08, entries)
    for number, band in enumerate(layout.bands):
        _draw_band(sheet, layout, band, top + layout.band_height * number)
    sheet.save(path)


def _bands(plan: Plan) -> list[_Band]:
    """Whole replicas, as many beside each other as there is room for."""
    bands: list[_Band] = []
    for _, cards in groupby(cards_in_order(plan), key=lambda card: card.replica):
        replica = list(cards)
        if bands and len(bands[-1].cards) + len(replica) <= MOST_COLUMNS:
            bands[-1].replicas.append(replica)
        else:
            bands.append(_Band([replica]))
    return bands


def _title(plan: Plan, room: float) -> list[tuple[str, dict[str, Any]]]:
    """Lines above everything, and how they are set."""
    told: list[tuple[str, dict[str, Any]]] = [
        (strategy_line(plan), {"size": 12, "bold": True}),
        (speed_line(plan), {"size": 9.5}),
        (settings_line(plan), {"size": 9.5, "colour": DIM}),
        *((line, {"size": 10, "bold": True, "colour": BAD}) for line in shortage_lines(plan)),
    ]
    return [
        (line, style | {"width": room})
        for words, style in told
        for line in wrapped(words, room, style["size"], bold=style.get("bold", False))
    ]


_Entry = tuple[str, dict[str, Any] | None]
"""What a legend says, and how the square before it is filled; None for an arrow."""


def _legends(plan: Plan, room: float) -> list[list[_Entry]]:
    """Rows of the legend: recompute levels, then what memory is for; each as wide as there is room for."""
    used = {segment.recompute for card in plan.cards for segment in card.segments}
    levels: list[_Entry] = [
        (f"{level}: {LEVEL_WORDS[level]}", {"facecolor": colour, "edgecolor": DIM, "linewidth": 0.6})
        for level, colour in LEVEL_COLOURS.items()
        if level in used
    ]
    if plan.strategy.splits:
        levels.append(("maps to the next card, their gradients back", None))
    parts: list[_Entry] = [
        (part.name, fill_style(part) | {"edgecolor": EDGE, "linewidth": 0.6}) for part in memory_legend(plan.cards)
    ]
    rows: list[list[_Entry]] = []
    for entries in (levels, parts):
        rows.append([])
        taken = 0.0
        for entry in entries:
            width = _entry_width(entry)
            if rows[-1] and taken + width > room:
                rows.append([])
                taken = 0.0
            rows[-1].append(entry)
            taken += width
    return rows


def _entry_width(entry: _Entry) -> float:
    return 0.48 + measured(entry[0], 8)


def _draw_legend(sheet: Sheet, y: float, entries: Sequence[_Entry]) -> None:
    x = _MARGIN
    for entry in entries:
        words, style = entry
        if style is None:
            sheet.arrow([(x, y), (x + 0.22, y)])
        else:
            sheet.box(x, y - 0.075, 0.18, 0.15, **style)
        sheet.words(x + 0.26, y, words, size=8)
        x += _entry_width(entry)


def _draw_band(sheet: Sheet, layout: _Layout, band: _Band, top: float) -> None:
    left = _MARGIN if layout.beside else _MARGIN + _AXIS
    lanes = [left + x for x in band.lefts(layout.lane)]
    _draw_grounds(sheet, layout, band, lanes, top)
    first = top + _PAD + layout.head
    row_of = {name: row for row, name in enumerate(layout.plan.segment_names)}
    for card, x in zip(band.cards, lanes, strict=True):
        _draw_head(sheet, layout, card, x, first - 0.12)
        for segment in card.segments:
            y = first + _ROW * row_of[segment.name]
            _draw_segment(sheet, segment.name, LEVEL_COLOURS[segment.recompute], x, y, layout.lane)
    for (one, x), (other, next_x) in pairwise(zip(band.cards, lanes, strict=True)):
        if one.replica == other.replica:
            y = first + _ROW * (row_of[other.segments[0].name] - 0.5)
            middle = next_x + 0.3
            sheet.arrow([(x + layout.lane, y), (middle, y), (middle, y + _ROW / 2 + 0.01)])
    if layout.beside:
        bars = [_MARGIN + layout.lanes_width + _BESIDE + _AXIS + x for x in band.lefts(layout.memory)]
        bottom = top + 0.4 + layout.bar
    else:
        bars, bottom = lanes, top + layout.head + layout.rows + 2 * _PAD + 0.4 + layout.bar
    layout.scale.draw(sheet, bars[0] - _PAD, bars[-1] + layout.memory, bottom)
    for card, x in zip(band.cards, bars, strict=True):
        draw_bar(sheet, card, layout.scale, x, layout.memory, bottom, named=layout.named)
        _draw_foot(sheet, card, x, bottom, layout.memory)


def _draw_grounds(sheet: Sheet, layout: _Layout, band: _Band, lanes: Sequence[float], top: float) -> None:
    """A ground under the columns of each replica holds them together."""
    position = 0
    for replica in band.replicas:
        left, right = lanes[position], lanes[position + len(replica) - 1] + layout.lane
        height = layout.head + layout.rows + 2 * _PAD
        sheet.box(
            left - _PAD, top, right - left + 2 * _PAD, height, rounded=0.1, facecolor="#f5f6f8", edgecolor=LINE,
            linewidth=0.8, zorder=0,
        )  # fmt: skip
        for words in replica_words(layout.plan, replica[0]):
            sheet.words(left, top + 0.18, words, size=8.5, bold=True, colour=DIM, width=right - left)
        position += len(replica)


def _draw_head(sheet: Sheet, layout: _Layout, card: CardPlan, x: float, bottom: float) -> None:
    lines = _about(layout.plan, card)
    y = bottom - 0.04 - _LINE * len(lines)
    sheet.words(x, y - 0.01, card.card, size=10, bold=True, width=layout.lane)
    for line in lines:
        y += _LINE
        sheet.words(x, y, line, size=8, colour=DIM, width=layout.lane)


def _about(plan: Plan, card: CardPlan) -> list[str]:
    """What is said below the name of a card, above its segments."""
    work = f"{share_words(plan, card)}, {format_seconds(card.compute_seconds)} a pass"
    return [*filter(None, [" · ".join(place_words(plan, card))]), work]


def _fill(card: CardPlan) -> str:
    """What is said below the memory of a card."""
    share = f" ({card.needed_bytes / card.available_bytes:.0%})" if card.available_bytes > 0 else ""
    return f"{gib(card.needed_bytes)} of {gib(card.available_bytes)} GiB{share}"


def _draw_segment(sheet: Sheet, name: str, colour: str, x: float, y: float, width: float) -> None:
    box = {"facecolor": colour, "edgecolor": EDGE, "linewidth": 0.6, "zorder": 2}
    sheet.box(x, y + 0.015, width, _ROW - 0.03, rounded=0.035, **box)
    sheet.words(x + 0.1, y + _ROW / 2, name, size=8, colour=ink_on(colour), width=width - 0.2)


def _draw_foot(sheet: Sheet, card: CardPlan, x: float, bottom: float, width: float) -> None:
    moment = wrapped(f"at {card.peak_moment}", width, 8)
    lines: list[tuple[str, dict[str, Any]]] = [
        (card.card, {"size": 9, "bold": True}),
        (_fill(card), {"colour": INK if card.fits else BAD, "bold": not card.fits}),
        *((line, {"colour": DIM}) for line in [*moment[:1], " ".join(moment[1:])]),
    ]
    for row, (words, style) in enumerate(lines):
        sheet.words(x, bottom + 0.2 + _LINE * row, words, width=width, **style)
