"""What to say when nothing fits: by how much, where, and which single changes would mend it.

"Out of memory" leaves the user to guess among a dozen settings. Each piece of advice here has been planned in full and
fits; what would not fit is not said. Costs of a changed run (a smaller batch, frozen norms) take a profile each, so
the caller hands them over as functions, called only once nothing fits.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from memseg.errors import InfeasiblePlanError, InputError
from memseg.planning.cards import Card, known_cards
from memseg.planning.strategies import Placement
from memseg.planning.workload import Workload
from memseg.units import GIB, format_bytes

Closest = Callable[[Workload, Sequence[Card]], Placement | None]
"""A placement on these cards that fits, or else the one that needs least, under the settings in force."""

_LARGEST_CPU_GIB = 1024
"""Beyond this no larger cpu card is advised."""


@dataclass(frozen=True)
class Change:
    """A single change to the run that the user may accept."""

    description: str
    """As in "batch 1" or "frozen norm"."""
    workload: Callable[[], Workload]
    """The changed run; called only if needed."""


class NothingFitsError(InfeasiblePlanError):
    """No plan fits. Carries the placement that came closest, and the changes that would mend it.

    Args:
        closest: Of all placements, the one with the smallest shortfall.
        advice: Single changes, each of which fits.
    """

    def __init__(self, closest: Placement, advice: Sequence[str]) -> None:
        worst = closest.worst_stage
        self.closest = closest
        self.card = worst.card
        self.needed_bytes = worst.needed_bytes
        self.available_bytes = worst.card.available_bytes
        self.moment = str(worst.peak.moment)
        self.layer = worst.peak.moment.segment
        """The segment at work at that moment; None in the optimizer step."""
        outside = {"outside": worst.outside_bytes} if worst.outside_bytes else {}
        self.by_category = worst.peak.by_category | outside
        """What `needed_bytes` is for."""
        self.stage_number = worst.number + 1
        """Of the stage that does not fit, counted from 1."""
        self.segments = tuple(segment.name for segment in worst.stage.segments)
        """Of the stage that does not fit."""
        message = (
            f"no plan fits; the closest ({closest.strategy}) fails on {self.card.name} with {self.segments[0]} .. "
            f"{self.segments[-1]}: {self.moment} needs {format_bytes(self.needed_bytes)}, available are "
            f"{format_bytes(self.available_bytes)} ({format_bytes(self.card.capacity_bytes)} less the reserve of "
            f"{format_bytes(self.card.reserve_bytes)}), {format_bytes(worst.shortfall_bytes)} short"
        )
        if advice:
            message += f"; each of these alone would fit: {' | '.join(advice)}"
        super().__init__(message, shortfall_bytes=worst.shortfall_bytes, advice=advice)


def infeasible_json(error: NothingFitsError) -> str:
    """The JSON form of the answer that nothing fits, beside that of a plan."""
    return json.dumps(
        {
            "feasible": False,
            "strategy": error.closest.strategy,
            "shortfall_bytes": error.shortfall_bytes,
            "needed_bytes": error.needed_bytes,
            "available_bytes": error.available_bytes,
            "card": error.card.name,
            "moment": error.moment,
            "layer": error.layer,
            "segments": list(error.segments),
            "advice": error.advice,
        },
        indent=2,
    )


def find_advice(
    workload: Workload, cards: Sequence[Card], changes: Iterable[Change], tight: Card, closest: Closest
) -> list[str]:
    """Single changes that would fit, each really placed: first the caller's, then other cards.

    Args:
        workload: That does not fit.
        cards: That it does not fit.
        changes: To the run, that the caller offers.
        tight: The card of the closest placement that was too small.
        closest: Places a run.
    """
    advice = []
    for change in changes:
        placement = _placed(closest, change.workload(), cards)
        if placement and placement.fits:
            advice.append(f"{change.description} ({_need(placement)})")
    position = list(cards).index(tight)

    def with_other(card: Card) -> Placement | None:
        return closest(workload, [*cards[:position], card, *cards[position + 1 :]])

    larger = smallest_fitting(_larger_cards(tight), with_other)
    if larger:
        card, placement = larger
        advice.append(f"{card.name} in place of {tight.name} ({_need(placement)})")
    # There is no second card of this machine's.
    placement = _placed(closest, workload, [*cards, tight]) if tight.device is None else None
    if placement and placement.fits:
        advice.append(f"one more {tight.name} ({_need(placement)})")
    return advice


def _placed(closest: Closest, workload: Workload, cards: Sequence[Card]) -> Placement | None:
    """None too where the changed run is none."""
    try:
        return closest(workload, cards)
    except InputError:
        return None


def _larger_cards(tight: Card) -> list[Card]:
    """Cards that may stand in for `tight`, from the smallest: known CUDA cards, or a cpu card in whole GiB."""
    if tight.kind == "cpu":
        base = tight.name.partition(":")[0] if ":" in tight.name else tight.name
        sizes = range(tight.capacity_bytes // GIB + 1, _LARGEST_CPU_GIB + 1)
        return [replace(tight, name=f"{base}:{size}GiB", capacity_bytes=size * GIB) for size in sizes]
    return [card for card in known_cards() if card.kind == "cuda" and card.available_bytes > tight.available_bytes]


def smallest_fitting(cards: Sequence[Card], place: Callable[[Card], Placement | None]) -> tuple[Card, Placement] | None:
    """The first of `cards`, sorted by what they have available, on which the placement fits; found by halving."""
    found, low, high = None, 0, len(cards)
    while low < high:
        middle = (low + high) // 2
        placement = place(cards[middle])
        if placement and placement.fits:
            found, high = (cards[middle], placement), middle
        else:
            low = middle + 1
    return found


def _need(placement: Placement) -> str:
    """What the placement needs on the card with the least room."""
    worst = placement.worst_stage
    need, room = format_bytes(worst.needed_bytes), format_bytes(worst.card.available_bytes)
    return f"needs {need} of {room} on {worst.card.name}"
