"""Which recompute level each segment of a stage gets: the fastest mix that fits the card, or the cards.

Choosing greedily (rebuild the largest saver, look again) goes wrong, since the peak is a maximum over moments and a
level that frees bytes at one moment may cost some at another. But each moment is a sum of terms, so the choice is a
small mixed-integer program, which we leave to HiGHS through `scipy.optimize.milp`:

    x[s, l]     1 if segment s gets level l; one level per segment
    z[t]        at least 1 if any of the choices that keep tensor t is taken
    rows        bytes of all terms of a moment <= what there is room for
    minimise    seconds of the step

Replicas whose norms sync must rebuild alike, for a rebuilt layer sends other messages than one that was kept, and in
another order. So a column of cards, each with its share of the batch, is one program with one x: every card's moments
are rows, and what is minimised is the slowest card's seconds. To look for the lowest peak instead, p stands for what
every row is over its room.

Without "whole" in front of the numbers the same program takes a tenth of the time, and gives a lower bound.

HiGHS counts in floating point. What it returns is therefore added up again in whole bytes, and if it is over by a
rounding error, that one mix is excluded and the program solved again.
"""

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
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
class Choice:
    """A level for each segment of a column's stage, and what follows from it."""

    levels: tuple[int, ...]
    """For each segment, a position in its `levels`."""
    peaks: tuple[Peak, ...]
    """Of each card."""

    def fits(self, rooms: Sequence[int]) -> bool:
        """Does every card's peak fit its room?"""
        return all(peak.size <= room for peak, room in zip(self.peaks, rooms, strict=True))


class ColumnSolver:
    """Answers for one stage on one card or on several that rebuild alike; remembers what does not depend on the cards.

    Args:
        stages: The stage as each card has it: the same segments, with the costs of its share.

    Cards are given in the same order, and `rooms` are what their peaks may fill, in bytes.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self._known_choice = cache(self._new_choice)
        self._known_smallest = cache(self._new_smallest)

    def fastest(self, cards: Sequence[Card], rooms: Sequence[int]) -> Choice | None:
        """The fastest choice of levels whose peaks fit, or None if none does."""
        unhurried = self.unhurried(cards)
        if unhurried and unhurried.fits(rooms):
            return unhurried
        if any(least > room for least, room in zip(self.least_bytes, rooms, strict=True)):
            return None
        smallest = self.smallest(tuple(rooms))
        if not smallest.fits(rooms):
            return None
        excluded: list[tuple[int, ...]] = []
        while True:
            found = self._program.fastest(cards, rooms, excluded)
            choice = self._known_choice(found) if found else smallest
            if choice.fits(rooms):
                return choice
            excluded.append(choice.levels)

    def unhurried(self, cards: Sequence[Card]) -> Choice | None:
        """The choice that rebuilds nothing that takes time, whatever memory it needs; None where cards disagree."""
        mixes = {self._unhurried_levels(stage, card) for stage, card in zip(self.stages, cards, strict=True)}
        return self._known_choice(mixes.pop()) if len(mixes) == 1 else None

    def seconds(self, cards: Sequence[Card], choice: Choice) -> float:
        """Of computing forward and backward of one micro-batch, on the slowest card."""
        return max(
            sum(seconds[level] for seconds, level in zip(_level_seconds(stage, card), choice.levels, strict=True))
            for stage, card in zip(self.stages, cards, strict=True)
        )

    def bound(self, cards: Sequence[Card], rooms: Sequence[int]) -> float:
        """A lower bound of the seconds of every choice that fits; infinite where the program has no answer at all."""
        return self._program.bound(cards, rooms)

    def smallest(self, rooms: tuple[int, ...], units: tuple[int, ...] | None = None) -> Choice:
        """The choice whose peaks exceed their rooms least, or leave most of them, whatever time it takes.

        Args:
            rooms: Of each card.
            units: What a byte over the room is divided by, of each card; 1 if left out.

        The program's answer is right to within a millionth.
        """
        if len(self.stages) == 1:
            rooms, units = (0,), None
        return self._known_smallest(rooms, units or (1,) * len(self.stages))

    @cached_property
    def least_bytes(self) -> tuple[int, ...]:
        """A lower bound of every choice's peak on each card, without a program."""
        return tuple(max(moment.least_bytes() for moment in stage.moments) for stage in self.stages)

    @cached_property
    def _program(self) -> "_Program":
        return _Program(self.stages)

    def _new_smallest(self, rooms: tuple[int, ...], units: tuple[int, ...]) -> Choice:
        return self._known_choice(self._program.smallest(rooms, units))

    def _new_choice(self, levels: tuple[int, ...]) -> Choice:
        return Choice(levels, tuple(stage.peak_of(levels) for stage in self.stages))

    def _unhurried_levels(self, stage: Stage, card: Card) -> tuple[int, ...]:
        levels = []
        for segment, seconds in zip(stage.segments, _level_seconds(stage, card), strict=True):
            costs = [(time, level.saved_bytes) for time, level in zip(seconds, segment.levels, strict=True)]
            levels.append(costs.index(min(costs)))
        return tuple(levels)


def _level_seconds(stage: Stage, card: Card) -> list[list[float]]:
    return stage.costs.level_seconds(card)[stage.first : stage.last + 1]


