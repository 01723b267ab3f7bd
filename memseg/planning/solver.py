"""Which recompute level each segment of a stage gets: the fastest mix that fits the card.

Choosing greedily (rebuild the largest saver, look again) goes wrong, since the peak is a maximum over moments and a
level that frees bytes at one moment may cost some at another. But each moment is a sum of terms, so the choice is a
small mixed-integer program, which we leave to HiGHS through `scipy.optimize.milp`:

    x[s, l]     1 if segment s gets level l; one level per segment
    z[t]        at least 1 if any of the choices that keep tensor t is taken
    p           the peak, for the second program
    rows        bytes of all terms of a moment <= what there is room for, or <= p
    minimise    seconds of the step, or p

Without "whole" in front of the numbers the same program takes a tenth of the time, and gives a lower bound.

HiGHS counts in floating point. What it returns is therefore added up again in whole bytes, and if it is over by a
rounding error, that one mix is excluded and the program solved again.
"""

import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from memseg.planning.cards import Card
from memseg.planning.memory import Peak, Pick, Stage

_INFEASIBLE = 2
"""In `OptimizeResult.status`."""


@dataclass(frozen=True)
class StageChoice:
    """A level for each segment of a stage, and what follows from it."""

    levels: tuple[int, ...]
    """For each segment, a position in its `levels`."""
    peak: Peak


class StageSolver:
    """Answers for one stage; remembers what does not depend on the card.

    `room` is what the peak may fill, in bytes.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def fastest(self, card: Card, room: int) -> StageChoice | None:
        """The fastest choice of levels whose peak fits, or None if none does."""
        unhurried = self.unhurried(card)
        if unhurried.peak.size <= room:
            return unhurried
        if self.least_bytes > room or self.smallest.peak.size > room:
            return None
        excluded: list[tuple[int, ...]] = []
        while True:
            found = self._program.fastest(card, room, excluded)
            choice = self._choice(found) if found else self.smallest
            if choice.peak.size <= room:
                return choice
            excluded.append(choice.levels)

    def unhurried(self, card: Card) -> StageChoice:
        """The choice that rebuilds nothing that takes time, whatever memory it needs."""
        levels = []
        for segment, seconds in zip(self.stage.segments, self._level_seconds(card), strict=True):
            costs = [(time, level.saved_bytes) for time, level in zip(seconds, segment.levels, strict=True)]
            levels.append(costs.index(min(costs)))
        return self._known_choice(tuple(levels))

    def seconds(self, card: Card, choice: StageChoice) -> float:
        """Of computing forward and backward of one micro-batch."""
        by_level = zip(self._level_seconds(card), choice.levels, strict=True)
        return sum(seconds[level] for seconds, level in by_level)

    def _level_seconds(self, card: Card) -> list[list[float]]:
        return self.stage.costs.level_seconds(card)[self.stage.first : self.stage.last + 1]

    def bound(self, card: Card, room: int) -> float:
        """A lower bound of the seconds of every choice that fits; infinite where the program has no answer at all."""
        return self._program.bound(card, room)

    @cached_property
    def smallest(self) -> StageChoice:
        """The choice of levels with the lowest peak, whatever time it takes; to within a millionth."""
        return self._choice(self._program.smallest())

    @cached_property
    def least_bytes(self) -> int:
        """A lower bound of every choice's peak, without a program."""
        return max(moment.least_bytes() for moment in self.stage.moments)

    @cached_property
    def _program(self) -> "_Program":
        return _Program(self.stage)

    @cached_property
    def _known_choice(self) -> Callable[[tuple[int, ...]], StageChoice]:
        return cache(self._choice)

    def _choice(self, levels: Sequence[int]) -> StageChoice:
        return StageChoice(tuple(levels), self.stage.peak_of(levels))


