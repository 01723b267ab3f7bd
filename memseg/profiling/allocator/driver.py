"""Memory as the CUDA driver gives it to the allocator: fixed segments, or pages under a range of addresses.

    fixed        |block|block|free    |      |block  |free|       one cudaMalloc each, given back whole
    expandable   |block|block|free    | - - -|block  | - - - - - - - - -   addresses for more than the card,
                 |page |page |page    |      |page   |                     pages come and go

Everything that is asked for counts against the capacity, and nothing else does: the context and other processes must
be taken off it beforehand.

Source: alloc_block, try_allocate_expandable_block, map_block, unmap_block and ExpandableSegment of
c10/cuda/CUDACachingAllocator.cpp.
"""

from collections.abc import Callable

from memseg.profiling.allocator.pool import Piece, Pool

_FIRST_ADDRESS = 0x7F00_0000_0000
_ADDRESS_STEP = 2 * 2**20
_BOUNDLESS_BYTES = 2**44
"""What a card is taken to have where no capacity is known: only the span of an expandable segment depends on it."""

Listener = Callable[[str, int, int, int], None]
"""Told of each (action, address, bytes, stream), actions as in torch's snapshots."""


class Driver:
    """What of a card is reserved.

    Args:
        capacity_bytes: What it can give; None: without limit.
        listener: Told of all that is given and taken back.
    """

    def __init__(self, capacity_bytes: int | None, listener: Listener | None) -> None:
        self.capacity_bytes = capacity_bytes
        self._listener = listener
        self._next_address = _FIRST_ADDRESS
        self.reserved_bytes = 0
        self.peak_reserved_bytes = 0
        self.num_segments = 0
        """Fixed segments, or address ranges of expandable ones."""

    def allocate(self, pool: Pool, size: int) -> Piece | None:
        """A fixed segment, or None beyond the capacity [cudaMalloc]."""
        if not self._reserve(size):
            return None
        address = self._new_addresses(size)
        self._tell("segment_alloc", address, size, pool.stream)
        return Piece(pool, address, address, size)

    def release(self, piece: Piece) -> None:
        """Take a fixed segment back, which is free and whole [cudaFree]."""
        piece.pool.take(piece)
        self.reserved_bytes -= piece.size
        self.num_segments -= 1
        self._tell("segment_free", piece.address, piece.size, piece.pool.stream)

    def grow(self, pool: Pool, size: int) -> Piece | None:
        """A piece of at least `size` at the lowest addresses with room, or None beyond the capacity.

        Free memory before unmapped addresses is used with them. Pages that were mapped before the capacity was
        reached stay, free.
        """
        piece = self._find_room(pool, size)
        if not piece.is_mapped and not self._map(piece, min(piece.size, size)):
            return None
        while piece.size < size:
            unmapped = piece.next
            assert unmapped is not None  # There is room behind it, and what is free and mapped was merged.
            if not self._map(unmapped, min(unmapped.size, size - piece.size)):
                return None
            piece = unmapped
        pool.take(piece)
        return piece

    def shrink(self, piece: Piece) -> None:
        """Take back the pages that lie wholly inside a free piece."""
        pool, page = piece.pool, piece.pool.page
        begin = piece.home + -(-(piece.address - piece.home) // page) * page
        end = piece.home + (piece.address + piece.size - piece.home) // page * page
        if begin >= end:
            return
        pool.take(piece)
        unmapped = piece
        if begin > piece.address:
            unmapped = piece.cut(begin - piece.address)
            pool.put(piece)
        if unmapped.size > end - begin:
            pool.put(unmapped.cut(end - begin))
        unmapped.is_mapped = False
        pool.merge(unmapped)
        self.reserved_bytes -= end - begin
        if unmapped.is_whole:
            self.num_segments -= 1
        else:
            pool.put(unmapped)
        self._tell("segment_unmap", begin, end - begin, pool.stream)

    def _find_room(self, pool: Pool, size: int) -> Piece:
        """The first of the free and unmapped pieces that together have room; a new segment's addresses otherwise."""
        for _, piece in pool.unmapped:
            start = piece.prev if piece.prev is not None and piece.prev.state == "inactive" else piece
            room = 0
            link: Piece | None = start
            while link is not None and link.state == "inactive" and room < size:
                room += link.size
                link = link.next
            if room >= size:
                return start
        total = _BOUNDLESS_BYTES if self.capacity_bytes is None else self.capacity_bytes
        # An eighth more than the card has, for pages that move to the end.
        span = max(-(-(total + total // 8) // pool.page), -(-size // pool.page)) * pool.page
        address = self._new_addresses(span)
        new = Piece(pool, address, address, span, is_mapped=False)
        pool.put(new)
        return new

    def _map(self, piece: Piece, size: int) -> bool:
        """Put pages under the first `size` bytes of an unmapped piece; it then is free."""
        pool = piece.pool
        size = -(-size // pool.page) * pool.page
        if not self._reserve(size):
            return False
        pool.take(piece)
        if size < piece.size:
            pool.put(piece.cut(size))
        address = piece.address
        piece.is_mapped = True
        pool.merge(piece)
        pool.put(piece)
        self._tell("segment_map", address, size, pool.stream)
        return True

    def _reserve(self, size: int) -> bool:
        if self.capacity_bytes is not None and self.reserved_bytes + size > self.capacity_bytes:
            return False
        self.reserved_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return True

    def _new_addresses(self, size: int) -> int:
        address = self._next_address
        self._next_address += -(-size // _ADDRESS_STEP) * _ADDRESS_STEP
        self.num_segments += 1
        return address

    def _tell(self, action: str, address: int, size: int, stream: int) -> None:
        if self._listener is not None:
            self._listener(action, address, size, stream)