class _Program:
    """The mixed-integer program of a column. Columns: every x, then every z, then what is minimised where it is no sum.

    Bytes are in units of all terms together and seconds in units of all levels together, so no number exceeds 1 and
    HiGHS's tolerance of 1e-6 means a millionth of those.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages, self._positions = stages, stages[0].positions
        segments = stages[0].costs.segments
        picks = [(p, level) for p in self._positions for level in range(len(segments[p].levels))]
        self._columns: dict[Pick | frozenset[Pick], int] = {pick: column for column, pick in enumerate(picks)}
        self._num_picks = len(picks)
        shared = {
            term.picks
            for stage in stages
            for moment in stage.moments
            for term in moment.terms
            if term.picks and _segments_in(term.picks) > 1
        }
        for tensor in shared:
            self._columns[tensor] = len(self._columns)
        self._num_columns = len(self._columns) + 1
        rows = [self._moment_rows(stage) for stage in stages]
        self._bytes, self._always = [row for row, _ in rows], [always for _, always in rows]
        every = zip(self._bytes, self._always, strict=True)
        self._unit = max(1.0, *(float((always + abs(matrix).sum(axis=1)).max()) for matrix, always in every))
        self._rules = [self._one_level_each(), *([self._kept_if_picked(shared)] if shared else [])]

    def fastest(
        self, cards: Sequence[Card], rooms: Sequence[int], excluded: Sequence[Sequence[int]]
    ) -> tuple[int, ...] | None:
        """The quickest levels for which no moment exceeds its room, those `excluded` apart."""
        objective, rows, _ = self._quickest(cards)
        result = self._solve(objective, [*rows, *self._within(rooms), *map(self._anything_but, excluded)])
        return None if result is None else self._levels(result)

    def bound(self, cards: Sequence[Card], rooms: Sequence[int]) -> float:
        """Of the seconds of `fastest`, from below: the program with fractions of levels."""
        objective, rows, unit = self._quickest(cards)
        result = self._solve(objective, [*rows, *self._within(rooms)], whole=False)
        # HiGHS answers to within its tolerance.
        return math.inf if result is None else (float(objective @ result) - 1e-6) * unit

    def smallest(self, rooms: Sequence[int], units: Sequence[int]) -> tuple[int, ...]:
        """The levels of the peaks that are least over their rooms."""
        constraints = []
        largest = max(units)
        for matrix, always, room, unit in zip(self._bytes, self._always, rooms, units, strict=True):
            scale = self._unit * unit / largest
            rows = matrix / scale
            rows[:, -1] = -1.0
            constraints.append(LinearConstraint(csr_array(rows), ub=(room - always) / scale))
        result = self._solve(self._last_column(), constraints, free_last=True)
        if result is None:
            raise RuntimeError("HiGHS found no peak at all")
        return self._levels(result)

    def _quickest(self, cards: Sequence[Card]) -> tuple[NDArray[np.float64], list[LinearConstraint], float]:
        """What to minimise, the rows that go with it, and the unit of its seconds."""
        seconds = [self._seconds(stage, card) for stage, card in zip(self._stages, cards, strict=True)]
        unit = max(1e-300, *(float(row.sum()) for row in seconds))
        if len(seconds) == 1:
            return seconds[0] / unit, [], unit
        slowest = np.array(seconds) / unit
        slowest[:, -1] = -1.0
        return self._last_column(), [LinearConstraint(csr_array(slowest), ub=0.0)], unit

    def _seconds(self, stage: Stage, card: Card) -> NDArray[np.float64]:
        seconds = np.zeros(self._num_columns)
        by_segment = stage.costs.level_seconds(card)
        for position in self._positions:
            for level, time in enumerate(by_segment[position]):
                seconds[self._columns[position, level]] = time
        return seconds

    def _last_column(self) -> NDArray[np.float64]:
        objective = np.zeros(self._num_columns)
        objective[-1] = 1.0
        return objective

    def _within(self, rooms: Sequence[int]) -> list[LinearConstraint]:
        return [
            LinearConstraint(csr_array(matrix / self._unit), ub=(room - always) / self._unit)
            for matrix, always, room in zip(self._bytes, self._always, rooms, strict=True)
        ]

    def _anything_but(self, levels: Sequence[int]) -> LinearConstraint:
        row = np.zeros((1, self._num_columns))
        for position, level in zip(self._positions, levels, strict=True):
            row[0, self._columns[position, level]] = 1.0
        return LinearConstraint(csr_array(row), ub=len(levels) - 1)

    def _moment_rows(self, stage: Stage) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        moments = stage.moments
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
        rows = np.zeros((len(self._positions), self._num_columns))
        for row, position in enumerate(self._positions):
            for level in range(self._num_levels(position)):
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
        self,
        objective: NDArray[np.float64],
        rows: Sequence[LinearConstraint],
        *,
        whole: bool = True,
        free_last: bool = False,
    ) -> NDArray[np.float64] | None:
        integrality = np.zeros(self._num_columns, dtype=np.int64)
        integrality[: self._num_picks] = whole
        lowest, highest = np.zeros(self._num_columns), np.ones(self._num_columns)
        if free_last:
            lowest[-1], highest[-1] = -np.inf, np.inf
        with _standard_output_held():
            result: OptimizeResult = milp(
                objective,
                integrality=integrality,
                bounds=Bounds(lowest, highest),
                constraints=[*self._rules, *rows],
                # With presolve, HiGHS of SciPy 1.17.1 has called an answer the best that was not; it is no faster.
                options={"mip_rel_gap": 0.0, "presolve": False},
            )
        if result.status == _INFEASIBLE:
            return None
        if not result.success:
            raise RuntimeError(f"HiGHS stopped without an answer: {result.message}")
        values: NDArray[np.float64] = result.x
        return values

    def _levels(self, values: NDArray[np.float64]) -> tuple[int, ...]:
        levels = []
        for position in self._positions:
            first = self._columns[position, 0]
            levels.append(int(np.argmax(values[first : first + self._num_levels(position)])))
        return tuple(levels)

    def _num_levels(self, position: int) -> int:
        return len(self._stages[0].costs.segments[position].levels)


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
