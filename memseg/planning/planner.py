"""Costs and cards in, the best plan that fits out; or an error that says what is missing and what would mend it."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from memseg.errors import InputError, UnknownNameError
from memseg.levels import NormMode, Schedule, Strategy
from memseg.planning.advice import Change, NothingFitsError, find_advice
from memseg.planning.cards import Card
from memseg.planning.placer import Placer
from memseg.planning.plan import Alternative, CardPlan, PlacedSegment, Plan, installed_torch, unsplittable
from memseg.planning.replicas import best_shares, best_shares_alike, columns_of, grids, share_vectors
from memseg.planning.strategies import (
    NETWORK_BYTES_PER_SECOND,
    Aim,
    Column,
    Member,
    Pipeline,
    PlacedStage,
    Placement,
    Slot,
)
from memseg.planning.workload import Workload

MOST_HANDS = 5000
"""Numbers of cards of each kind that a split may use: 12 cards that are all different have 4096."""
MOST_MICRO_BATCHES = 16
"""More make the pipeline's pauses little shorter, and small micro-batches use a card badly."""


@dataclass(frozen=True)
class Settings:
    """What a user may decide; what is left out, the planner does."""

    strategy: Strategy | None = None
    aim: Aim = Aim.SPEED
    nodes: int = 1
    """Machines; each has an equal part of the cards, in order, and all of them are used."""
    network: float = NETWORK_BYTES_PER_SECOND
    """Bytes per second between them."""
    cut: tuple[str, ...] = ()
    """The first segment of each stage of a split but the first."""
    micro_batches: int | None = None
    schedule: Schedule | None = None


def make_plan(
    workload: Workload,
    cards: Sequence[Card],
    settings: Settings | None = None,
    *,
    changes: Iterable[Change] = (),
    force: bool = False,
) -> Plan:
    """The best plan among all that fit.

    Args:
        workload: What is to be trained.
        cards: To train on; those that do not help are left out.
        settings: What is decided already.
        changes: Single changes to try when nothing fits; their costs are asked for only then.
        force: Give the plan that comes closest where nothing fits, marked as not feasible.

    Raises:
        NothingFitsError: no placement fits; with the closest one, and the changes that would mend it.
        InputError: no cards, or settings that contradict each other, the cards or the model.
    """
    settings = settings or Settings()
    _check(workload, cards, settings)
    planning = _Planning(workload, cards, settings)
    placements = planning.fitting()
    if placements:
        return planning.plan(placements)

    closest = planning.closest()
    if closest is None:
        raise InputError(
            f"{_wanted(settings)} must be possible with a batch of {workload.batch} and {len(cards)} cards, and is "
            "not; take another strategy or batch, or more cards"
        )
    if force:
        return planning.plan([closest])

    def closest_of(other: Workload, others: Sequence[Card]) -> Placement | None:
        return closest_placement(other, others, settings)

    raise NothingFitsError(closest, find_advice(workload, cards, changes, closest.worst_stage.card, closest_of))


def closest_placement(workload: Workload, cards: Sequence[Card], settings: Settings) -> Placement | None:
    """A placement that fits, or else the one with the smallest shortfall; None where the settings leave none.

    Raises:
        InputError: as `make_plan`.
    """
    _check(workload, cards, settings)
    return _Planning(workload, cards, settings).closest(enough=True)


