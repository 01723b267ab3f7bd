"""A sequence of allocations and frees, replayed by the CUDA allocator: peaks of what is allocated and reserved.

The same step reserves more or less under other settings and on another card. One pass over its events tells how
much, when, and how much of it lies idle; out of memory is an answer, not an error.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memseg.profiling.allocator.caching import CachingAllocator, OutOfMemory
from memseg.profiling.allocator.settings import AllocatorSettings

FREE = -1
"""As a size: the key is freed."""
REQUEST_FREE = -2
"""As a size: the key is freed but still in use on another stream, until FREE."""
EMPTY_CACHE = -3
"""As a size: torch.cuda.empty_cache(); the key does not matter."""


class Event(NamedTuple):
    """An allocation of `size_bytes` under a key that nothing alive has, or what FREE, ... stand for."""

    key: int
    size_bytes: int
    stream: int = 0


def perform(allocator: CachingAllocator, event: Event) -> OutOfMemory | None:
    """Let an event happen; a refused request comes back.

    Raises:
        ValueError: an allocation under a key that is alive, or a size below 0 without a meaning.
        KeyError: a free of a key that is not alive.
    """
    key, size, stream = event
    if size == FREE:
        allocator.free(key)
    elif size == REQUEST_FREE:
        allocator.request_free(key)
    elif size == EMPTY_CACHE:
        allocator.empty_cache()
    else:
        return allocator.malloc(key, size, stream)
    return None


@dataclass(frozen=True, eq=False)
class Replay:
    """What the allocator held. Peaks are in bytes, each with the index of the first event that reached it."""

    peak_allocated_bytes: int
    peak_allocated_event: int
    peak_requested_bytes: int
    peak_requested_event: int
    peak_active_bytes: int
    peak_active_event: int
    peak_reserved_bytes: int
    peak_reserved_event: int
    unallocated_bytes: int
    """Reserved but not allocated after the event of the reserved peak."""
    largest_free_block_bytes: int
    """Then."""
    num_segments: int
    """Then."""
    allocated_curve: NDArray[np.int64]
    """After each event; it ends before a request that was refused."""
    reserved_curve: NDArray[np.int64]
    """Likewise."""
    out_of_memory: OutOfMemory | None
    """Why the replay ended early."""

    @property
    def out_of_memory_event(self) -> int | None:
        """Index of the request that was refused."""
        return len(self.allocated_curve) if self.out_of_memory else None


def replay(
    events: Iterable[Event], settings: AllocatorSettings | None = None, capacity_bytes: int | None = None
) -> Replay:
    """What torch's allocator would hold during `events`.

    Args:
        events: In order. A key may come again after it was freed.
        settings: torch's defaults where none are given.
        capacity_bytes: What the driver can give, context and other processes taken off; None: without limit.

    Raises:
        ValueError, KeyError: as `perform`.

    3 MiB come out of a segment of 20 MiB, and 12 MiB fit into the 17 that are left:

    >>> mib = 2**20
    >>> found = replay([Event(0, 3 * mib), Event(1, 12 * mib), Event(1, FREE), Event(2, 18 * mib)])
    >>> found.peak_allocated_bytes // mib, found.peak_reserved_bytes // mib, found.unallocated_bytes // mib
    (21, 38, 17)
    """
    allocator = CachingAllocator(settings, capacity_bytes)
    allocated: list[int] = []
    reserved: list[int] = []
    peak_allocated = peak_requested = peak_active = peak_reserved = 0
    allocated_event = requested_event = active_event = reserved_event = 0
    unallocated = largest_free = num_segments = 0
    refused = None
    for index, event in enumerate(events):
        refused = perform(allocator, event)
        if allocator.peak_reserved_bytes > peak_reserved:
            peak_reserved, reserved_event = allocator.peak_reserved_bytes, index
            unallocated = allocator.reserved_bytes - allocator.allocated_bytes
            largest_free, num_segments = allocator.largest_free_block_bytes, allocator.num_segments
        if refused is not None:
            break
        if allocator.requested_bytes > peak_requested:
            peak_requested, requested_event = allocator.requested_bytes, index
        if allocator.active_bytes > peak_active:
            peak_active, active_event = allocator.active_bytes, index
        if allocator.allocated_bytes > peak_allocated:
            peak_allocated, allocated_event = allocator.allocated_bytes, index
        allocated.append(allocator.allocated_bytes)
        reserved.append(allocator.reserved_bytes)
    return Replay(
        peak_allocated,
        allocated_event,
        peak_requested,
        requested_event,
        peak_active,
        active_event,
        peak_reserved,
        reserved_event,
        unallocated,
        largest_free,
        num_segments,
        np.array(allocated, np.int64),
        np.array(reserved, np.int64),
        refused,
    )
