"""How much fits: the largest batch, the largest image, the smallest cards.

Each question is one of many plans, and each plan takes a profile. Memory grows with images and pixels almost in
proportion, so two plans tell nearly where it ends, and few more where exactly: every other guess is the middle of what
is left, so that there are never more than twice as many as doubling and halving would take.
"""

import itertools
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


def largest_fitting(over: Callable[[int], float], most: int, *, least: int = 1) -> int | None:
    """The largest of `least`..`most` that fits, or None if `least` does not.

    Args:
        over: Of a number, by how many bytes it is too large: never less for a larger number, at most 0 where it fits,
            infinite where it is impossible.
        most: The last number that is tried.
        least: The first one.

    >>> largest_fitting(lambda images: 3 * images - 10.0, most=100)
    3
    """
    first = over(least)
    if first > 0:
        return None
    known = [(least, first)]
    too_large = (most + 1, math.nan)  # Nobody has tried that one.
    guesses = itertools.cycle((_on_the_line, _in_the_middle))
    while too_large[0] - known[-1][0] > 1:
        guess = next(guesses)(known, too_large)
        probe = min(max(guess, known[-1][0] + 1), too_large[0] - 1)
        value = over(probe)
        if value <= 0:
            known.append((probe, value))
        else:
            too_large = (probe, value)
    return known[-1][0]


def _on_the_line(known: Sequence[tuple[int, float]], too_large: tuple[int, float]) -> int:
    """Where a straight line through the nearest two that are known meets 0; with one of them, as `_in_the_middle`."""
    ends = [one for one in (*known[-2:], too_large) if math.isfinite(one[1])][-2:]
    if len(ends) == 2 and ends[1][1] > ends[0][1]:
        (low, below), (high, above) = ends
        return low + math.floor((high - low) * -below / (above - below))
    return _in_the_middle(known, too_large)


def _in_the_middle(known: Sequence[tuple[int, float]], too_large: tuple[int, float]) -> int:
    """Halfway, so that no bend of the line makes the search long; where nothing was too large, twice as far."""
    low, high = known[-1][0], too_large[0]
    return 2 * low if math.isnan(too_large[1]) else (low + high) // 2


@dataclass(frozen=True)
class Capacity:
    """The largest that fits, and the plan for it."""

    number: int
    plan: Plan


def largest_plan(
    workload_of: Callable[[int], Workload],
    cards: Sequence[Card],
    settings: Settings,
    *,
    most: int,
    least: int = 1,
    known: int = 0,
) -> Capacity | None:
    """The plan for the largest of `least`..`most` of something, or None if not even `least` fits.

    Args:
        workload_of: With so many of it.
        cards: To train on.
        settings: What is decided already.
        most: The last number that is tried.
        least: The first one.
        known: Up to here, a number that the model cannot take is taken for too small, and above for too large.

    Raises:
        InputError: settings that contradict each other, the cards or the model.
    """
    workloads: dict[int, Workload] = {}
    measured: dict[int, float] = {}

    def over(number: int) -> float:
        if number not in measured:
            workloads[number] = workload_of(number)
            measured[number] = _over(workloads[number], cards, settings, is_small=number <= known)
        return measured[number]

    number = largest_fitting(over, most, least=least)
    return None if number is None else Capacity(number, make_plan(workloads[number], cards, settings))


def _over(workload: Workload, cards: Sequence[Card], settings: Settings, *, is_small: bool) -> float:
    try:
        placement = closest_placement(workload, cards, settings)
    except InputError:
        if not is_small:
            raise
        return -math.inf
    return math.inf if placement is None else placement.worst_stage.shortfall_bytes


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
