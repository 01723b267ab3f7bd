"""Runs that several files compare theirs with."""

import pytest

from memseg.levels import Recompute
from processes import hand_written_plan, streets, train

STEPS = 6


@pytest.fixture(scope="session")
def single_run(tmp_path_factory):
    """STEPS steps in float64 on one card, nothing rebuilt."""
    folder = tmp_path_factory.mktemp("single")
    return train(folder / "run", *streets(STEPS), "--plan", hand_written_plan(folder / "plan.json", 1))


@pytest.fixture(scope="session")
def split_run(tmp_path_factory):
    """The same on two cards, everything rebuilt."""
    folder = tmp_path_factory.mktemp("split")
    plan = hand_written_plan(folder / "plan.json", 2, recompute=Recompute.UNITS)
    return train(folder / "run", *streets(STEPS), "--plan", plan)
