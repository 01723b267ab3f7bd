"""Blocks of the CUDA allocator as chains and sorted lists: what lies beside what, and what is free for whom.

A segment is a chain of pieces by address. A pool holds the free pieces of one stream and kind sorted by size and
address, so that the best fit is one bisection, and the address ranges that have no memory yet. Sorted lists of
thousands are moved faster than a tree of Python objects is walked.

Source: Block and BlockPool of c10/cuda/CUDACachingAllocator.cpp, whose names stand in brackets.
"""

from bisect import bisect_left, insort
from typing import Literal

State = Literal["active_allocated", "active_pending_free", "inactive"]
"""Of a block, as torch's snapshots name them."""


class Piece:
    """A link in the chain of its segment [Block]."""

    __slots__ = ("address", "born_at", "home", "is_mapped", "key", "next", "pool", "prev", "requested", "size", "state")

    def __init__(self, pool: "Pool", home: int, address: int, size: int, *, is_mapped: bool = True) -> None:
        self.pool = pool
        self.home = home
        """Where its segment begins."""
        self.address = address
        self.size = size
        self.is_mapped = is_mapped
        """Whether there is memory behind its addresses."""
        self.requested = 0
        self.state: State = "inactive"
        self.key: int | None = None
        self.prev: Piece | None = None
        self.next: Piece | None = None
        self.born_at = 0
        """How many searches its pool had seen when it became free [gc_count_base]."""

    def cut(self, size: int) -> "Piece":
        """Keep the first `size` bytes; what comes back is the rest, next in the chain and in no list."""
        rest = Piece(self.pool, self.home, self.address + size, self.size - size, is_mapped=self.is_mapped)
        rest.prev, rest.next = self, self.next
        if rest.next is not None:
            rest.next.prev = rest
        self.next = rest
        self.size = size
        return rest

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its segment [not is_split]."""
        return self.prev is None and self.next is None

    @property
    def reach(self) -> int:
        """Its size with the unmapped addresses behind it [expandable_size]."""
        after = self.next
        return self.size + (after.size if after is not None and not after.is_mapped else 0)


class Pool:
    """What is free for one stream and kind [BlockPool, which holds all streams one after the other].

    Args:
        stream: Whose it is.
        is_small: Whether it serves requests up to 1 MiB.
        page: Bytes of a page of its expandable segments.
    """

    __slots__ = ("free", "is_small", "page", "stream", "unmapped")

    def __init__(self, stream: int, *, is_small: bool, page: int) -> None:
        self.stream = stream
        self.is_small = is_small
        self.page = page
        self.free: list[tuple[int, int, Piece]] = []
        """(size, address, piece), sorted; addresses differ, so pieces are never compared."""
        self.unmapped: list[tuple[int, Piece]] = []
        """(address, range without memory), sorted."""

    def put(self, piece: Piece) -> None:
        """It is free, or has no memory."""
        if piece.is_mapped:
            insort(self.free, (piece.size, piece.address, piece))
        else:
            insort(self.unmapped, (piece.address, piece))

    def take(self, piece: Piece) -> None:
        """It is not any more."""
        if piece.is_mapped:
            del self.free[bisect_left(self.free, (piece.size, piece.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, (piece.address,))]

    def merge(self, piece: Piece) -> None:
        """Let a piece that is in no list swallow neighbours that are as free and as mapped as it [try_merge_blocks]."""
        before, after = piece.prev, piece.next
        if before is not None and before.state == "inactive" and before.is_mapped == piece.is_mapped:
            self.take(before)
            piece.address = before.address
            piece.size += before.size
            piece.prev = before.prev
            if piece.prev is not None:
                piece.prev.next = piece
        if after is not None and after.state == "inactive" and after.is_mapped == piece.is_mapped:
            self.take(after)
            piece.size += after.size
            piece.next = after.next
            if piece.next is not None:
                piece.next.prev = piece
