"""Costs and cards in, the fastest plan that fits out; or an error that says what is missing and what would mend it."""

from collections.abc import Iterable, Sequence
from typing import Literal

from memseg.errors import InputError
from memseg.planning.advice import Change, NothingFitsError, find_advice
from memseg.planning.cards import Card
from memseg.planning.costs import ModelCosts
from memseg.planning.plan import Alternative, CardPlan, PlacedSegment, Plan, unsplittable
from memseg.planning.strategies import MOST_ORDERS, PlacedStage, Placement, Placer, num_orders


def make_plan(
    costs: ModelCosts,
    cards: Sequence[Card],
    *,
    strategy: Literal["auto", "single", "split"] = "auto",
    changes: Iterable[Change] = (),
) -> Plan:
    """The plan with the most images per second among all that fit.

    Args:
        costs: Of one training step, from the profiler.
        cards: To train on. "single" takes the best one of them, "split" uses all, in any order.
        strategy: "auto" compares both.
        changes: Single changes to try when nothing fits; their costs are asked for only then.

    Raises:
        NothingFitsError: no placement fits; with the closest one, and the changes that would mend it.
        InputError: no cards, or a split over one card, over more cards than segments beside the loss, or over too many
            different ones.
    """
    _check(costs, cards, strategy)
    placer = Placer(costs)
    placements = _placements(placer, cards, strategy)
    if placements:
        return _plan(costs, placements)

    def closest_of(other: ModelCosts, others: Sequence[Card]) -> Placement:
        return _closest(placer if other is costs else Placer(other), others, strategy)

    closest = closest_of(costs, cards)
    raise NothingFitsError(closest, find_advice(costs, cards, changes, closest.worst_stage.card, closest_of))


def _check(costs: ModelCosts, cards: Sequence[Card], strategy: str) -> None:
    if not cards:
        raise InputError("a plan needs at least one card; try cpu:8GiB")
    if strategy == "split" and (reason := unsplittable(costs.norm, costs.precision)):
        raise InputError(f"{reason}; take strategy single")
    if strategy == "split" and len(cards) < 2:
        raise InputError(f"a split needs at least two cards, got {cards[0].name}; name it twice if there are two of it")
    if strategy != "single" and len(cards) > len(costs.segments) - 1:
        raise InputError(
            f"a split needs a segment for each card, the loss not counted: {costs.model} has "
            f"{len(costs.segments) - 1}, got {len(cards)} cards"
        )
    if strategy != "single" and num_orders(cards) > MOST_ORDERS:
        raise InputError(
            f"a split tries at most {MOST_ORDERS} orders of the cards, these have {num_orders(cards)}; name fewer"
        )


def _placements(placer: Placer, cards: Sequence[Card], strategy: str) -> list[Placement]:
    """All that fit, the fastest first."""
    placements: list[Placement | None] = []
    if strategy != "split":
        placements += [placer.single(card) for card in dict.fromkeys(cards)]
    if strategy != "single" and len(cards) > 1 and not unsplittable(placer.costs.norm, placer.costs.precision):
        placements.append(placer.split(cards))
    return sorted((found for found in placements if found), key=lambda placement: placement.step_seconds)


def _closest(placer: Placer, cards: Sequence[Card], strategy: str) -> Placement:
    """Of all placements, the one with the smallest shortfall, or the most room."""
    placements: list[Placement | None] = []
    if strategy != "split":
        placements += [placer.closest_single(card) for card in dict.fromkeys(cards)]
    if strategy != "single" and len(cards) > 1 and not unsplittable(placer.costs.norm, placer.costs.precision):
        placements.append(placer.closest_split(cards))
    return min((p for p in placements if p), key=lambda placement: placement.worst_stage.shortfall_bytes)


def _plan(costs: ModelCosts, placements: Sequence[Placement]) -> Plan:
    best, *others = placements
    return Plan(
        model=costs.model,
        num_classes=costs.num_classes,
        image=costs.image,
        batch=costs.batch,
        norm=costs.norm,
        precision=costs.precision,
        strategy=best.strategy,
        step_seconds=best.step_seconds,
        images_per_second=costs.batch / best.step_seconds,
        cards=tuple(_card_plan(costs, placed) for placed in best.stages),
        transfer_seconds=best.transfer_seconds,
        alternatives=tuple(
            Alternative(
                strategy=other.strategy,
                cards=tuple(placed.card.name for placed in other.stages),
                images_per_second=costs.batch / other.step_seconds,
                step_seconds=other.step_seconds,
            )
            for other in others
        ),
    )


def _card_plan(costs: ModelCosts, placed: PlacedStage) -> CardPlan:
    levels = placed.stage.recompute_of(placed.choice.levels)
    return CardPlan(
        card=placed.card.name,
        capacity_bytes=placed.card.capacity_bytes,
        reserve_bytes=placed.card.reserve_bytes,
        predicted_peak_bytes=placed.choice.peak.size,
        peak_moment=str(placed.choice.peak.moment),
        batch_share=costs.batch,
        by_category=placed.choice.peak.by_category,
        segments=tuple(
            PlacedSegment(name=segment.name, recompute=recompute)
            for segment, recompute in zip(placed.stage.segments, levels, strict=True)
        ),
        compute_seconds=placed.seconds,
    )