class _Planning:
    def __init__(self, workload: Workload, cards: Sequence[Card], settings: Settings) -> None:
        self._workload, self._settings = workload, settings
        per_node = len(cards) // settings.nodes
        self._slots = [Slot(card, position // per_node) for position, card in enumerate(cards)]
        self._per_node = per_node
        names = [segment.name for segment in workload.whole.segments]
        starts = [names.index(name) for name in settings.cut]
        self._placer = Placer(workload, network=settings.network, starts=starts)

    def fitting(self) -> list[Placement]:
        """All that fit, the best first."""
        found = [placement for placement in self._placements(self._settings.aim) if placement.fits]
        return sorted(found, key=lambda placement: placement.rank(self._settings.aim))

    def closest(self, *, enough: bool = False) -> Placement | None:
        """The one with the smallest shortfall; or, if that is `enough`, the first that fits."""
        best = None
        for placement in self._placements(Aim.CLOSEST):
            if best is None or placement.rank(Aim.CLOSEST) < best.rank(Aim.CLOSEST):
                best = placement
            if enough and best.fits:
                break
        return best

    def _placements(self, aim: Aim) -> Iterator[Placement]:
        kinds: list[tuple[Strategy, Callable[[Aim], Iterable[Placement | None]]]] = [
            (Strategy.SINGLE, self._singles),
            (Strategy.SPLIT, self._splits),
            (Strategy.REPLICATE, self._replicates),
            (Strategy.REPLICATE_SPLIT, self._replicated_splits),
        ]
        for strategy, place in kinds:
            if strategy in self._allowed:
                yield from (placement for placement in place(aim) if placement)

    @property
    def _allowed(self) -> Collection[Strategy]:
        """What is decided of splits allows nothing else."""
        settings = self._settings
        wanted = [settings.strategy] if settings.strategy else list(Strategy)
        if settings.cut or settings.schedule or (settings.micro_batches or 1) > 1:
            wanted = [strategy for strategy in wanted if strategy.splits]
        return wanted

    def _singles(self, aim: Aim) -> Iterator[Placement | None]:
        if self._settings.nodes == 1:
            yield from (self._placer.single(slot, aim) for slot in dict.fromkeys(self._slots))

    def _splits(self, aim: Aim) -> Iterator[Placement | None]:
        """The best one, whatever its micro-batches."""
        if self._can_split and len(self._slots) > 1:
            best: Placement | None = None
            for pipeline in self._pipelines(self._workload.batch):
                limit = best.measure(aim) if best else math.inf
                found = self._placer.split(self._slots, pipeline, aim, fewest=self._fewest_cards, limit=limit)
                best = _better(best, found, aim)
            yield best

    def _replicates(self, aim: Aim) -> Iterator[Placement | None]:
        slots, batch = self._slots, self._workload.batch
        if len(slots) < 2 or batch < 2:
            return
        members = self._shared_out(slots, aim, fewest=int(self._settings.nodes > 1))
        if members is None and self._settings.strategy is Strategy.REPLICATE:
            # One card alone is faster, but that is not what was asked for.
            members = self._shared_out(_most_capable(slots, min(len(slots), batch)), aim, fewest=1)
        yield self._placer.replicate(members, aim) if members else None

    def _shared_out(self, slots: Sequence[Slot], aim: Aim, *, fewest: int) -> list[Member] | None:
        placer, batch = self._placer, self._workload.batch

        def alone(slot: Slot, share: int) -> float:
            return placer.whole_model((Member(slot, share),), aim)

        if self._workload.norm is NormMode.FROZEN:
            return best_shares(slots, batch, alone, fewest=fewest)
        together = partial(placer.whole_model, aim=aim)
        return best_shares_alike(slots, batch, alone, together, fewest=fewest)

    def _replicated_splits(self, aim: Aim) -> Iterator[Placement | None]:
        """The best one of all grids and shares that are tried."""
        best: Placement | None = None
        for columns, pipeline in self._grids():
            limit = best.measure(aim) if best else math.inf
            best = _better(best, self._placer.replicate_split(columns, pipeline, aim, limit=limit), aim)
        yield best

    def _grids(self) -> Iterator[tuple[list[Column], Pipeline]]:
        if not self._can_split or self._workload.batch < 2:
            return
        count = len(self._slots)
        for replicas in range(2, min(count // 2, self._workload.batch) + 1):
            for stages in range(2, count // replicas + 1):
                if self._settings.cut and stages != len(self._settings.cut) + 1:
                    continue
                used = replicas * stages
                if used < self._fewest_cards or (count - used >= replicas and not self._settings.cut):
                    continue
                slots = _most_capable(self._slots, replicas * stages)
                for rows in grids(slots, replicas, stages):
                    for pipeline in self._pipelines(self._workload.batch):
                        for shares in share_vectors(self._workload.batch, replicas, pipeline.micro_batches):
                            yield columns_of(rows, shares), pipeline

    def _pipelines(self, batch: int) -> Iterator[Pipeline]:
        """Ways to cut a share into micro-batches that the norms allow."""
        wanted, schedule = self._settings.micro_batches, self._settings.schedule
        counts = [wanted or 1]
        if wanted is None and self._workload.norm is NormMode.FROZEN:
            counts += [count for count in range(2, min(batch, MOST_MICRO_BATCHES) + 1) if batch % count == 0]
        for count in counts:
            if batch % count == 0:
                schedules: list[Schedule | None] = [None] if count == 1 else [Schedule.ONE_F_ONE_B, Schedule.GPIPE]
                for one in schedules:
                    if schedule in (None, one):
                        yield Pipeline(count, one)

    @property
    def _fewest_cards(self) -> int:
        """Each machine starts a process for each of its cards; on one machine some may be left out."""
        return len(self._slots) if self._settings.nodes > 1 else 2

    @property
    def _can_split(self) -> bool:
        return unsplittable(self._workload.whole.precision) is None

    def plan(self, placements: Sequence[Placement]) -> Plan:
        """The first of them; the others are told beside it."""
        best, *others = placements
        costs, batch = self._workload.whole, self._workload.batch
        positions = self._positions(best)
        ranked = sorted(zip(positions, best.stages, strict=True), key=lambda one: one[0])
        return Plan(
            feasible=best.fits,
            torch=installed_torch(),
            model=costs.model,
            parameter_bytes=sum(segment.parameter_bytes for segment in costs.segments),
            num_classes=costs.num_classes,
            image=costs.image,
            batch=batch,
            accumulation=self._workload.accumulation,
            norm=costs.norm,
            precision=costs.precision,
            optimizer=costs.optimizer,
            strategy=best.strategy,
            micro_batches=best.pipeline.micro_batches,
            schedule=best.pipeline.schedule,
            step_seconds=best.step_seconds,
            images_per_second=best.images_per_second,
            cards=tuple(self._card_plan(position, placed) for position, placed in ranked),
            transfer_seconds=best.transfer_seconds,
            alternatives=tuple(self._alternative(other) for other in others),
        )

    def _positions(self, placement: Placement) -> list[int]:
        """For each stage a card of the list, none twice."""
        free = list(range(len(self._slots)))
        positions = []
        for placed in placement.stages:
            position = next(number for number in free if self._slots[number] == placed.slot)
            free.remove(position)
            positions.append(position)
        return positions

    def _card_plan(self, position: int, placed: PlacedStage) -> CardPlan:
        levels = placed.stage.recompute_of(placed.levels)
        return CardPlan(
            card=placed.card.name,
            position=position % self._per_node if placed.card.device is None else placed.card.device,
            node=placed.slot.node,
            replica=placed.replica,
            stage=placed.number,
            capacity_bytes=placed.card.capacity_bytes,
            reserve_bytes=placed.card.reserve_bytes,
            predicted_peak_bytes=placed.peak.size,
            outside_bytes=placed.outside_bytes,
            peak_moment=str(placed.peak.moment),
            batch_share=placed.share,
            by_category=placed.peak.by_category,
            segments=tuple(
                PlacedSegment(name=segment.name, recompute=recompute)
                for segment, recompute in zip(placed.stage.segments, levels, strict=True)
            ),
            compute_seconds=placed.seconds,
        )

    def _alternative(self, placement: Placement) -> Alternative:
        ranked = sorted(zip(self._positions(placement), placement.stages, strict=True), key=lambda one: one[0])
        return Alternative(
            strategy=placement.strategy,
            cards=tuple(placed.card.name for _, placed in ranked),
            shares=tuple(placed.share for _, placed in ranked),
            stage_starts=tuple(column[0].stage.segments[0].name for column in placement.columns),
            micro_batches=placement.pipeline.micro_batches,
            schedule=placement.pipeline.schedule,
            images_per_second=placement.images_per_second,
            step_seconds=placement.step_seconds,
            fullest_share=placement.fullness,
        )


def _better(best: Placement | None, found: Placement | None, aim: Aim) -> Placement | None:
    return min((one for one in (best, found) if one), key=lambda one: one.rank(aim), default=None)


def _most_capable(slots: Sequence[Slot], count: int) -> list[Slot]:
    """So many of them, those with most memory and then speed, in the order of the list."""
    by_size = sorted(
        range(len(slots)), key=lambda number: (-slots[number].card.available_bytes, -slots[number].card.flops, number)
    )
    return [slots[number] for number in sorted(by_size[:count])]


def _check(workload: Workload, cards: Sequence[Card], settings: Settings) -> None:
    if not cards:
        raise InputError("a plan needs at least one card; try cpu:8GiB")
    strategy, costs = settings.strategy, workload.whole
    if settings.nodes > 1 and any(card.device is not None for card in cards):
        raise InputError(
            "cards of this machine cannot be those of several; name what each machine has, such as 2*gtx1070"
        )
    if settings.nodes > 1 and strategy is Strategy.SINGLE:
        raise InputError(f"strategy single needs one machine, got {settings.nodes}")
    kinds = math.prod(count + 1 for count in Counter(cards).values())
    if kinds > MOST_HANDS and strategy in (None, Strategy.SPLIT):
        raise InputError(
            f"a split looks at most at {MOST_HANDS} different hands of cards, these have {kinds}; name fewer kinds of "
            "cards, or take strategy single or replicate"
        )
    if settings.nodes < 1 or len(cards) % settings.nodes:
        raise InputError(
            f"every machine must have the same number of cards, got {len(cards)} cards for {settings.nodes} machines"
        )
    if strategy is not None and strategy is not Strategy.SINGLE and len(cards) < 2:
        raise InputError(
            f"strategy {strategy} needs at least two cards, got {cards[0].name}; name it twice if there are two of it"
        )
    if strategy is Strategy.REPLICATE_SPLIT and len(cards) < 4:
        raise InputError(f"strategy {strategy} needs at least four cards, two for each replica, got {len(cards)}")
    if strategy and strategy.splits and (reason := unsplittable(costs.precision)):
        raise InputError(f"{reason}; take strategy single or replicate")
    if strategy and strategy.replicates and workload.batch < 2:
        raise InputError(f"strategy {strategy} shares out the batch, which must be at least 2, got {workload.batch}")
    if strategy is Strategy.SPLIT and len(cards) > len(costs.segments) - 1 > 1:
        raise InputError(
            f"a split needs a segment for each card, the loss not counted: {costs.model} has "
            f"{len(costs.segments) - 1}, got {len(cards)} cards; name fewer"
        )
    if strategy is Strategy.SPLIT and len(costs.segments) < 3:
        raise InputError(f"a split needs two segments beside the loss, {costs.model} has {len(costs.segments) - 1}")
    _check_pipeline(workload, settings)
    _check_cut(workload, cards, settings)


def _check_pipeline(workload: Workload, settings: Settings) -> None:
    count, strategy = settings.micro_batches, settings.strategy
    if (count or settings.schedule) and strategy and not strategy.splits:
        raise InputError(f"micro-batches and schedules are of splits; strategy {strategy} has none")
    if count and count > 1 and workload.norm is not NormMode.FROZEN:
        raise InputError(
            f"micro-batches need norm frozen, for {workload.norm} norms need the batch together; got {count} of them"
        )
    if settings.schedule and count is None and all(workload.batch % n for n in range(2, MOST_MICRO_BATCHES + 1)):
        raise InputError(
            f"schedule {settings.schedule} needs a batch that a number from 2 to {MOST_MICRO_BATCHES} divides, got "
            f"{workload.batch}"
        )
    if settings.schedule is Schedule.ONE_F_ONE_B and count and count < len(settings.cut) + 1:
        raise InputError(f"schedule 1f1b needs a micro-batch for each of {len(settings.cut) + 1} stages, got {count}")
    if settings.schedule and count == 1:
        raise InputError(f"schedule {settings.schedule} needs several micro-batches, got 1")
    if settings.schedule and workload.norm is not NormMode.FROZEN:
        raise InputError(f"schedule {settings.schedule} is of micro-batches, which need norm frozen")
    if count and workload.batch % count:
        raise InputError(f"{workload.batch} images cannot be cut into {count} equal micro-batches")


def _check_cut(workload: Workload, cards: Sequence[Card], settings: Settings) -> None:
    names = [segment.name for segment in workload.whole.segments]
    for name in settings.cut:
        if name not in names:
            raise UnknownNameError("segment", name, names)
    positions = [names.index(name) for name in settings.cut]
    if not settings.cut:
        return
    if settings.strategy and not settings.strategy.splits:
        raise InputError(f"a cut is of a split; strategy {settings.strategy} has none")
    if positions != sorted(set(positions)) or positions[0] == 0 or positions[-1] == len(names) - 1:
        raise InputError(
            "a cut names the first segment of the second card, of the third, ..., in the order of the model, and "
            f"neither its first segment nor the loss, got {', '.join(settings.cut)}"
        )
    if len(positions) >= len(cards):
        raise InputError(f"a cut at {', '.join(settings.cut)} needs {len(positions) + 1} cards, got {len(cards)}")


def _wanted(settings: Settings) -> str:
    words = [settings.strategy.value] if settings.strategy else ["a plan"]
    words += [f"cut at {', '.join(settings.cut)}"] if settings.cut else []
    words += [f"{settings.micro_batches} micro-batches"] if settings.micro_batches else []
    words += [settings.schedule.value] if settings.schedule else []
    return " with ".join([words[0], ", ".join(words[1:])] if words[1:] else words)
