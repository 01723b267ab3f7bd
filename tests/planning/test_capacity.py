import math
import random

import pytest

from memseg.planning.capacity import largest_fitting


def counted(over):
    """The same function, and what it was asked."""
    asked = []

    def ask(number):
        asked.append(number)
        return over(number)

    return ask, asked


@pytest.mark.parametrize("seed", range(50))
def test_the_largest_that_fits_is_found(seed: int):
    generator = random.Random(seed)
    most, end = 5000, generator.randint(0, 5200)
    steep, bent = generator.uniform(0.1, 100), generator.choice([1.0, 1.5, 2.0])
    found = largest_fitting(lambda number: steep * ((number / (end + 0.5)) ** bent - 1), most)
    assert found == (min(end, most) or None)


@pytest.mark.parametrize(
    "over",
    [
        lambda number: -1.0 if number <= 3000 else 1e12,
        lambda number: -1e12 if number <= 2100 else 1.0,
        lambda number: -math.inf if number <= 1234 else math.inf,
    ],
)
def test_a_jump_takes_few_more_questions_than_halving(over):
    ask, asked = counted(over)
    found = largest_fitting(ask, 4096)
    assert over(found) <= 0 < over(found + 1)
    assert len(set(asked)) <= 2 + 12 + 2 * 12


def test_a_straight_line_takes_a_handful():
    ask, asked = counted(lambda number: 3e6 * number - 1e9)
    assert largest_fitting(ask, 4096) == 333
    assert len(set(asked)) <= 8


def test_the_search_begins_where_it_is_told():
    assert largest_fitting(lambda number: number - 10, 100, least=4) == 10
    assert largest_fitting(lambda number: number - 10, 100, least=11) is None
