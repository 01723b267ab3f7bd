"""What the picture and the page of a plan are made of: the parts of a card's memory, and which colour is what.

A plan names what bytes are for as planning does, a profile as the trace does. They are drawn alike: with the names and
the colours of the profile's, so that a plan and a profile of the same step can be laid side by side.
"""

from collections import defaultdict
from dataclasses import dataclass
from enum import StrEnum

from memseg.levels import Recompute
from memseg.planning import CardPlan
from memseg.planning import Category as Planned
from memseg.profiling import Category
from memseg.reports.colours import CATEGORY_COLOURS

LEVEL_COLOURS = {
    Recompute.NONE: "#e6e9f7",
    Recompute.NORMS: "#bcc5ee",
    Recompute.UNITS: "#8591dd",
    Recompute.SEGMENT: "#333a94",
}
"""The more is rebuilt, the darker: they can be told apart without seeing colours."""
LEVEL_WORDS = {
    Recompute.NONE: "keeps everything",
    Recompute.NORMS: "rebuilds norms",
    Recompute.UNITS: "rebuilds units",
    Recompute.SEGMENT: "rebuilds all",
}
OUTSIDE_COLOUR = "#8e4ec6"
OTHER_COLOUR = "#c2185b"
"""Of what a plan written by hand has beside the categories known."""

_DRAWN_AS = {
    Planned.PARAMETER: Category.PARAMETER,
    Planned.BUFFER: Category.PARAMETER,
    Planned.OPTIMIZER_STATE: Category.OPTIMIZER_STATE,
    Planned.INPUT: Category.INPUT,
    Planned.GRADIENT: Category.GRADIENT,
    Planned.TRANSFER: Category.COMMUNICATION,
    Planned.ACTIVATION: Category.SAVED,
    Planned.TEMPORARY: Category.TEMPORARY,
}


class Kind(StrEnum):
    """Which part of a card's capacity something is."""

    PEAK = "peak"
    """Of the predicted peak, what one category takes."""
    OUTSIDE = "outside"
    """What the process takes beside the allocator."""
    FREE = "free"
    RESERVE = "reserve"


@dataclass(frozen=True)
class Part:
    """One piece of a card's memory."""

    kind: Kind
    name: str
    size_bytes: int
    start_bytes: int
    """Where it begins, counted from the bottom."""
    colour: str = ""
    """Of what is needed."""


def memory_parts(card: CardPlan) -> list[Part]:
    """The parts of a card's memory from the bottom, none of them empty.

    They add up to the capacity of a card that has room. Where one has too little, there is nothing free, and what is
    needed lies over the reserve or beyond the capacity.
    """
    sizes: dict[str, int] = defaultdict(int)
    for name, size in card.by_category.items():
        sizes[_drawn_name(name)] += size
    known: dict[str, str] = {category.value: colour for category, colour in CATEGORY_COLOURS.items()}
    order = [name for name in known if name in sizes] + sorted(sizes.keys() - known.keys())
    pieces = [(Kind.PEAK, name, sizes[name], known.get(name, OTHER_COLOUR)) for name in order]
    pieces += [
        (Kind.OUTSIDE, "outside the allocator", card.outside_bytes, OUTSIDE_COLOUR),
        (Kind.FREE, "free", max(0, card.available_bytes - card.needed_bytes), ""),
    ]
    parts, start = [], 0
    for kind, name, size, colour in pieces:
        parts.append(Part(kind, name, size, start, colour))
        start += size
    parts.append(Part(Kind.RESERVE, "reserve", card.reserve_bytes, card.available_bytes))
    return [part for part in parts if part.size_bytes]


def _drawn_name(category: str) -> str:
    try:
        return _DRAWN_AS[Planned(category)].value
    except ValueError:
        return category.replace("_", " ")
