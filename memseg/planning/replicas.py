"""How the batch is shared out, and among which cards.

**Whole replicas.** A step waits for the slowest replica, so the best shares make the slowest as fast as can be. A card
never gets faster with one image more. So begin with any shares, and move one image at a time from the slowest card to
the one that is fastest with it, as long as that helps. No better shares exist when it no longer does: in better ones
the slowest card would have fewer images, some other card more of them, and moving one there would have helped. A card
whose share ends at 0 is not used.

That holds where each card rebuilds as it likes. Where all must rebuild alike, a card's time depends on what the others
have room for, and those shares are a bound. So of at most MOST_TRIED images all ways are tried, the most promising
first, until the bound of the next is no better than the best; with more, single images are moved as long as it helps.

**Replicas of splits.** Cards form a grid: a row per replica, a column per stage. Few grids are tried whole: all of them
where there are at most MOST_GRIDS, else the three that an engineer would draw: alike cards in a column, alike cards in
a row, and a machine in a row.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from memseg.planning.strategies import Column, Member, Slot

MOST_GRIDS = 60
_FEW_COLUMNS = 6
MOST_TRIED = 4
"""Images of which all ways to share them out are tried; each share takes a profile."""
MOST_SHARES = 6
"""Ways to share out a batch that are tried with each grid; the most even ones."""


def best_shares(
    slots: Sequence[Slot], batch: int, length: Callable[[Slot, int], float], *, fewest: int = 0
) -> list[Member] | None:
    """The shares whose longest is shortest.

    Args:
        slots: Places that may get a share.
        batch: Images to share out.
        length: Of a slot with a share of at least 1; never less for a larger one.
        fewest: Images that each slot gets at least.

    Returns:
        Those that get images, or None if there are fewer than two of them, or one cannot take its share.
    """
    if batch < fewest * len(slots):
        return None

    def of(number: int, share: int) -> float:
        return length(slots[number], share) if share else 0.0

    shares = _proportional([1 / max(of(number, 1), 1e-300) for number in range(len(slots))], batch, fewest)
    while True:
        lengths = [of(number, share) for number, share in enumerate(shares)]
        givers = [number for number, share in enumerate(shares) if share > fewest]
        giver = max(givers, key=lambda number: lengths[number], default=None)
        if giver is None or lengths[giver] < max(lengths):
            break
        longer = {number: of(number, shares[number] + 1) for number in range(len(slots)) if number != giver}
        taker = min(longer, key=lambda number: longer[number])
        if longer[taker] >= lengths[giver]:
            break
        shares[giver] -= 1
        shares[taker] += 1
    members = [Member(slot, share) for slot, share in zip(slots, shares, strict=True) if share]
    return members if len(members) > 1 and max(lengths) < math.inf else None


def best_shares_alike(
    slots: Sequence[Slot],
    batch: int,
    length: Callable[[Slot, int], float],
    together: Callable[[Column], float],
    *,
    fewest: int = 0,
) -> list[Member] | None:
    """The same where all cards must rebuild alike: the best shares of up to MOST_TRIED images, near the best of more.

    Args:
        slots, batch, fewest: As of `best_shares`.
        length: Of a slot with a share, if it might rebuild as it likes: a bound.
        together: Of the worst of some members that rebuild alike.
    """
    if batch > MOST_TRIED:
        return _moved(slots, best_shares(slots, batch, length, fewest=fewest), together, fewest)
    bounds = {}
    for shares in itertools.product(range(fewest, batch + 1), repeat=len(slots)):
        if sum(shares) == batch and sum(share > 0 for share in shares) > 1:
            parts = [length(slot, share) for slot, share in zip(slots, shares, strict=True) if share]
            bounds[shares] = max(parts)
    best, shortest = None, math.inf
    for shares in sorted(bounds, key=lambda one: bounds[one]):
        if bounds[shares] >= shortest:
            break
        members = _members(slots, shares)
        found = together(members)
        if found < shortest:
            best, shortest = list(members), found
    return best


def _moved(
    slots: Sequence[Slot], start: list[Member] | None, together: Callable[[Column], float], fewest: int
) -> list[Member] | None:
    if start is None:
        return None
    left = list(start)
    shares = []
    for slot in slots:
        mine = next((member for member in left if member.slot == slot), None)
        shares.append(mine.share if mine else 0)
        if mine:
            left.remove(mine)
    best = together(_members(slots, shares))
    while True:
        alike = {(slot, share): n for n, (slot, share) in enumerate(zip(slots, shares, strict=True))}
        moves = [
            [share - (n == giver) + (n == taker) for n, share in enumerate(shares)]
            for giver, taker in itertools.permutations(alike.values(), 2)
            if shares[giver] > fewest
        ]
        found = {tuple(moved): together(_members(slots, moved)) for moved in moves if sum(map(bool, moved)) > 1}
        better = min(found, key=lambda one: found[one], default=None)
        if better is None or found[better] >= best:
            return list(_members(slots, shares)) if best < math.inf else None
        shares, best = list(better), found[better]


def _members(slots: Sequence[Slot], shares: Sequence[int]) -> Column:
    return tuple(Member(slot, share) for slot, share in zip(slots, shares, strict=True) if share)


def _proportional(rates: Sequence[float], batch: int, fewest: int) -> list[int]:
    """Shares near the rates, at least `fewest` each."""
    total = sum(rates) or 1.0
    shares = [fewest + math.floor((batch - fewest * len(rates)) * rate / total) for rate in rates]
    by_rate = sorted(range(len(rates)), key=lambda number: -rates[number])
    for number in itertools.islice(itertools.cycle(by_rate), batch - sum(shares)):
        shares[number] += 1
    return shares


def grids(slots: Sequence[Slot], replicas: int, stages: int) -> Iterator[tuple[tuple[Slot, ...], ...]]:
    """Ways to lay slots out, a row per replica; neither the order of rows nor that of columns tells two apart.

    All of them, or where they are more than MOST_GRIDS the three that the module names.
    """
    if len(set(slots)) == 1:
        yield (tuple(slots[:stages]),) * replicas
        return
    if _num_grids(len(slots), replicas, stages) <= MOST_GRIDS:
        yield from dict.fromkeys(_normal(rows) for rows in _all_grids(tuple(slots), replicas, stages))
        return
    alike = sorted(slots, key=lambda slot: (slot.card.available_bytes, slot.card.flops, slot.card.name, slot.node))
    columns = [alike[number * replicas : (number + 1) * replicas] for number in range(stages)]
    by_node = sorted(alike, key=lambda slot: slot.node)
    drawn = [
        tuple(zip(*columns, strict=True)),
        *(tuple(tuple(row[n * stages : (n + 1) * stages]) for n in range(replicas)) for row in (alike, by_node)),
    ]
    yield from dict.fromkeys(map(_normal, drawn))


def _num_grids(cards: int, replicas: int, stages: int) -> int:
    return math.factorial(cards) // (math.factorial(replicas) * math.factorial(stages))


def _all_grids(slots: tuple[Slot, ...], replicas: int, stages: int) -> Iterator[tuple[tuple[Slot, ...], ...]]:
    for order in dict.fromkeys(itertools.permutations(slots)):
        yield tuple(order[start : start + stages] for start in range(0, len(order), stages))


def _normal(rows: tuple[tuple[Slot, ...], ...]) -> tuple[tuple[Slot, ...], ...]:
    """One of all the grids that differ in the order of rows and columns only; with many columns, in that of rows."""

    def key(slots: Sequence[Slot]) -> list[tuple[int, int, str]]:
        return [(slot.node, slot.card.available_bytes, slot.card.name) for slot in slots]

    columns = range(len(rows[0]))
    variants = (
        tuple(sorted((tuple(row[column] for column in order) for row in rows), key=key))
        for order in (itertools.permutations(columns) if len(columns) <= _FEW_COLUMNS else [columns])
    )
    return min(variants, key=lambda grid: [key(row) for row in grid])


def share_vectors(batch: int, replicas: int, multiple: int) -> list[tuple[int, ...]]:
    """Ways to share `batch` images out among rows, each a multiple: the most even ones, in all their orders."""
    parts, rest = divmod(batch, multiple)
    if rest or parts < replicas:
        return []
    even, more = divmod(parts, replicas)
    first = tuple(even + (number < more) for number in range(replicas))
    waiting, seen = [(max(first) - min(first), first)], {first}
    ways: list[tuple[int, ...]] = []
    while waiting and len(ways) < MOST_SHARES:
        _, shares = heapq.heappop(waiting)
        ways.append(tuple(share * multiple for share in shares))
        for giver, taker in itertools.permutations(range(replicas), 2):
            moved = tuple(share - (n == giver) + (n == taker) for n, share in enumerate(shares))
            if moved[giver] and moved not in seen:
                seen.add(moved)
                heapq.heappush(waiting, (max(moved) - min(moved), moved))
    return ways


def columns_of(rows: Sequence[Sequence[Slot]], shares: Sequence[int]) -> list[Column]:
    """The columns of a grid whose rows get these shares."""
    members = [[Member(slot, share) for slot in row] for row, share in zip(rows, shares, strict=True)]
    return [tuple(column) for column in zip(*members, strict=True)]
