"""Who runs what: `single`, one card runs everything, or `split`, consecutive segments on every card of the list.

    single      [ stem .. loss ] on one card
    split       [ stem .. block2 ] on one, [ skip2 .. loss ] on the next: the paper's

In a split the whole batch passes from stage to stage (batch statistics need it together), so the stages run one after
the other: a step takes the sum of their times and of the transfers. The cards may come in any order.

For k cards and n segments there are about n^(k-1) splits, each stage of which is a mixed-integer program of its own.
The best one is a shortest path over (position, cards left), if only the length of each edge, the stage's time, were
known. So begin with a lower bound for each, find the shortest path, solve its stages exactly, and look again, until
all stages on the shortest path are exact. Few programs are ever solved, and the answer is the true optimum. When
nothing fits, the same search with "sum of seconds" replaced by "worst shortfall" finds the split that came closest.
"""

import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from memseg.planning.cards import Card
from memseg.planning.costs import ModelCosts
from memseg.planning.memory import Stage
from memseg.planning.solver import StageChoice, StageSolver

Strategy = Literal["single", "split"]

MOST_ORDERS = 24
"""Different orders of the cards that a split compares (four different cards); more would take minutes to plan."""


@dataclass(frozen=True)
class PlacedStage:
    """A stage on its card."""

    card: Card
    stage: Stage
    choice: StageChoice

    @property
    def seconds(self) -> float:
        """Of computing, transfers left out."""
        return self.card.seconds(self.stage.work_of(self.choice.levels))

    @property
    def shortfall_bytes(self) -> int:
        """By how much the peak exceeds what the card has available; below zero where it fits."""
        return self.choice.peak.size - self.card.available_bytes


@dataclass(frozen=True)
class Placement:
    """All segments on cards, in the order of the step."""

    strategy: Strategy
    stages: tuple[PlacedStage, ...]
    transfer_seconds: float

    @property
    def step_seconds(self) -> float:
        """One step: stages and transfers one after the other; the optimizer's arithmetic is left out."""
        return sum(stage.seconds for stage in self.stages) + self.transfer_seconds

    @property
    def fits(self) -> bool:
        """Does every stage fit its card?"""
        return self.worst_stage.shortfall_bytes <= 0

    @property
    def worst_stage(self) -> PlacedStage:
        """The one with the least room, or the largest shortfall."""
        return max(self.stages, key=lambda placed: placed.shortfall_bytes)


def num_orders(cards: Sequence[Card]) -> int:
    """In how many ways the cards can be ordered, equal ones not told apart."""
    orders = math.factorial(len(cards))
    for count in Counter(cards).values():
        orders //= math.factorial(count)
    return orders


