"""Which evaluation was the best, and when a run that learns nothing more ends."""

from memseg.training.standing import Standing


def standing(*scores):
    found = Standing()
    for number, score in enumerate(scores, start=1):
        found = found.after(10 * number, score)
    return found


def test_the_best_is_the_highest_and_of_equal_ones_the_first():
    assert standing(0.2, 0.5, 0.5, 0.4) == Standing(20, 0.5, 2)


def test_a_run_ends_after_so_many_evaluations_without_a_better_one():
    assert not standing(0.5, 0.4).ends(2)
    assert standing(0.5, 0.4, 0.5).ends(2)
    assert not standing(0.5, 0.4, 0.6).ends(2)
    assert not standing(0.5, *[0.1] * 100).ends(0)


def test_an_evaluation_without_a_score_is_no_better_one():
    assert standing(0.5, None) == Standing(10, 0.5, 1)
    assert standing(float("nan")).best_step is None


def test_a_resumed_run_reads_it_off_its_log_up_to_where_it_goes_on():
    records = [
        {"step": 1, "loss": 2.0},
        {"step": 10, "miou": 0.3},
        {"step": 20, "miou": None},
        {"step": 30, "miou": 0.9},
    ]
    assert Standing.of(records, until=20) == Standing(10, 0.3, 1)
    assert Standing.of(records, until=30) == Standing(30, 0.9, 0)
    assert Standing.of([], until=0) == Standing()
