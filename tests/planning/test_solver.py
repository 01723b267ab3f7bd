import itertools
import os
import random

import pytest

from memseg.planning import Card, Stage
from memseg.planning.solver import StageSolver, _standard_output_held

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
    solver = StageSolver(stage)
    assert solver.smallest.peak.size == min(peaks.values())
    assert solver.least_bytes <= min(peaks.values())
    for available in (min(peaks.values()) - 1, *generator.choices(sorted(peaks.values()), k=3), max(peaks.values())):
        on = card(available)
        fitting = [seconds_of(stage, on, levels) for levels, peak in peaks.items() if peak <= available]
        found = solver.fastest(on, available)
        bound = solver.bound(on, available)
        assert (found is None) == (not fitting)
        if found:
            assert found.peak.size <= available
            assert found.peak.size == peaks[found.levels]
            assert seconds_of(stage, on, found.levels) == pytest.approx(min(fitting))
            assert bound <= min(fitting)
            assert solver.seconds(on, found) == pytest.approx(seconds_of(stage, on, found.levels))


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
            found = StageSolver(stage).fastest(on, available)
            assert (found is None) == (not fitting)
            if found:
                assert found.peak.size <= available
                best = min(seconds_of(stage, on, levels) for levels in fitting)
                assert seconds_of(stage, on, found.levels) == pytest.approx(best)


def test_what_the_solver_prints_does_not_reach_standard_output(capfd: pytest.CaptureFixture[str]):
    # HiGHS in SciPy 1.17 prints "transformNewIntegerFeasibleSolution" past sys.stdout; `--json` must stay JSON.
    with _standard_output_held():
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution\n")
    os.write(1, b"{}")
    assert capfd.readouterr().out == "{}"
