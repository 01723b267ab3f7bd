"""What a card would have to hold for a step: three figures that are often mistaken for one another.

    allocated       what tensors and workspaces take, in the allocator's blocks: torch.cuda.max_memory_allocated
    reserved        what the allocator took from the driver for them: torch.cuda.max_memory_reserved
    device total    that, the CUDA context, and NCCL's buffers: what nvidia-smi shows of the process

A timeline says what is allocated when. The allocator is replayed over a first step and two more, since what it has
cached in one step decides what it must reserve in the next. cuBLAS takes its workspace from the same allocator at its
first product, once for the thread of forward and once for that of backward, and keeps it.

The allocator has what the card has beside context, kernels and NCCL. At that limit it gives back what it has cached, so
what it reserves is less than it would be on a larger card; where that does not help either, it is out of memory.

On the CPU there is no such allocator: what tensors take is all that is counted.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from memseg.errors import InputError
from memseg.planning.cards import Card
from memseg.profiling.allocator.caching import OutOfMemory
from memseg.profiling.allocator.replay import FREE, Event, Replay, replay
from memseg.profiling.allocator.settings import AllocatorSettings
from memseg.profiling.device_memory import Link, Term, device_terms
from memseg.profiling.step import StepProfile
from memseg.profiling.timeline import Allocation, Category, Phase

_STEADY_STEPS = 2
_PCIE_BYTES_PER_S = 64e9
"""PCI Express 5.0 x16, one direction: what is faster is NVLink."""
_MATRIX_PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "memseg.project")


@dataclass(frozen=True)
class CardMemory:
    """Peaks of training on one card, over a first step and those that follow."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int | None = None
    """None on the CPU."""
    device_total_bytes: int | None = None
    """None on the CPU."""
    terms: tuple[Term, ...] = ()
    """What a process holds beside its tensors; some of it inside the allocator."""
    replay: Replay | None = None
    """None on the CPU."""
    out_of_memory: OutOfMemory | None = None
    """Why the card is too small; the peaks are then those of a card without a limit."""

    @property
    def unallocated_bytes(self) -> int:
        """Reserved beyond what is ever allocated: rounding of segments, and fragmentation."""
        return self.peak_reserved_bytes - self.peak_allocated_bytes if self.peak_reserved_bytes else 0


def card_memory(
    profile: StepProfile, card: Card, *, settings: AllocatorSettings | None = None, replicas: int = 1
) -> CardMemory:
    """Peaks of training on a card.

    Args:
        profile: Of the step, traced for the card's kind.
        card: Whose architecture decides context and workspace.
        settings: Of the allocator; torch's defaults where none are given.
        replicas: Processes that talk by NCCL.

    Raises:
        InputError: the profile is of another kind of device.
    """
    if profile.device != card.kind:
        raise InputError(f"{card.name} is a {card.kind} card, and the profile is of a step on {profile.device}")
    if card.compute_capability is None:
        return CardMemory(profile.peak_allocated_bytes)
    terms = device_terms(card.compute_capability, world_size=replicas, link=_link(card))
    if not _has_products(profile):
        terms = tuple(term for term in terms if not term.in_allocator)
    inside = [term.size_bytes for term in terms if term.in_allocator]
    outside = sum(term.size_bytes for term in terms if not term.in_allocator)
    events = list(training_events(profile, inside))
    limited = replay(events, settings, max(0, card.capacity_bytes - outside))
    found = replay(events, settings) if limited.out_of_memory else limited
    reserved = found.peak_reserved_bytes
    return CardMemory(found.peak_allocated_bytes, reserved, reserved + outside, terms, found, limited.out_of_memory)


def _link(card: Card) -> Link:
    """How NCCL would get from such a card to another."""
    if "GeForce" in card.title or "Titan" in card.title:
        return Link.HOST
    return Link.NVLINK if card.link > _PCIE_BYTES_PER_S else Link.PCIE


def _has_products(profile: StepProfile) -> bool:
    """Whether the step has matrix products, for which cuBLAS takes its workspaces."""
    return any(one.operation.startswith(_MATRIX_PRODUCTS) for one in profile.timeline.allocations)


def training_events(profile: StepProfile, workspaces: Iterable[int] = ()) -> Iterator[Event]:
    """What the allocator is asked for, in order: the setup, the first step, and steady ones.

    Args:
        profile: Of the step.
        workspaces: Bytes of what libraries take at their first use and keep.
    """
    for event, _ in named_events(profile, workspaces):
        yield event


def named_events(profile: StepProfile, workspaces: Iterable[int] = ()) -> Iterator[tuple[Event, Allocation | None]]:
    """`training_events`, each beside the allocation that it begins or ends; None for a workspace that is kept."""
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
            yield Event(key, one.size_bytes), one
    for size in workspaces:
        key += 1
        yield Event(key, size), None
    state = [one for one in lasting if one.phase is not Phase.SETUP]
    steps = [within + state, *[[one for one in steady if not _lasts(one)]] * _STEADY_STEPS]
    for step in steps:
        turns = sorted(
            [(one.born, index, one.size_bytes) for index, one in enumerate(step)]
            + [(one.died, index, FREE) for index, one in enumerate(step) if not _lasts(one)]
        )
        for _, index, size in turns:
            yield Event(key + 1 + index, size), step[index]
        key += len(step)


def _lasts(one: Allocation) -> bool:
    """Whether it outlives the step that it is made in."""
    return one.phase is Phase.SETUP or one.category is Category.OPTIMIZER_STATE
