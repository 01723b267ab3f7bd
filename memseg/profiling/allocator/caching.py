"""PyTorch's CUDA caching allocator, replayed request by request: what it would reserve, not only what is allocated.

A trace knows what is allocated. What must fit on the card is what the allocator reserves for it, and that depends on
the order of requests: it asks the driver for segments, splits them, and keeps what is freed. A factor on top of the
allocated bytes is wrong in both directions, so every decision is made here as there:

    request --round--> block size --best fit--> cached block --split--> block; the rest goes back
                                        | none
                                        v
                     a new segment, or new pages of an expandable one
                                        | limit reached
                                        v
                     cached segments are given back, once more, out of memory

A block is found by size and address among the free ones of its stream and kind; free neighbours are merged.

Not modelled: the driver's choice of addresses (a new segment lies above all earlier ones here, which decides only ties
between free blocks of one size), the driver's own rounding, private pools of CUDA graphs and MemPool, and callbacks
that free memory on demand.

Source: c10/cuda/CUDACachingAllocator.cpp of a version between torch 2.9 and 2.14 (it has setNoSplit and
large_segment_size), held against the headers of torch 2.14.1. Its names stand in brackets where ours differ.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from memseg.profiling.allocator.driver import Driver, Listener
from memseg.profiling.allocator.pool import Piece, Pool, State
from memseg.profiling.allocator.settings import MIN_BLOCK_BYTES, SMALL_BYTES, SMALL_SEGMENT_BYTES, AllocatorSettings

_UNLIMITED = 2**64 - 1


@dataclass(frozen=True)
class Block:
    """A piece of a segment."""

    address: int
    size_bytes: int
    requested_bytes: int
    """What was asked for; 0 where nothing is."""
    state: State
    key: int | None
    """Whose it is."""


@dataclass(frozen=True)
class Segment:
    """Memory of the driver that lies together: a fixed segment, or a range of mapped pages."""

    address: int
    size_bytes: int
    stream: int
    is_small: bool
    is_expandable: bool
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class OutOfMemory:
    """A request that could not be served, with what the allocator held after giving back all it could."""

    requested_bytes: int
    needed_bytes: int
    """Size of the segment that was wanted for it, as in the message of torch.OutOfMemoryError."""
    free_bytes: int
    """What the limit left."""
    allocated_bytes: int
    reserved_bytes: int
    largest_free_block_bytes: int
    """Cached, but too small, of the other kind or of another stream."""


class CachingAllocator:
    """The allocator of one card.

    The counters are those of `torch.cuda.memory_stats`, current and for all pools together: `allocated_bytes` counts
    whole blocks, `requested_bytes` what was asked for, `active_bytes` also what another stream still uses, and
    `reserved_bytes` all that came from the driver.

    Args:
        settings: Its options.
        capacity_bytes: What the driver can give; None: without limit. The memory fraction of `settings` is of this.
        listener: Told of every action, as `torch.cuda.memory._record_memory_history` would record it.
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        capacity_bytes: int | None = None,
        *,
        listener: Listener | None = None,
    ) -> None:
        self.settings = settings or AllocatorSettings()
        self._driver = Driver(capacity_bytes, listener)
        self._listener = listener
        fraction = self.settings.per_process_memory_fraction
        self._allowed = int(fraction * capacity_bytes) if capacity_bytes is not None and fraction < 1 else None
        large = self.settings.large_segment_size_mb * 2**20
        self._expandable = self.settings.expandable_segments
        self._rounds_to_powers = any(self.settings.roundup_power2_divisions)
        self._max_split = (self.settings.max_split_size_mb or 0) * 2**20 or _UNLIMITED
        self._max_rounding = (self.settings.max_non_split_rounding_mb or 0) * 2**20 or large
        self._pages = {True: SMALL_SEGMENT_BYTES, False: large}
        self._pools: dict[tuple[int, bool], Pool] = {}
        self._pieces: dict[int, Piece | None] = {}
        """By key; None where nothing is left to do when it is freed."""
        self._large_searches = 0
        self.allocated_bytes = 0
        self.active_bytes = 0
        self.requested_bytes = 0

    def malloc(self, key: int, size_bytes: int, stream: int = 0) -> OutOfMemory | None:
        """Allocate; None where that went well. A size of 0 takes nothing, as in torch.

        Raises:
            ValueError: the key is in use, or the size is negative.
        """
        if key in self._pieces or size_bytes < 0:
            raise ValueError(f"a key must be free and a size not negative, got key {key} with {size_bytes} bytes")
        if size_bytes == 0:
            self._pieces[key] = None
            return None
        if self._rounds_to_powers:
            size = self.settings.rounded(size_bytes)
        else:
            size = (size_bytes + MIN_BLOCK_BYTES - 1) // MIN_BLOCK_BYTES * MIN_BLOCK_BYTES
        is_small = size <= SMALL_BYTES
        pool = self._pools.get((stream, is_small))
        if pool is None:
            pool = self._pools[stream, is_small] = Pool(stream, is_small=is_small, page=self._pages[is_small])
        piece = self._find(pool, size) or self._obtain(pool, size)
        if piece is None:
            return self._refuse(size_bytes, size, stream)
        if self._should_split(piece, size):
            self._cache(piece.cut(size))
        piece.state, piece.requested, piece.key = "active_allocated", size_bytes, key
        self._pieces[key] = piece
        self.allocated_bytes += piece.size
        self.active_bytes += piece.size
        self.requested_bytes += size_bytes
        if self._listener is not None:
            self._listener("alloc", piece.address, size_bytes, stream)
        return None

    def free(self, key: int) -> None:
        """Give a block back to its pool.

        Raises:
            KeyError: nothing is allocated under the key.
        """
        self.request_free(key)
        piece = self._pieces.pop(key)
        if piece is not None:
            self._complete_free(piece)

    def request_free(self, key: int) -> None:
        """Free a block that other streams still use: it stays active until `free` completes it.

        Raises:
            KeyError: nothing is allocated under the key.
        """
        piece = self._pieces[key]
        if piece is not None and piece.state == "active_allocated":
            piece.state = "active_pending_free"
            self.allocated_bytes -= piece.size
            if self._listener is not None:
                self._listener("free_requested", piece.address, piece.requested, piece.pool.stream)

    def empty_cache(self) -> None:
        """Wait for other streams, then give all memory back that is cached and whole [release_cached_blocks]."""
        for key, pending in self._pieces.items():
            if pending is not None and pending.state == "active_pending_free":
                self._complete_free(pending)
                self._pieces[key] = None
        for pool in self._pools.values():
            for _, _, piece in list(pool.free):
                if self._expandable:
                    self._driver.shrink(piece)
                elif piece.is_whole:
                    self._driver.release(piece)

    def segments(self) -> list[Segment]:
        """What is reserved, by address."""
        segments = []
        for piece in self._all_pieces():
            if piece.prev is not None and piece.prev.is_mapped:
                continue
            blocks = []
            link: Piece | None = piece
            while link is not None and link.is_mapped:
                blocks.append(Block(link.address, link.size, link.requested, link.state, link.key))
                link = link.next
            size = sum(block.size_bytes for block in blocks)
            pool = piece.pool
            segments.append(
                Segment(piece.address, size, pool.stream, pool.is_small, self._expandable, tuple(blocks)),
            )
        return sorted(segments, key=lambda segment: segment.address)

    @property
    def reserved_bytes(self) -> int:
        """What the driver gave."""
        return self._driver.reserved_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        """The most that the driver gave at once, also for a moment within a request."""
        return self._driver.peak_reserved_bytes

    @property
    def num_segments(self) -> int:
        """Fixed segments, or expandable ones, each of which is one range of addresses."""
        return self._driver.num_segments

    @property
    def inactive_split_bytes(self) -> int:
        """Free parts of fixed segments in use, which cannot be given back; as in torch 0 for expandable segments."""
        free = (piece for pool in self._pools.values() for _, _, piece in pool.free)
        return 0 if self._expandable else sum(piece.size for piece in free if not piece.is_whole)

    @property
    def largest_free_block_bytes(self) -> int:
        """The largest block that is cached, in any pool."""
        return max((pool.free[-1][0] for pool in self._pools.values() if pool.free), default=0)

    def _all_pieces(self) -> Iterator[Piece]:
        yield from (piece for piece in self._pieces.values() if piece is not None)
        for pool in self._pools.values():
            yield from (piece for _, _, piece in pool.free)

    def _find(self, pool: Pool, size: int) -> Piece | None:
        """The best fit among cached blocks, taken out of the pool [get_free_block]."""
        if not pool.is_small:
            self._large_searches += 1
        free = pool.free
        index = bisect_left(free, (size,))
        if index == len(free):
            return None
        if self._expandable:
            # What borders on unmapped addresses counts as large as it can become, so that it is used last.
            while index + 1 < len(free) and free[index + 1][2].reach < free[index][2].reach:
                index += 1
        found = free[index][0]
        if found >= (self._max_split if size < self._max_split else size + self._max_rounding):
            return None
        return free.pop(index)[2]

    def _should_split(self, piece: Piece, size: int) -> bool:
        rest = piece.size - size
        if piece.pool.is_small or self._expandable:
            return rest >= MIN_BLOCK_BYTES
        return size < self._max_split and rest > SMALL_BYTES

    def _obtain(self, pool: Pool, size: int) -> Piece | None:
        """A block of new memory; where the limit is reached, cached memory is given back for it."""
        self._collect_garbage()
        piece = self._extend(pool, size)
        if piece is None and self._release_oversize(pool, size):
            piece = self._extend(pool, size)
        if piece is None:
            self.empty_cache()
            piece = self._extend(pool, size)
        return piece

    def _extend(self, pool: Pool, size: int) -> Piece | None:
        """Ask the driver [alloc_block]. A memory fraction is held to whole segments even where pages are mapped."""
        needed = self.settings.segment_bytes(size)
        if self._allowed is not None and self.reserved_bytes + needed > self._allowed:
            return None
        return self._driver.grow(pool, size) if self._expandable else self._driver.allocate(pool, needed)

    def _cache(self, piece: Piece) -> None:
        piece.born_at = self._large_searches
        piece.pool.put(piece)

    def _complete_free(self, piece: Piece) -> None:
        if self._listener is not None:
            self._listener("free_completed", piece.address, piece.requested, piece.pool.stream)
        self.active_bytes -= piece.size
        self.requested_bytes -= piece.requested
        piece.state, piece.requested, piece.key = "inactive", 0, None
        piece.pool.merge(piece)
        self._cache(piece)

    def _collect_garbage(self) -> None:
        """Above the threshold, give segments back that were not used for long [garbage_collect_cached_blocks]."""
        threshold = self.settings.garbage_collection_threshold
        if self._allowed is None or not threshold or self._expandable:
            return
        goal = self.reserved_bytes - int(threshold * self._allowed)
        whole = [
            piece
            for (_, is_small), pool in sorted(self._pools.items())
            for _, _, piece in pool.free
            if not is_small and piece.is_whole
        ]
        reclaimed, before = 0, -1
        while whole and before < reclaimed < goal:
            before = reclaimed
            # All that are as old as the mean or older go: a round does not stop at the goal.
            ages = [self._large_searches - piece.born_at for piece in whole]
            mean = sum(ages) / len(ages)
            for piece, age in zip(whole, ages, strict=True):
                if age >= mean:
                    reclaimed += piece.size
                    self._driver.release(piece)
            whole = [piece for piece, age in zip(whole, ages, strict=True) if age < mean]

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """Give back the smallest block that may not be split and is enough, else the largest ones until they are.

        [release_available_cached_blocks]
        """
        if self._max_split == _UNLIMITED or self._expandable:
            return False
        goal = max(size, self._max_split)
        index = bisect_left(pool.free, (goal,))
        if index < len(pool.free):
            self._driver.release(pool.free[index][2])
            return True
        released = 0
        while released < goal and pool.free and pool.free[-1][0] >= self._max_split:
            released += pool.free[-1][0]
            self._driver.release(pool.free[-1][2])
        return released >= goal

    def _refuse(self, requested: int, size: int, stream: int) -> OutOfMemory:
        limits = [limit for limit in (self._driver.capacity_bytes, self._allowed) if limit is not None]
        free = min(limits) - self.reserved_bytes
        if self._listener is not None:
            self._listener("oom", free, size, stream)
        needed = self.settings.segment_bytes(size)
        return OutOfMemory(
            requested, needed, free, self.allocated_bytes, self.reserved_bytes, self.largest_free_block_bytes
        )
