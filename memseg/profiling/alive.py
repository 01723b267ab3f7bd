"""What is alive at the worst moment: who made it, who waits for it, and what would remove it.

Out of memory is asked about one moment, that of the peak, and each byte of it has an owner. For each tensor alive there
this tells the layer and operator that made it, the layer that reads it last, and the lowest recompute level of its
segment at which it would not be kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from memseg.levels import Recompute
from memseg.profiling.timeline import Allocation, Category, Phase, Timeline, nearest_layer

_KEPT_BY_NORMS = ("convolution", "addmm", "aten.mm", "bmm", "memseg.project", "memseg.convolve")


@dataclass(frozen=True)
class AliveTensor:
    """One allocation at the peak."""

    size_bytes: int
    category: Category
    made_by: str
    """Layer; "" outside every layer."""
    operation: str
    shape: tuple[int, ...]
    dtype: str
    waits_for: tuple[Phase, str] | None
    """Phase and layer of the last operation that reads it; None where nothing does."""
    removed_by: Recompute | None
    """The lowest level of its segment at which it is rebuilt instead of kept; None where no level helps."""


def alive_at_peak(timeline: Timeline, levels: Mapping[str, tuple[Recompute, ...]]) -> list[AliveTensor]:
    """All that is alive at the peak, largest first.

    Args:
        timeline: Of the step.
        levels: Of each segment, the levels that it has.
    """
    return [
        AliveTensor(
            one.size_bytes,
            one.category,
            one.layer,
            one.operation,
            one.shape,
            one.dtype,
            one.reader,
            removing_level(one, levels),
        )
        for one in timeline.alive(timeline.peak_instant)
        if one.size_bytes
    ]


def removing_level(one: Allocation, levels: Mapping[str, tuple[Recompute, ...]]) -> Recompute | None:
    """The lowest level of its segment at which an allocation is not kept; None where no level helps.

    `norms` rebuilds everything but outputs of convolutions, `units` those inside a unit (a dense layer, the layer below
    a segment) too, `segment` all but the segment's output.
    """
    segment = nearest_layer(one.layer, levels)
    if one.category not in (Category.SAVED, Category.AUTOCAST) or not segment or segment in one.output_of:
        return None
    offered = [level for level in Recompute if level in levels[segment] and level is not Recompute.NONE]
    depth = segment.count(".") + 1
    units = [name for name in one.output_of if name.count(".") == depth and one.layer.startswith(f"{name}.")]
    if units and Recompute.UNITS in offered:
        least = Recompute.SEGMENT
    elif any(part in one.operation for part in _KEPT_BY_NORMS):
        least = Recompute.UNITS
    else:
        least = Recompute.NORMS
    order = list(Recompute)
    return next((level for level in offered if order.index(level) >= order.index(least)), None)
