"""The best way to lay consecutive segments over machines: a shortest path with lengths that are costly to know.

For n segments and k machines there are about n^(k-1) k! ways, and the length of each stage is a mixed-integer program
of its own. But most programs need never be solved. So each length begins as a lower bound, and is made exact only
where it matters:

    look for the shortest path by the lengths as they are
    all of its stages exact?  it is the optimum, for every other path is at least as long as its bounds say
    else make those stages' lengths better, and look again

One look is a dynamic program from the last stage backwards, over (machines used so far, first segment): machines that
are equal are counted, not told apart, and the step over cuts is one min-plus product of a matrix.

    best[used + m, p] = min over q of length(m, p..q-1) + transfer(m -> next, q) + best[used, q]

With micro-batches a path takes the sum of its stages once, and its slowest stage once more for each further
micro-batch. That is no sum, but for a given limit on the slowest stage the best sum is. So the search is repeated with
the limit set just below the slowest stage of the last answer, until even a perfect sum could not make up for it.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
M = TypeVar("M", bound=Hashable)
M_contra = TypeVar("M_contra", bound=Hashable, contravariant=True)


@dataclass(frozen=True)
class Leg(Generic[M]):
    """One stage of a path."""

    machine: M
    first: int
    last: int
    """Of its segments, included."""
    after: int
    """Stages that follow."""


class Lengths(Protocol[M_contra]):
    """How long stages are."""

    def bounds(self, machine: M_contra, after: int) -> Matrix:
        """[first, end] -> a lower bound of the stage first..end-1; infinite where there can be none."""

    def refine(self, machine: M_contra, first: int, last: int, after: int) -> tuple[float, bool]:
        """A better bound, or the exact length and True; of one stage it is called until it is exact."""


@dataclass(frozen=True)
class PathProblem(Generic[M]):
    """What to lay out, and how its parts add up."""

    num_segments: int
    machines: tuple[M, ...]
    lengths: Lengths[M]
    between: Callable[[M, M], NDArray[np.float64]]
    """[cut] -> the length of the step from one machine to the next where the next begins with that segment."""
    fewest: int
    most: int
    """Stages."""
    worst: bool = False
    """Is a path as long as its longest part, instead of all parts together?"""
    repeats: int = 0
    """How often the longest part counts once more."""
    limit: float = math.inf
    """Paths that are not shorter need not be found."""


def best_path(problem: PathProblem[M]) -> list[Leg[M]] | None:
    """The shortest path, or None if every one is infinitely long, or none is shorter than the limit."""
    search = _Search(problem)
    least_part = search.least_part() if problem.repeats else 0.0
    best, part_limit = None, math.inf
    while True:
        total = best.total if best else problem.limit
        found = search.shortest(part_limit, total - problem.repeats * least_part)
        if found is None:
            return best.legs if best else None
        if found.total < total:
            best = found
        if problem.repeats == 0:
            return best.legs if best else None
        part_limit = found.longest


@dataclass(frozen=True)
class _Found(Generic[M]):
    legs: list[Leg[M]]
    sum: float
    longest: float
    total: float


class _Search(Generic[M]):
    def __init__(self, problem: PathProblem[M]) -> None:
        self._problem, self._end = problem, problem.num_segments
        self._kinds = list(dict.fromkeys(problem.machines))
        counts = [problem.machines.count(kind) for kind in self._kinds]
        most = min(problem.most, len(problem.machines), problem.num_segments)
        # [kind, stages that follow][first, end], and [kind, next kind][cut].
        self._lengths = np.array(
            [[problem.lengths.bounds(kind, after) for after in range(most)] for kind in self._kinds]
        )
        self._between = np.array([[problem.between(one, other) for other in self._kinds] for one in self._kinds])
        self._exact: set[Leg[M]] = set()
        every = itertools.product(*(range(count + 1) for count in counts))
        self._used = sorted((used for used in every if 0 < sum(used) <= most), key=sum)
        self._rows = {used: row for row, used in enumerate(self._used)}
        self._whole = np.array([row for used, row in self._rows.items() if sum(used) >= problem.fewest], dtype=np.intp)
        self._first_steps, self._steps = self._order(most)

    def _order(
        self, most: int
    ) -> tuple[list[tuple[int, NDArray[np.intp]]], list[tuple[int, int, NDArray[np.intp], NDArray[np.intp]]]]:
        """Which rows of used machines get a first stage of which kind, before which rows; the fewest machines first."""
        first_steps, steps = [], []
        for size in range(1, most + 1):
            for kind in range(len(self._kinds)):
                used = [one for one in self._used if sum(one) == size and one[kind]]
                rows = np.array([self._rows[one] for one in used], dtype=np.intp)
                if size == 1:
                    first_steps.append((kind, rows))
                else:
                    rests = np.array([self._rows[_without(one, kind)] for one in used], dtype=np.intp)
                    steps.append((kind, size - 1, rows, rests))
        return first_steps, [step for step in steps if step[2].size]

    def shortest(self, part_limit: float, limit: float) -> _Found[M] | None:
        """By exact lengths, every part below `part_limit` and the whole below `limit`; None if there is none."""
        while True:
            total, legs = self._look(part_limit, worst=self._problem.worst)
            if legs is None or total >= limit:
                return None
            unknown = [leg for leg in legs if leg not in self._exact]
            if not unknown:
                return self._found(legs)
            for leg in unknown:
                self._refine(leg)

    def least_part(self) -> float:
        """A lower bound of the longest part of any path."""
        total, _ = self._look(math.inf, worst=True)
        return total

    def _refine(self, leg: Leg[M]) -> None:
        length, exact = self._problem.lengths.refine(leg.machine, leg.first, leg.last, leg.after)
        self._lengths[self._kinds.index(leg.machine), leg.after, leg.first, leg.last + 1] = length
        if exact:
            self._exact.add(leg)

    def _found(self, legs: list[Leg[M]]) -> _Found[M]:
        parts = self._parts(legs)
        longest, total = max(parts), sum(parts)
        return _Found(legs, total, longest, total + self._problem.repeats * longest)

    def _parts(self, legs: Sequence[Leg[M]]) -> list[float]:
        """Lengths of stages and of the steps between them."""
        stages = [
            float(self._lengths[self._kinds.index(leg.machine), leg.after, leg.first, leg.last + 1]) for leg in legs
        ]
        steps = [
            float(self._between[self._kinds.index(one.machine), self._kinds.index(other.machine), other.first])
            for one, other in itertools.pairwise(legs)
        ]
        return stages + steps

    def _look(self, part_limit: float, *, worst: bool) -> tuple[float, list[Leg[M]] | None]:
        """The shortest path by the lengths as they are, and how long it is."""
        join = np.maximum if worst else np.add
        lengths, between = self._lengths, self._between
        if part_limit < math.inf:
            lengths = np.where(lengths < part_limit, lengths, math.inf)
            between = np.where(between < part_limit, between, math.inf)
        best = np.full((len(self._used), len(self._kinds), self._end + 1), math.inf)
        cuts = np.zeros(best.shape, dtype=np.intp)
        nexts = np.zeros(best.shape, dtype=np.intp)
        for kind, rows in self._first_steps:
            best[rows, kind] = lengths[kind, 0][:, self._end]
        for kind, after, rows, rests in self._steps:
            arriving = join(between[kind], best[rests])
            following = arriving.argmin(axis=1)
            onward = np.take_along_axis(arriving, following[:, None], axis=1)
            ways = join(lengths[kind, after], onward)
            cut = ways.argmin(axis=2)
            best[rows, kind] = np.take_along_axis(ways, cut[..., None], axis=2)[..., 0]
            cuts[rows, kind] = cut
            nexts[rows, kind] = np.take_along_axis(following, cut, axis=1)
        starts = best[self._whole, :, 0]
        if starts.size == 0 or (total := float(starts.min())) == math.inf:
            return math.inf, None
        row, kind = divmod(int(starts.argmin()), len(self._kinds))
        return total, self._walk(int(self._whole[row]), kind, cuts, nexts)

    def _walk(self, row: int, kind: int, cuts: NDArray[np.intp], nexts: NDArray[np.intp]) -> list[Leg[M]]:
        legs, first = [], 0
        while True:
            after = sum(self._used[row]) - 1
            stop = int(cuts[row, kind, first]) if after else self._end
            legs.append(Leg(self._kinds[kind], first, stop - 1, after))
            if not after:
                return legs
            following = int(nexts[row, kind, first])
            row = self._rows[_without(self._used[row], kind)]
            kind, first = following, stop


def _without(used: tuple[int, ...], kind: int) -> tuple[int, ...]:
    return (*used[:kind], used[kind] - 1, *used[kind + 1 :])
