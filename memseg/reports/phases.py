"""When the phases of a step begin and end, on its timeline."""

from typing import NamedTuple

from memseg.profiling.timeline import Phase, Timeline


class Span(NamedTuple):
    """A phase in the half-open interval [start, end) of instants."""

    phase: Phase
    start: int
    end: int


def phase_spans(timeline: Timeline) -> list[Span]:
    """The phases that allocate something, in order, each until the next one.

    There are several of a kind where gradients are accumulated. What is there before the step outlives it; so the step
    is over when the first of that is gone.
    """
    starts: list[tuple[Phase, int]] = []
    end = timeline.instants
    for one in sorted(timeline.allocations, key=lambda one: one.born):
        if one.phase is Phase.SETUP:
            end = min(end, one.died)
        elif not starts or one.phase is not starts[-1][0]:
            starts.append((one.phase, one.born))
    for index, (phase, start) in reversed(list(enumerate(starts))):
        if phase is Phase.BACKWARD:
            # It may free something before it allocates.
            starts[index] = phase, min(start, timeline.backward_start)
            break
    ends = [*(start for _, start in starts[1:]), end]
    return [Span(phase, start, end) for (phase, start), end in zip(starts, ends, strict=True)]
