"""What a card would have to hold for a step: three figures that are often mistaken for one another.

    allocated       what tensors and workspaces take, in the allocator's blocks: torch.cuda.max_memory_allocated
    reserved        what the allocator took from the driver for them: torch.cuda.max_memory_reserved
    device total    that, the CUDA context, and NCCL's buffers: what nvidia-smi shows of the process

A timeline says what is allocated when. The allocator is replayed over a first step and two more, since what it has cached
in one step decides what it must reserve in the next. cuBLAS takes its workspace from the same allocator at its first
product, once for the thread of forward and once for that of backward, and keeps it.

On the CPU there is no such allocator: what tensors take is all that is counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from memseg.errors import InputError
from memseg.planning.cards import Card
from memseg.profiling.allocator_settings import AllocatorSettings
from memseg.profiling.device_memory import context_bytes, cublas_workspace_bytes, nccl_bytes
from memseg.profiling.replay import FREE, Event, Replay, replay
from memseg.profiling.step import StepProfile
from memseg.profiling.timeline import Allocation, Category, Phase

_STEADY_STEPS = 2


@dataclass(frozen=True)
class CardMemory:
    """Peaks of training on one card, over a first step and those that follow."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int | None
    """None on the CPU."""
    device_total_bytes: int | None
    """None on the CPU."""
    context_bytes: int = 0
    nccl_bytes: int = 0
    cublas_bytes: int = 0
    """Part of what is allocated."""
    replay: Replay | None = None
    """None on the CPU."""

    @property
    def unallocated_bytes(self) -> int:
        """Reserved but not allocated when most is reserved."""
        return self.replay.unallocated_bytes if self.replay else 0


def card_memory(
    profile: StepProfile,
    card: Card,
    *,
    settings: AllocatorSettings | None = None,
    replicas: int = 1,
    cublas_bytes: int | None = None,
) -> CardMemory:
    """Peaks of training on a card.

    Args:
        profile: Of the step, traced for the card's kind.
        card: Whose architecture decides context and workspace.
        settings: Of the allocator; torch's defaults where none are given.
        replicas: Processes that talk by NCCL.
        cublas_bytes: Of one cuBLAS workspace; the architecture's where none is given.

    Raises:
        InputError: the profile is of another kind of device.
    """
    if profile.device != card.kind:
        raise InputError(f"{card.name} is a {card.kind} card, and the profile is of a step on {profile.device}")
    if card.compute_capability is None:
        return CardMemory(profile.peak_allocated_bytes, None, None)
    if cublas_bytes is None:
        cublas_bytes = cublas_workspace_bytes(card.compute_capability).size_bytes
    found = replay(training_events(profile, cublas_bytes=cublas_bytes), settings)
    context = context_bytes(card.compute_capability).size_bytes
    nccl = nccl_bytes(replicas).size_bytes
    return CardMemory(
        found.peak_allocated_bytes,
        found.peak_reserved_bytes,
        found.peak_reserved_bytes + context + nccl,
        context,
        nccl,
        2 * cublas_bytes,
        found,
    )


def training_events(profile: StepProfile, *, cublas_bytes: int = 0) -> Iterator[Event]:
    """What the allocator is asked for, in order: the setup, the first step, and steady ones."""
    first, steady = (
        [one for one in timeline.allocations if one.size_bytes]
        for timeline in (profile.first_timeline, profile.timeline)
    )
    key = 0
    lasting = [one for one in first if _lasts(one)]
    within = [one for one in first if not _lasts(one)]
    for one in lasting:
        if one.phase is Phase.SETUP:
            key += 1
            yield Event(key, one.size_bytes)
    for _ in range(2 if cublas_bytes else 0):
        key += 1
        yield Event(key, cublas_bytes)
    state = [one for one in lasting if one.phase is not Phase.SETUP]
    steps = [within + state, *[[one for one in steady if not _lasts(one)]] * _STEADY_STEPS]
    for step in steps:
        turns = sorted(
            [(one.born, index, one.size_bytes) for index, one in enumerate(step)]
            + [(one.died, index, FREE) for index, one in enumerate(step) if not _lasts(one)]
        )
        for _, index, size in turns:
            yield Event(key + 1 + index, size)
        key += len(step)


def _lasts(one: Allocation) -> bool:
    """Whether it outlives the step that it is made in."""
    return one.phase is Phase.SETUP or one.category is Category.OPTIMIZER_STATE
