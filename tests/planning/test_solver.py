import itertools
import os
import random
from dataclasses import replace

import pytest

from memseg.planning import Card, ModelCosts, Stage, Work
from memseg.planning.solver import ColumnSolver, _standard_output_held

from .cases import card, random_model


def all_choices(stage: Stage) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(s.levels)) for s in stage.segments)))


def seconds_of(stage: Stage, on: Card, levels: tuple[int, ...]) -> float:
    return on.seconds(stage.work_of(levels))


@pytest.mark.parametrize("seed", range(60))
def test_levels_are_the_fastest_that_fit_and_the_smallest_there_are(seed: int):
    # Against all choices, on cards from hopeless to roomy, with exactly full ones among them.
    generator = random.Random(seed)
    costs = random_model(generator, num_segments=generator.randint(2, 5), num_levels=4)
    first, last = sorted(generator.choices(range(len(costs.segments)), k=2))
    stage = Stage(costs, first, last)
    peaks = {levels: stage.peak_of(levels).size for levels in all_choices(stage)}
    solver = ColumnSolver([stage])
    assert solver.smallest((0,)).peaks[0].size == min(peaks.values())
    assert solver.least_bytes[0] <= min(peaks.values())
    for available in (min(peaks.values()) - 1, *generator.choices(sorted(peaks.values()), k=3), max(peaks.values())):
        on = card(available)
        fitting = [seconds_of(stage, on, levels) for levels, peak in peaks.items() if peak <= available]
        found = solver.fastest([on], [available])
        bound = solver.bound([on], [available])
        assert (found is None) == (not fitting)
        if found:
            assert found.peaks[0].size <= available
            assert found.peaks[0].size == peaks[found.levels]
            assert seconds_of(stage, on, found.levels) == pytest.approx(min(fitting))
            assert bound <= min(fitting)
            assert solver.seconds([on], found) == pytest.approx(seconds_of(stage, on, found.levels))


def test_one_byte_decides_even_among_gigabytes():
    # The solver's own tolerance is thousands of bytes here; what it returns is added up again exactly.
    generator = random.Random(1)
    costs = random_model(generator, num_segments=5, num_levels=4, largest=2**33)
    stage = Stage(costs, 0, 4)
    peaks = sorted(stage.peak_of(levels).size for levels in all_choices(stage))
    for peak in peaks[:: len(peaks) // 8]:
        for available in (peak - 1, peak):
            on = card(available)
            fitting = [levels for levels in all_choices(stage) if stage.peak_of(levels).size <= available]
            found = ColumnSolver([stage]).fastest([on], [available])
            assert (found is None) == (not fitting)
            if found:
                assert found.peaks[0].size <= available
                best = min(seconds_of(stage, on, levels) for levels in fitting)
                assert seconds_of(stage, on, found.levels) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(60))
def test_cards_that_must_rebuild_alike_get_the_levels_that_are_best_for_all(seed: int):
    generator = random.Random(seed)
    costs = random_model(generator, num_segments=generator.randint(2, 5), num_levels=3)
    other = resized(costs, generator)
    stages = [Stage(one, 0, len(costs.segments) - 1) for one in (costs, other)]
    solver = ColumnSolver(stages)
    peaks = {levels: [stage.peak_of(levels).size for stage in stages] for levels in all_choices(stages[0])}
    for _ in range(4):
        rooms = [generator.choice(list(peaks.values()))[number] for number in range(2)]
        cards = [card(room, f"c{number}", flops=generator.choice([1.0, 2.0])) for number, room in enumerate(rooms)]
        times = {
            levels: max(seconds_of(stage, on, levels) for stage, on in zip(stages, cards, strict=True))
            for levels in peaks
        }
        fitting = [
            times[levels]
            for levels, sizes in peaks.items()
            if all(size <= room for size, room in zip(sizes, rooms, strict=True))
        ]
        found, bound = solver.fastest(cards, rooms), solver.bound(cards, rooms)
        assert (found is None) == (not fitting)
        over = min(max(size - room for size, room in zip(sizes, rooms, strict=True)) for sizes in peaks.values())
        least = solver.smallest(tuple(rooms))
        assert max(peak.size - room for peak, room in zip(least.peaks, rooms, strict=True)) == over
        if found:
            assert found.fits(rooms)
            assert solver.seconds(cards, found) == pytest.approx(min(fitting))
            assert bound <= min(fitting)


def resized(costs: ModelCosts, generator: random.Random) -> ModelCosts:
    """The same segments and levels with other sizes and times, as for another share."""
    factor = generator.choice([2, 3])
    segments = [
        replace(
            one,
            output_bytes=one.output_bytes * factor,
            levels=tuple(
                replace(
                    level,
                    saved_bytes=level.saved_bytes * factor,
                    forward=Work(generator.randint(1, 30), 0),
                    backward=Work(generator.randint(1, 60), 0),
                )
                for level in one.levels
            ),
        )
        for one in costs.segments
    ]
    return replace(costs, segments=tuple(segments))


def test_what_the_solver_prints_does_not_reach_standard_output(capfd: pytest.CaptureFixture[str]):
    # HiGHS in SciPy 1.17 prints "transformNewIntegerFeasibleSolution" past sys.stdout; `--json` must stay JSON.
    with _standard_output_held():
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution\n")
    os.write(1, b"{}")
    assert capfd.readouterr().out == "{}"
