"""What is to be trained, as the planner sees it: costs for whatever part of the batch one process gets.

A share of the batch, or a micro-batch of it, costs what a smaller batch costs, but not in proportion: weights do not
shrink, and layers walk over their maps in bands. So costs are asked for by number of images, and only when some
placement needs them, for each takes a profile.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property

from memseg.errors import InputError
from memseg.levels import NormMode, Recompute
from memseg.planning.costs import ModelCosts
from memseg.planning.outside import Process

CostSource = Callable[[int, int], ModelCosts]
"""(images, replicas) -> costs of one pass of so many images; with several replicas, norms sync over them."""


@dataclass(frozen=True)
class Workload:
    """One training step, to be placed."""

    source: CostSource
    batch: int
    """Images of each pass, over all replicas."""
    accumulation: int = 1
    """Passes in each step."""
    levels: Collection[Recompute] = tuple(Recompute)
    """That may be chosen; a segment that has none of them keeps its first."""
    process: Process | None = None
    """How processes of CPU cards are started; None leaves out what they take beside the allocator."""
    _parts: dict[tuple[int, int], ModelCosts | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def whole(self) -> ModelCosts:
        """Costs of a pass in one process.

        Raises:
            InputError: the model cannot take such a batch.
        """
        return self._restricted(self.source(self.batch, 1))

    def part(self, images: int, *, replicated: bool) -> ModelCosts | None:
        """Costs of a pass of so many images, or None where the model cannot take so few.

        Args:
            images: Of a replica's share, or of a micro-batch of it.
            replicated: Is the batch shared out among replicas?
        """
        replicas = 2 if replicated and self.norm is not NormMode.FROZEN else 1
        if (images, replicas) == (self.batch, 1):
            return self.whole
        if (images, replicas) not in self._parts:
            try:
                self._parts[images, replicas] = self._restricted(self.source(images, replicas))
            except InputError:
                self._parts[images, replicas] = None
        return self._parts[images, replicas]

    @property
    def norm(self) -> NormMode:
        """What norms normalise with."""
        return self.whole.norm

    def _restricted(self, costs: ModelCosts) -> ModelCosts:
        segments = []
        for segment in costs.segments:
            kept = tuple(level for level in segment.levels if level.recompute in self.levels)
            segments.append(replace(segment, levels=kept or segment.levels[:1]))
        return replace(costs, segments=tuple(segments))
