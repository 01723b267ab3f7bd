"""Who runs what: placements of a model's segments, and of shares of the batch, on cards.

    single           [ stem .. loss ] on one card
    split            [ stem .. block2 ] on one, [ skip2 .. loss ] on the next: the paper's
    replicate        [ stem .. loss ] on each, with a share of the batch
    replicate-split  several splits with the same stages, each with a share of the batch

All four are one thing: a row of columns. A column is what runs one stage: a card, or one card per replica.

    replica 0    gtx1070: stem .. block2  ->  titanx: skip2 .. loss
    replica 1    gtx1070: stem .. block2  ->  titanx: skip2 .. loss

`memseg.planning.placer` finds where to cut and in which order the columns come. Here are the values.

Time of a step. With batch statistics the whole share passes from stage to stage, so stages take turns: a pass takes
the sum of their times and of the transfers. With frozen norms the share can be cut into micro-batches, which follow
each other: the sum for one, and the slowest part once more for each other one. Replicas wait for each other, and reduce
their gradients around a ring once a step. The optimizer's arithmetic, reading of data and the messages of synced norms
are left out.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from memseg.levels import Schedule, Strategy
from memseg.planning.cards import Card
from memseg.planning.costs import SegmentCost
from memseg.planning.memory import Flow, Peak, Stage

NETWORK_BYTES_PER_SECOND = 1.25e9
"""Between machines, unless it is given: an assumption, 10 Gbit/s Ethernet."""


class Aim(StrEnum):
    """What makes one placement better than another."""

    SPEED = "speed"
    """More images per second, of what fits."""
    MEMORY = "memory"
    """The fullest card less full, of what fits."""
    CLOSEST = "closest"
    """Fewer bytes missing on the card with the largest shortfall, fit or not."""


@dataclass(frozen=True)
class Slot:
    """A place for a process."""

    card: Card
    node: int = 0
    """The machine that the card is in."""


@dataclass(frozen=True)
class Member:
    """One card of a column: one replica's part."""

    slot: Slot
    share: int
    """Images of each pass."""


Column = tuple[Member, ...]


@dataclass(frozen=True)
class Pipeline:
    """How a share passes through the stages of a split."""

    micro_batches: int = 1
    schedule: Schedule | None = None
    """None with a single micro-batch."""

    def flow(self, after: int, *, keeps_gradients: bool) -> Flow:
        """Through a stage that `after` others follow."""
        waits = self.schedule is Schedule.ONE_F_ONE_B
        in_flight = min(self.micro_batches, after + 1) if waits else self.micro_batches
        return Flow(self.micro_batches, in_flight, keeps_gradients)


@dataclass(frozen=True)
class PlacedStage:
    """A stage on its card."""

    slot: Slot
    replica: int
    number: int
    """Of the stage, from 0."""
    share: int
    """Images of each pass."""
    stage: Stage
    levels: tuple[int, ...]
    """For each segment, a position in its `levels`."""
    peak: Peak
    outside_bytes: int
    """What the process takes beside the allocator."""

    @property
    def card(self) -> Card:
        """That runs it."""
        return self.slot.card

    @property
    def seconds(self) -> float:
        """Of computing a pass, transfers left out."""
        return self.stage.flow.micro_batches * self.card.seconds(self.stage.work_of(self.levels))

    @property
    def needed_bytes(self) -> int:
        """The peak, and what the process takes beside the allocator."""
        return self.peak.size + self.outside_bytes

    @property
    def shortfall_bytes(self) -> int:
        """By how much that exceeds what the card has available; below zero where it fits."""
        return self.needed_bytes - self.card.available_bytes

    @property
    def fullness(self) -> float:
        """What is needed over what is available."""
        return self.needed_bytes / self.card.available_bytes


@dataclass(frozen=True)
class Placement:
    """All segments and all images on cards."""

    strategy: Strategy
    stages: tuple[PlacedStage, ...]
    """By replica, then in the order of the step."""
    pipeline: Pipeline
    accumulation: int
    """Passes in each step."""
    network: float
    """Bytes per second between machines."""

    @property
    def columns(self) -> list[tuple[PlacedStage, ...]]:
        """What runs each stage, one of each replica."""
        stages = max(placed.number for placed in self.stages) + 1
        return [self.stages[number::stages] for number in range(stages)]

    @property
    def images(self) -> int:
        """Of a step."""
        return self.accumulation * sum(placed.share for placed in self.columns[0])

    @property
    def step_seconds(self) -> float:
        """Predicted."""
        count = self.pipeline.micro_batches
        parts = [max(placed.seconds for placed in column) / count for column in self.columns] + self._crossings
        one_pass = sum(parts) + (count - 1) * max(parts)
        return self.accumulation * one_pass + self._reduce_seconds

    @property
    def transfer_seconds(self) -> float:
        """Of all transfers of a step, whether or not something is computed meanwhile."""
        return self.accumulation * self.pipeline.micro_batches * sum(self._crossings) + self._reduce_seconds

    @property
    def _crossings(self) -> list[float]:
        """Of one micro-batch between each stage and the next, there and back."""
        return [
            max(
                crossing_bytes(b.stage.entering) / link(a.slot, b.slot, self.network)
                for a, b in zip(one, other, strict=True)
            )
            for one, other in itertools.pairwise(self.columns)
        ]

    @property
    def _reduce_seconds(self) -> float:
        gradients = sum(one.gradient_bytes for one in self.columns[0][0].stage.costs.segments)
        return ring_seconds([[placed.slot for placed in column] for column in self.columns], gradients, self.network)

    @property
    def images_per_second(self) -> float:
        """The same by step."""
        return self.images / self.step_seconds if self.step_seconds else math.inf

    @property
    def fits(self) -> bool:
        """Does every stage fit its card?"""
        return self.worst_stage.shortfall_bytes <= 0

    @property
    def worst_stage(self) -> PlacedStage:
        """The one with the least room, or the largest shortfall."""
        return max(self.stages, key=lambda placed: placed.shortfall_bytes)

    @property
    def fullness(self) -> float:
        """Of the fullest card."""
        return max(placed.fullness for placed in self.stages)

    def measure(self, aim: Aim) -> float:
        """What the aim counts; lower is better."""
        match aim:
            case Aim.SPEED:
                return self.step_seconds
            case Aim.MEMORY:
                return self.fullness
            case Aim.CLOSEST:
                return self.worst_stage.shortfall_bytes

    def rank(self, aim: Aim) -> tuple[float, float]:
        """The same, and what decides between equals."""
        return (self.measure(aim), self.fullness if aim is Aim.SPEED else self.step_seconds)


def link(one: Slot, other: Slot, network: float) -> float:
    """Bytes per second between two places."""
    slower = min(one.card.link, other.card.link)
    return slower if one.node == other.node else min(slower, network)


def crossing_bytes(tensors: Iterable[SegmentCost]) -> int:
    """Of these segments' outputs there, and of their gradients back."""
    return sum(maker.output_bytes * (2 if maker.output_needs_grad else 1) for maker in tensors)


def ring_seconds(columns: Sequence[Sequence[Slot]], gradients: int, network: float) -> float:
    """To reduce all gradients over replicas, as if all of them crossed the slowest link of all rings.

    In a ring each gradient crosses every link twice, less one part. So counted it does not depend on where the model is
    cut.
    """
    replicas = len(columns[0])
    if replicas == 1:
        return 0.0
    rings = (zip(column, [*column[1:], column[0]], strict=True) for column in columns)
    slowest = min(link(one, other, network) for ring in rings for one, other in ring)
    return 2 * (replicas - 1) / replicas * gradients / slowest
