"""What the report says of a profile must add up, and must be what the profile says."""

import io
from functools import partial

import pytest
from PIL import Image
from rich.console import Console

from memseg.levels import NormMode, Recompute
from memseg.models import build_model
from memseg.planning.cards import parse_cards
from memseg.profiling import profile_step
from memseg.profiling.timeline import Category, Phase
from memseg.reports.memory_curve import _columns, _phases, save_memory_curve
from memseg.reports.profile import ProfileReport, SortKey, fit_line, profile_view
from memseg.units import format_bytes


def report_of(card, **options):
    build = partial(build_model, "ladder-densenet-mini")
    profile = profile_step(build, image=(128, 256), batch=1, device=card.kind)
    return ProfileReport(profile, card, NormMode.BATCH, Recompute.NONE, **options)


@pytest.fixture(scope="module")
def report():
    return report_of(parse_cards("cpu:8GiB")[0], judge_fit=True)


def shown(report, width):
    text = io.StringIO()
    Console(file=text, width=width).print(profile_view(report, report.rows()))
    return text.getvalue()


@pytest.mark.parametrize("depth", [1, 2])
def test_layers_add_up_to_the_model_at_every_depth(report, depth):
    rows = report.rows(depth=depth)
    alive_between = report.timeline.by_category(report.timeline.backward_start - 1)
    assert sum(row.parameter_bytes for row in rows) == alive_between[Category.PARAMETER]
    assert sum(row.saved_bytes for row in rows) == alive_between[Category.SAVED]
    assert max(row.peak_bytes for row in rows) == report.timeline.peak_allocated_bytes
    assert sum(row.forward_s + row.backward_s for row in rows) == pytest.approx(report.step_s, rel=0.05)


@pytest.mark.parametrize(
    ("sort", "value"),
    [
        (SortKey.PEAK, lambda row: row.peak_bytes),
        (SortKey.SAVED, lambda row: row.saved_bytes),
        (SortKey.PARAMETERS, lambda row: row.parameter_bytes),
        (SortKey.TIME, lambda row: row.forward_s + row.backward_s),
    ],
)
def test_sorted_layers_are_the_same_layers_largest_first(report, sort, value):
    rows, values = report.rows(sort=sort), [value(row) for row in report.rows(sort=sort)]
    assert values == sorted(values, reverse=True)
    assert set(rows) == set(report.rows())


def test_a_layer_that_holds_the_peak_is_named_as_its_moment(report):
    phase, layer = report.timeline.peak_moment
    assert report.peak_moment == f"{phase} of {layer}"
    largest = report.rows(depth=3, sort=SortKey.PEAK)[0]
    assert (largest.name, largest.peak_bytes) == (layer, report.timeline.peak_allocated_bytes)


@pytest.mark.parametrize("width", [80, 160])
def test_no_number_is_cut_off_where_the_screen_is_narrow(report, width):
    lines = shown(report, width).splitlines()
    for row in report.rows():
        (line,) = (line for line in lines if line.startswith(f"{row.name} "))
        assert f" {format_bytes(row.saved_bytes)} " in line
        assert f" {format_bytes(row.peak_bytes)} " in line
        assert "%" in line


def test_a_faster_card_takes_less_time_and_the_text_says_whose_rates_they_are(report):
    faster = report_of(parse_cards("gtx1070")[0])
    assert faster.step_s < report.step_s
    assert "estimates from the rates that memseg cards gtx1070 shows" in shown(faster, 160)
    assert "gtx1070 with" not in shown(faster, 160)


def test_what_does_not_fit_says_by_how_much():
    card = parse_cards("cpu:8GiB")[0]
    assert fit_line(card.available_bytes, card).startswith("fits cpu:8GiB with 0 B to spare")
    assert fit_line(card.available_bytes + 2**30, card) == (
        "does not fit cpu:8GiB: 1.00 GiB too much; it has 7.50 GiB to fill (8.00 GiB - 0.50 GiB reserve)"
    )


def test_the_drawn_curve_reaches_the_peak_and_starts_with_the_step(report, tmp_path):
    timeline = report.timeline
    phases = _phases(timeline)
    assert [phase for phase, _, _ in phases][:2] == [Phase.FORWARD, Phase.BACKWARD]
    instants, stack = _columns(timeline, phases[0][1], phases[-1][2])
    assert stack.sum(axis=0).max() == timeline.peak_allocated_bytes
    assert len(instants) < timeline.instants
    # All step long: parameters, optimizer state and the batch.
    assert stack[:3].min() > 0
    save_memory_curve(report, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1600, 800))
