"""The panel of a run says what is known, and no more."""

import io
from dataclasses import replace

from rich.console import Console

from memseg.reports.dashboard import CardState, RunState, dashboard
from memseg.reports.loss_curve import Curve, curve_lines

MIB = 2**20
BEGINNING = RunState(
    title="mine",
    step=0,
    total_steps=45,
    steps_per_epoch=10,
    cards=(CardState("cpu:8GiB", 500 * MIB, 1000 * MIB), CardState("cpu:12GiB", 250 * MIB, 1000 * MIB)),
)
MIDDLE = replace(
    BEGINNING,
    step=23,
    losses=(2.5, 1.5, 0.75),
    loss=0.7654321,
    lr=3e-4,
    images_per_second=12.3456,
    seconds_left=83.4,
    miou=0.4125,
    best_miou=0.5,
    best_step=10,
    cards=(replace(BEGINNING.cards[0], measured_bytes=499 * MIB), BEGINNING.cards[1]),
)


def drawn(state, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(dashboard(state))
    return console.export_text()


def line_with(text, state):
    (line,) = [line for line in drawn(state).splitlines() if text in line]
    return line


def test_it_tells_how_far_the_run_is_and_what_it_learns():
    text = drawn(MIDDLE)
    for part in ("memseg train: mine", "step 23 of 45", "epoch 3 of 5", "0:01:23 left", "0.7654", "3.00e-04", "12.3"):
        assert part in text
    assert "41.25%" in line_with("val mIoU", MIDDLE)
    assert "50.00%" in line_with("best", MIDDLE)
    assert "at step 10" in line_with("best", MIDDLE)
    assert "gradient norm" not in text
    assert "patience" not in text


def test_what_only_some_runs_have_is_shown_where_it_is():
    state = replace(MIDDLE, grad_norm=1.25, patience_left=2, evaluating=(3, 20))
    assert "1.25" in line_with("gradient norm", state)
    assert "2 evaluations" in line_with("patience", state)
    assert "3 of 20" in line_with("validation", state)
    assert "epoch" not in drawn(state)


def test_measured_memory_stands_beside_what_was_planned_and_what_there_is():
    measured, waiting = line_with("cpu:8GiB", MIDDLE), line_with("cpu:12GiB", MIDDLE)
    assert measured.split()[-7:-1] == ["0.49", "GiB", "0.49", "GiB", "0.98", "GiB"]
    assert f" {'█' * 14}│{'░' * 13} " in measured
    assert "measuring" in waiting
    assert f" {'░' * 7}│{'░' * 20} " in waiting


def test_a_peak_beyond_the_plan_covers_the_line_that_marks_it():
    over = replace(MIDDLE.cards[0], measured_bytes=700 * MIB)
    bar = line_with("cpu:8GiB", replace(MIDDLE, cards=(over,)))
    assert "█" * 14 + "│" + "█" * 5 in bar


def test_the_panel_of_a_run_that_has_not_begun_or_is_over_can_be_drawn():
    assert "step 0 of 45" in drawn(BEGINNING)
    over = replace(MIDDLE, step=45, seconds_left=None)
    assert "epoch 5 of 5" in drawn(over)
    assert "left" not in drawn(over)


def test_eighty_columns_are_enough():
    widest = replace(MIDDLE, grad_norm=123.4, patience_left=2, evaluating=(300, 500), losses=tuple(range(300)))
    assert max(map(len, drawn(widest, width=200).splitlines())) <= 80


def test_a_curve_falls_from_the_top_left_to_the_bottom_right():
    lines = curve_lines([float(value) for value in range(100, 0, -1)], width=10, height=3)
    assert [len(line) for line in lines] == sorted(len(line) for line in lines)
    assert lines[0].startswith("█")
    assert len(lines[-1]) == 10
    assert curve_lines([1.0, 1.0], width=10, height=2) == ["", "▁▁"]


def test_a_curve_keeps_few_means_of_any_number_of_values():
    curve = Curve()
    for value in range(10_001):
        curve.add(float(value))
    means = curve.means
    assert len(means) <= 256
    assert list(means) == sorted(means)
    assert means[0] < 64
    assert means[-1] > 9_900