class _Program:
    """The mixed-integer program of one stage. Columns: every x, then every z, then p.

    Bytes are in units of all terms together and seconds in units of all levels together, so no number exceeds 1 and
    HiGHS's tolerance of 1e-6 means a millionth of those.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        picks = [(p, level) for p in stage.positions for level in range(len(stage.costs.segments[p].levels))]
        self._columns: dict[Pick | frozenset[Pick], int] = {pick: column for column, pick in enumerate(picks)}
        self._num_picks = len(picks)
        shared = {
            term.picks
            for moment in stage.moments
            for term in moment.terms
            if term.picks and _segments_in(term.picks) > 1
        }
        for tensor in shared:
            self._columns[tensor] = len(self._columns)
        self._num_columns = len(self._columns) + 1
        self._bytes, self._always = self._moment_rows()
        self._unit = max(1.0, float((self._always + self._bytes.sum(axis=1)).max()))
        self._rules = [self._one_level_each(), *([self._kept_if_picked(shared)] if shared else [])]

    def fastest(self, card: Card, room: int, excluded: Sequence[Sequence[int]]) -> list[int] | None:
        """The quickest levels for which no moment exceeds `room`, those `excluded` apart."""
        seconds = self._seconds(card)
        rows = [self._within(room), *map(self._anything_but, excluded)]
        result = self._solve(seconds / max(seconds.sum(), 1e-300), rows)
        return None if result is None else self._levels(result)

    def bound(self, card: Card, room: int) -> float:
        """Of the seconds of `fastest`, from below: the program with fractions of levels."""
        seconds = self._seconds(card)
        unit = max(seconds.sum(), 1e-300)
        result = self._solve(seconds / unit, [self._within(room)], whole=False)
        # HiGHS answers to within its tolerance.
        return math.inf if result is None else float(seconds @ result) - 1e-6 * unit

    def smallest(self) -> list[int]:
        """The levels of the lowest peak."""
        rows = self._bytes / self._unit
        rows[:, -1] = -1.0
        objective = np.zeros(self._num_columns)
        objective[-1] = 1.0
        result = self._solve(objective, [LinearConstraint(csr_array(rows), ub=-self._always / self._unit)])
        if result is None:
            raise RuntimeError("HiGHS found no peak at all")
        return self._levels(result)

    def _seconds(self, card: Card) -> NDArray[np.float64]:
        seconds = np.zeros(self._num_columns)
        by_segment = self._stage.costs.level_seconds(card)
        for position in self._stage.positions:
            for level, time in enumerate(by_segment[position]):
                seconds[self._columns[position, level]] = time
        return seconds

    def _within(self, room: int) -> LinearConstraint:
        return LinearConstraint(csr_array(self._bytes / self._unit), ub=(room - self._always) / self._unit)

    def _anything_but(self, levels: Sequence[int]) -> LinearConstraint:
        row = np.zeros((1, self._num_columns))
        for position, level in zip(self._stage.positions, levels, strict=True):
            row[0, self._columns[position, level]] = 1.0
        return LinearConstraint(csr_array(row), ub=len(levels) - 1)

    def _moment_rows(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        moments = self._stage.moments
        rows, always = np.zeros((len(moments), self._num_columns)), np.zeros(len(moments))
        for row, moment in enumerate(moments):
            for term in moment.terms:
                if term.picks is None:
                    always[row] += term.size
                elif term.picks in self._columns:
                    rows[row, self._columns[term.picks]] += term.size
                else:
                    for pick in term.picks:
                        rows[row, self._columns[pick]] += term.size
        return rows, always

    def _one_level_each(self) -> LinearConstraint:
        rows = np.zeros((len(self._stage.positions), self._num_columns))
        for row, position in enumerate(self._stage.positions):
            for level in range(len(self._stage.costs.segments[position].levels)):
                rows[row, self._columns[position, level]] = 1.0
        return LinearConstraint(csr_array(rows), lb=1, ub=1)

    def _kept_if_picked(self, shared: set[frozenset[Pick]]) -> LinearConstraint:
        rows = []
        for tensor in shared:
            for position in {position for position, _ in tensor}:
                row = np.zeros(self._num_columns)
                row[self._columns[tensor]] = 1.0
                for pick in tensor:
                    if pick[0] == position:
                        row[self._columns[pick]] = -1.0
                rows.append(row)
        return LinearConstraint(csr_array(np.array(rows)), lb=0)

    def _solve(
        self, objective: NDArray[np.float64], rows: Sequence[LinearConstraint], *, whole: bool = True
    ) -> NDArray[np.float64] | None:
        integrality = np.zeros(self._num_columns, dtype=np.int64)
        integrality[: self._num_picks] = whole
        with _standard_output_held():
            result: OptimizeResult = milp(
                objective,
                integrality=integrality,
                bounds=Bounds(0, 1),
                constraints=[*self._rules, *rows],
                options={"mip_rel_gap": 0.0},
            )
        if result.status == _INFEASIBLE:
            return None
        if not result.success:
            raise RuntimeError(f"HiGHS stopped without an answer: {result.message}")
        values: NDArray[np.float64] = result.x
        return values

    def _levels(self, values: NDArray[np.float64]) -> list[int]:
        levels = []
        for position in self._stage.positions:
            first = self._columns[position, 0]
            levels.append(int(np.argmax(values[first : first + len(self._stage.costs.segments[position].levels)])))
        return levels


@contextmanager
def _standard_output_held() -> Iterator[None]:
    """HiGHS as of SciPy 1.17 prints a debugging line on standard output now and then, which must not end up in JSON.

    It writes to the descriptor, past `sys.stdout`; so for these milliseconds the descriptor leads nowhere.
    """
    sys.stdout.flush()
    flush_c_streams = ctypes.CDLL(None).fflush
    flush_c_streams(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush_c_streams(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _segments_in(picks: frozenset[Pick]) -> int:
    return len({position for position, _ in picks})
