"""How much fits: the largest batch, the largest image, the smallest cards.

Each question is one of many plans, and each plan takes a profile. Memory grows with images and pixels almost in
proportion, so two plans tell nearly where it ends, and few more where exactly.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from memseg.errors import InputError
from memseg.planning.advice import smallest_fitting
from memseg.planning.cards import Card, known_cards
from memseg.planning.plan import Plan
from memseg.planning.planner import Settings, closest_placement, make_plan
from memseg.planning.strategies import Placement
from memseg.planning.workload import Workload

CARD_COUNTS = (1, 2, 4, 8)
"""Of equal cards, that are tried when any may be had."""


def largest_fitting(over: Callable[[int], float], most: int) -> int | None:
    """The largest of 1..`most` that fits, or None if 1 does not.

    Args:
        over: Of a number, by how many bytes it is too large: never less for a larger number, at most 0 where it fits,
            infinite where it is impossible.
        most: The last number that is tried.

    >>> largest_fitting(lambda images: 3 * images - 10.0, most=100)
    3
    """
    fitting, too_large = (0, -math.inf), (most + 1, math.inf)
    probe = 1
    while too_large[0] - fitting[0] > 1:
        value = over(probe)
        if value <= 0:
            fitting = (probe, value)
        else:
            too_large = (probe, value)
        probe = _between(fitting, too_large)
    return fitting[0] or None


def _between(fitting: tuple[int, float], too_large: tuple[int, float]) -> int:
    """Where a straight line through both ends meets 0, or twice as far where there is one end only."""
    (low, below), (high, above) = fitting, too_large
    if math.isfinite(above) and math.isfinite(below):
        guess = low + math.floor((high - low) * -below / (above - below))
        return min(max(guess, low + 1), high - 1)
    return min(2 * low, high - 1) if low else (low + high) // 2


@dataclass(frozen=True)
class Capacity:
    """The largest that fits, and the plan for it."""

    number: int
    plan: Plan


def largest_plan(
    workload_of: Callable[[int], Workload], cards: Sequence[Card], settings: Settings, *, most: int
) -> Capacity | None:
    """The plan for the largest of 1..`most` of something, or None if not even 1 fits.

    Args:
        workload_of: With so many of it.
        cards: To train on.
        settings: What is decided already.
        most: The last number that is tried.

    Raises:
        InputError: settings that contradict each other, the cards or the model.
    """
    workloads: dict[int, Workload] = {}

    def over(number: int) -> float:
        workloads[number] = workload_of(number)
        try:
            placement = closest_placement(workloads[number], cards, settings)
        except InputError:
            if number > 1:
                raise
            # A batch of 1 cannot be shared out, but a larger one can.
            return -math.inf
        return math.inf if placement is None else placement.worst_stage.shortfall_bytes

    number = largest_fitting(over, most)
    return None if number is None else Capacity(number, make_plan(workloads[number], cards, settings))


def smallest_cards(workload: Workload, settings: Settings) -> Iterator[Plan]:
    """Plans on the smallest known CUDA cards that do: on one, on two equal ones, and so on, each smaller than before.

    Raises:
        InputError: settings that contradict each other or the model.
    """
    cards = [card for card in known_cards() if card.kind == "cuda"]
    for count in CARD_COUNTS:

        def placed(card: Card, count: int = count) -> Placement | None:
            return _closest(workload, [card] * count, settings)

        found = smallest_fitting(cards, placed)
        if found:
            card, _ = found
            yield make_plan(workload, [card] * count, settings)
            cards = [other for other in cards if other.available_bytes < card.available_bytes]


def _closest(workload: Workload, cards: Sequence[Card], settings: Settings) -> Placement | None:
    """None too where there are too few cards for what is asked."""
    try:
        return closest_placement(workload, cards, settings)
    except InputError:
        if len(cards) == CARD_COUNTS[-1]:
            raise
        return None