class Placer:
    """Places one model's segments on cards; remembers every stage it has solved."""

    def __init__(self, costs: ModelCosts) -> None:
        self.costs = costs
        self._num_segments = len(costs.segments)
        self._solver = cache(self._new_solver)
        self._fastest = cache(self._fastest_choice)

    def single(self, card: Card) -> Placement | None:
        """The whole model on `card`, or None if it does not fit."""
        choice = self._fastest(0, self._num_segments - 1, card)
        return self._placement("single", [(card, 0, self._num_segments - 1)], [choice]) if choice else None

    def split(self, cards: Sequence[Card]) -> Placement | None:
        """The fastest split over all of `cards`, or None if none fits."""
        path = _shortest_path(
            self._num_segments, cards, bound=self._fastest_seconds, exact=self._stage_seconds,
            between=self._transfer_seconds, join=operator.add,
        )  # fmt: skip
        if path is None:
            return None
        choices = [self._fastest(first, last, card) for card, first, last in path]
        return self._placement("split", path, [choice for choice in choices if choice])

    def closest_single(self, card: Card) -> Placement:
        """The whole model on `card` with the lowest peak, fit or not."""
        last = self._num_segments - 1
        return self._placement("single", [(card, 0, last)], [self._solver(0, last).smallest])

    def closest_split(self, cards: Sequence[Card]) -> Placement | None:
        """The split over `cards` with the smallest shortfall, fit or not; None with too few segments for the cards."""
        path = _shortest_path(
            self._num_segments, cards, bound=self._least_shortfall, exact=self._stage_shortfall,
            between=lambda cut, before, after: -math.inf, join=max,
        )  # fmt: skip
        if path is None:
            return None
        return self._placement("split", path, [self._solver(first, last).smallest for _, first, last in path])

    def _placement(
        self, strategy: Strategy, path: Sequence[tuple[Card, int, int]], choices: Sequence[StageChoice]
    ) -> Placement:
        stages = tuple(
            PlacedStage(card, self._solver(first, last).stage, choice)
            for (card, first, last), choice in zip(path, choices, strict=True)
        )
        transfers = [
            self._transfer_seconds(after.stage.first, before.card, after.card)
            for before, after in itertools.pairwise(stages)
        ]
        return Placement(strategy, stages, sum(transfers))

    def _new_solver(self, first: int, last: int) -> StageSolver:
        return StageSolver(Stage(self.costs, first, last))

    def _fastest_choice(self, first: int, last: int, card: Card) -> StageChoice | None:
        return self._solver(first, last).fastest(card)

    def _is_bare_loss(self, first: int, last: int) -> bool:
        """Is the stage nothing but the loss? That is not a stage: the loss is taken where the last logits are made."""
        return first == last == self._num_segments - 1

    def _fastest_seconds(self, first: int, last: int, card: Card) -> float:
        if self._is_bare_loss(first, last):
            return math.inf
        stages = self.costs.segments[first : last + 1]
        return sum(min(card.seconds(level.work) for level in segment.levels) for segment in stages)

    def _stage_seconds(self, first: int, last: int, card: Card) -> float:
        choice = self._fastest(first, last, card)
        return PlacedStage(card, self._solver(first, last).stage, choice).seconds if choice else math.inf

    def _least_shortfall(self, first: int, last: int, card: Card) -> float:
        if self._is_bare_loss(first, last):
            return math.inf
        return self._solver(first, last).least_bytes - card.available_bytes

    def _stage_shortfall(self, first: int, last: int, card: Card) -> float:
        return self._solver(first, last).smallest.peak.size - card.available_bytes

    def _transfer_seconds(self, cut: int, before: Card, after: Card) -> float:
        """Forward and back between the stage that ends before segment `cut` and the one that starts with it."""
        tensors = self._solver(cut, cut).stage.entering
        size = sum(maker.output_bytes * (2 if maker.output_needs_grad else 1) for maker in tensors)
        return size / min(before.link, after.link)


def _shortest_path(
    num_segments: int,
    cards: Sequence[Card],
    *,
    bound: Callable[[int, int, Card], float],
    exact: Callable[[int, int, Card], float],
    between: Callable[[int, Card, Card], float],
    join: Callable[[float, float], float],
) -> list[tuple[Card, int, int]] | None:
    """The best way to cut the segments into one stage per card: (card, first, last) of each stage.

    Args:
        num_segments: In the model.
        cards: All of them are used, in any order.
        bound: Never more than `exact`, and cheap.
        exact: The length of a stage (first, last, card); infinite where it is impossible.
        between: The length of the step from one stage to the next (first segment of the next, card, next card).
        join: Adds lengths up: `operator.add` or `max`.

    Returns:
        The path, or None if every one is infinitely long.
    """
    bound = cache(bound)
    solved: dict[tuple[int, int, Card], float] = {}

    def length(first: int, last: int, card: Card) -> float:
        known = solved.get((first, last, card))
        return bound(first, last, card) if known is None else known

    while True:
        total, path = _cut(num_segments, tuple(sorted(cards, key=lambda card: card.name)), length, between, join)
        if total == math.inf:
            return None
        unsolved = [(first, last, card) for card, first, last in path if (first, last, card) not in solved]
        if not unsolved:
            return path
        for stage in unsolved:
            solved[stage] = exact(*stage)


def _cut(
    num_segments: int,
    cards: tuple[Card, ...],
    length: Callable[[int, int, Card], float],
    between: Callable[[int, Card, Card], float],
    join: Callable[[float, float], float],
) -> tuple[float, list[tuple[Card, int, int]]]:
    """One pass of the search, with the lengths as they are: the total and its path."""

    @cache
    def best(position: int, left: tuple[Card, ...], before: Card | None) -> tuple[float, list[tuple[Card, int, int]]]:
        shortest: tuple[float, list[tuple[Card, int, int]]] = (math.inf, [])
        for number, card in enumerate(left):
            if card in left[:number]:
                continue
            others = left[:number] + left[number + 1 :]
            arrival = between(position, before, card) if before else -math.inf
            for last in range(position, num_segments - len(others)):
                if not others and last != num_segments - 1:
                    continue
                here = length(position, last, card)
                here = join(arrival, here) if before else here
                if here >= shortest[0]:
                    continue
                rest, path = best(last + 1, others, card) if others else (None, [])
                total = here if rest is None else join(here, rest)
                if total < shortest[0]:
                    shortest = (total, [(card, position, last), *path])
        return shortest

    return best(0, cards, None)
