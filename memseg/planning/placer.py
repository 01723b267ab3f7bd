"""Finds the best placement of one kind: where to cut, in which order the columns come, which level each segment gets.

How long a stage is, is the slowest of its column, each card with the fastest recompute levels that fit it: a
mixed-integer program. `memseg.planning.path` asks for better and better answers only where it must know:

    1  the fastest level of each segment, whether or not it fits       (a sum)
    2  exact if that fits; impossible if a lower bound of the peak does not; else the program with fractions of levels
    3  exact: the program
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from memseg.levels import NormMode, Schedule, Strategy
from memseg.planning.costs import ModelCosts
from memseg.planning.memory import Flow, Stage
from memseg.planning.outside import outside_bytes
from memseg.planning.path import Leg, Lengths, Matrix, PathProblem, best_path
from memseg.planning.solver import Choice, ColumnSolver
from memseg.planning.strategies import (
    NETWORK_BYTES_PER_SECOND,
    Aim,
    Column,
    Member,
    Pipeline,
    PlacedStage,
    Placement,
    Slot,
    crossing_bytes,
    link,
    ring_seconds,
)
from memseg.planning.workload import Workload


class Placer:
    """Places one workload; remembers every stage it has solved.

    Args:
        workload: What is to be trained.
        network: Bytes per second between machines.
        starts: Positions of the first segment of each stage of a split but the first, where the user decides that.
    """

    def __init__(
        self, workload: Workload, *, network: float = NETWORK_BYTES_PER_SECOND, starts: Sequence[int] = ()
    ) -> None:
        self.workload, self.network, self.starts = workload, network, tuple(starts)
        self.num_segments = len(workload.whole.segments)
        self.solver = cache(self._new_solver)
        self.stage = cache(self._new_stage)

    def single(self, slot: Slot, aim: Aim) -> Placement | None:
        """Everything on one card."""
        return self._place(Strategy.SINGLE, [(Member(slot, self.workload.batch),)], Pipeline(), aim)

    def split(
        self, slots: Sequence[Slot], pipeline: Pipeline, aim: Aim, *, fewest: int = 2, limit: float = math.inf
    ) -> Placement | None:
        """Segments over at least so many cards, the best choice of them in the best order.

        None also where there is none better than `limit`: seconds of a step, or what else the aim counts.
        """
        columns = [(Member(slot, self.workload.batch),) for slot in slots]
        return self._place(Strategy.SPLIT, columns, pipeline, aim, fewest=fewest, limit=limit)

    def replicate(self, members: Sequence[Member], aim: Aim) -> Placement | None:
        """The whole model on each card."""
        return self._place(Strategy.REPLICATE, [tuple(members)], Pipeline(), aim)

    def replicate_split(
        self, columns: Sequence[Column], pipeline: Pipeline, aim: Aim, *, limit: float = math.inf
    ) -> Placement | None:
        """A stage on each column, in the best order; None also where there is none better than `limit`."""
        return self._place(Strategy.REPLICATE_SPLIT, columns, pipeline, aim, fewest=len(columns), limit=limit)

    def whole_model(self, members: Column, aim: Aim) -> float:
        """How long, full or short the worst of some replicas of the whole model is."""
        attempt = _Attempt(self, Strategy.REPLICATE, Pipeline(), aim)
        if any(attempt.costs(member.share) is None for member in members):
            return math.inf
        exact, length = False, 0.0
        while not exact:
            length, exact = attempt.refine(members, 0, self.num_segments - 1, 0)
        return length

    def _place(
        self,
        strategy: Strategy,
        columns: Sequence[Column],
        pipeline: Pipeline,
        aim: Aim,
        *,
        fewest: int = 1,
        limit: float = math.inf,
    ) -> Placement | None:
        attempt = _Attempt(self, strategy, pipeline, aim)
        most = min(len(columns), pipeline.micro_batches if pipeline.schedule is Schedule.ONE_F_ONE_B else len(columns))
        if strategy.splits and self.starts:
            fewest, most = max(fewest, len(self.starts) + 1), min(most, len(self.starts) + 1)
        shares = {member.share for column in columns for member in column}
        if fewest > most or any(attempt.costs(share) is None for share in shares):
            return None
        legs = best_path(
            PathProblem(
                self.num_segments,
                tuple(columns),
                attempt,
                attempt.between,
                fewest,
                most,
                worst=aim is not Aim.SPEED,
                repeats=pipeline.micro_batches - 1 if aim is Aim.SPEED else 0,
                limit=self._path_limit(columns, limit) if aim is Aim.SPEED else limit,
            )
        )
        return attempt.placement(legs) if legs else None

    def _path_limit(self, columns: Sequence[Column], limit: float) -> float:
        """Of one pass, where that of a step is known."""
        slots = [[member.slot for member in column] for column in columns]
        gradients = sum(segment.gradient_bytes for segment in self.workload.whole.segments)
        return (limit - ring_seconds(slots, gradients, self.network)) / self.workload.accumulation

    def _new_solver(self, images: tuple[int, ...], replicated: bool, first: int, last: int, flow: Flow) -> ColumnSolver:
        return ColumnSolver([self.stage(count, replicated, first, last, flow) for count in images])

    def _new_stage(self, images: int, replicated: bool, first: int, last: int, flow: Flow) -> Stage:
        costs = self.workload.part(images, replicated=replicated)
        assert costs is not None
        return Stage(costs, first, last, flow)


class _Attempt(Lengths[Column]):
    """One kind of placement, to one end: how long its stages are, and what a path of them is."""

    def __init__(self, placer: Placer, strategy: Strategy, pipeline: Pipeline, aim: Aim) -> None:
        self._placer, self._strategy, self._pipeline, self._aim = placer, strategy, pipeline, aim
        self._relaxed: set[tuple[Column, int, int, Flow]] = set()
        self._crossing = cache(self._crossing_bytes)
        # Synced norms speak in each forward and backward, rebuilt ones too.
        self._alike = strategy.replicates and placer.workload.norm is not NormMode.FROZEN

    def costs(self, share: int) -> ModelCosts | None:
        """Of one micro-batch of a share; None where the share cannot be cut so."""
        images, rest = divmod(share, self._pipeline.micro_batches)
        return None if rest else self._placer.workload.part(images, replicated=self._strategy.replicates)

    def bounds(self, machine: Column, after: int) -> Matrix:
        """Of every stage that the column may run."""
        tables = [self._member_bounds(member, after) for member in machine]
        table: Matrix = np.maximum.reduce(tables)
        size = self._placer.num_segments
        first, end = np.indices(table.shape)
        # The loss is taken where the last logits are made; no stage is nothing but the loss.
        allowed = (first < end) & ~((first == size - 1) & (size > 1))
        if self._strategy.splits and self._placer.starts:
            allowed &= np.isin(first, (0, *self._placer.starts)) & np.isin(end, (*self._placer.starts, size))
        return np.where(allowed, table, math.inf)

    def refine(self, machine: Column, first: int, last: int, after: int) -> tuple[float, bool]:
        """The longest of the column; exact when all are."""
        answers = [self._refine_group(group, first, last, after) for group in self._groups(machine)]
        return max(length for length, _ in answers), all(exact for _, exact in answers)

    def _groups(self, machine: Column) -> list[Column]:
        """Those that must rebuild alike."""
        return [machine] if self._alike else [(member,) for member in machine]

    def between(self, one: Column, other: Column) -> NDArray[np.float64]:
        """[cut] -> seconds there and back of one micro-batch; no part of what is not counted in seconds."""
        size = self._placer.num_segments
        if self._aim is not Aim.SPEED:
            return np.full(size + 1, -math.inf)
        seconds = [
            self._crossing(b.share) / link(a.slot, b.slot, self._placer.network)
            for a, b in zip(one, other, strict=True)
        ]
        slowest: NDArray[np.float64] = np.maximum.reduce(seconds)
        return slowest

    def placement(self, legs: Sequence[Leg[Column]]) -> Placement:
        """What the path stands for."""
        stages = self._stages(legs, 1.0 if self._aim is Aim.SPEED else 0.0)
        if self._aim is Aim.MEMORY:
            # What fills no card more than the fullest need not be rebuilt.
            stages = self._stages(legs, max(placed.fullness for placed in stages))
        workload = self._placer.workload
        return Placement(self._strategy, tuple(stages), self._pipeline, workload.accumulation, self._placer.network)

    def _stages(self, legs: Sequence[Leg[Column]], fullness: float) -> list[PlacedStage]:
        """Each with the fastest levels that leave its card no fuller than that, or else with the smallest."""
        rows: list[list[PlacedStage]] = [[] for _ in legs[0].machine]
        for number, leg in enumerate(legs):
            placed = [
                one for group in self._groups(leg.machine) for one in self._placed(group, leg, number, fullness)
            ]  # fmt: skip
            for replica, (row, one) in enumerate(zip(rows, placed, strict=True)):
                row.append(replace(one, replica=replica))
        return [one for row in rows for one in row]

    def _placed(self, group: Column, leg: Leg[Column], number: int, fullness: float) -> list[PlacedStage]:
        solver = self._solver(group, leg.first, leg.last, leg.after)
        cards, outside = [member.slot.card for member in group], self._outside_bytes(solver, group)
        rooms = [
            math.floor(fullness * card.available_bytes) - beside for card, beside in zip(cards, outside, strict=True)
        ]
        choice = solver.fastest(cards, rooms) or self._smallest(solver, group)
        return [
            PlacedStage(member.slot, 0, number, member.share, stage, choice.levels, peak, beside)
            for member, stage, peak, beside in zip(group, solver.stages, choice.peaks, outside, strict=True)
        ]

    def _solver(self, group: Column, first: int, last: int, after: int) -> ColumnSolver:
        keeps = self._strategy.replicates or self._placer.workload.accumulation > 1
        flow = self._pipeline.flow(after, keeps_gradients=keeps)
        images = tuple(member.share // self._pipeline.micro_batches for member in group)
        return self._placer.solver(images, self._strategy.replicates, first, last, flow)

    def _smallest(self, solver: ColumnSolver, group: Column) -> Choice:
        """The choice that is least short, or least full."""
        available = tuple(member.slot.card.available_bytes for member in group)
        outside = self._outside_bytes(solver, group)
        if self._aim is Aim.MEMORY:
            return solver.smallest(tuple(-beside for beside in outside), available)
        return solver.smallest(tuple(room - beside for room, beside in zip(available, outside, strict=True)))

    def _member_bounds(self, member: Member, after: int) -> Matrix:
        size = self._placer.num_segments
        if self._aim is Aim.SPEED:
            costs = self.costs(member.share)
            assert costs is not None
            seconds = [min(levels) for levels in costs.level_seconds(member.slot.card)]
            until = np.concatenate([[0.0], np.cumsum(seconds)])
            table: Matrix = until[None, :] - until[:, None]
            return table
        table = np.full((size + 1, size + 1), math.inf)
        for first in range(size):
            for last in range(first, size):
                solver = self._solver((member,), first, last, after)
                table[first, last + 1] = self._over(solver, solver.least_bytes, (member,))
        return table

    def _refine_group(self, group: Column, first: int, last: int, after: int) -> tuple[float, bool]:
        solver = self._solver(group, first, last, after)
        if self._aim is not Aim.SPEED:
            return self._over(solver, [peak.size for peak in self._smallest(solver, group).peaks], group), True
        cards, outside = [member.slot.card for member in group], self._outside_bytes(solver, group)
        rooms = [card.available_bytes - beside for card, beside in zip(cards, outside, strict=True)]
        unhurried = solver.unhurried(cards)
        if unhurried and unhurried.fits(rooms):
            return solver.seconds(cards, unhurried), True
        if any(least > room for least, room in zip(solver.least_bytes, rooms, strict=True)):
            return math.inf, True
        key = (group, first, last, solver.stages[0].flow)
        if key not in self._relaxed:
            self._relaxed.add(key)
            bound = solver.bound(cards, rooms)
            return bound, bound == math.inf
        choice = solver.fastest(cards, rooms)
        return (solver.seconds(cards, choice), True) if choice else (math.inf, True)

    def _outside_bytes(self, solver: ColumnSolver, group: Column) -> list[int]:
        """Beside the allocator, at most: whatever levels are chosen."""
        process = self._placer.workload.process
        if process is None:
            return [0] * len(group)
        return [
            outside_bytes(stage.segments, process).total if member.slot.card.kind == "cpu" else 0
            for member, stage in zip(group, solver.stages, strict=True)
        ]

    def _over(self, solver: ColumnSolver, peaks: Sequence[int], group: Column) -> float:
        """Bytes that are missing, or how full a card gets; the worst of the group."""
        over = []
        for member, peak, outside in zip(group, peaks, self._outside_bytes(solver, group), strict=True):
            card = member.slot.card
            needed = peak + outside
            over.append(needed - card.available_bytes if self._aim is Aim.CLOSEST else needed / card.available_bytes)
        return max(over)

    def _crossing_bytes(self, share: int) -> NDArray[np.float64]:
        costs = self.costs(share)
        assert costs is not None
        size = len(costs.segments)
        stages = [Stage(costs, cut, cut) for cut in range(size)]
        return np.array([*(float(crossing_bytes(stage.entering)) for stage in stages), math.inf])
