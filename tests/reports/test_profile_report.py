"""What the report says of a profile must add up, and must be what the profile says."""

import csv
import io
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from memseg.models import build_model
from memseg.planning.cards import parse_cards
from memseg.profiling import foreign_job, named_optimizer, profile_step, trace_job
from memseg.profiling.alive import AliveTensor
from memseg.profiling.card_memory import card_memory
from memseg.profiling.timeline import Category, Phase
from memseg.reports.memory_curve import _columns, save_memory_curve
from memseg.reports.phases import phase_spans
from memseg.reports.profile import MODEL_ITSELF, MOST_ALIVE, ProfileReport, SortKey, profile_csv, profile_object
from memseg.reports.profile_view import fit_line, measured_line, profile_view
from memseg.units import format_bytes


def report_of(card, **options):
    build = partial(build_model, "ladder-densenet-mini")
    profile = profile_step(build, image=(128, 256), batch=1, device=card.kind)
    settings = {"image": "128x256", "batch": 1, "norm": "batch", "recompute": "none", "optimizer": "adam-fused"}
    return ProfileReport(profile, card, card_memory(profile, card), settings, **options)


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
    largest = report.rows(depth=None, sort=SortKey.PEAK)[0]
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
        "does not fit cpu:8GiB: 1.00 GiB too much; it has 7.80 GiB to fill (8.00 GiB - 0.20 GiB reserve)"
    )


def test_the_drawn_curve_reaches_the_peak_and_starts_with_the_step(report, tmp_path):
    timeline = report.timeline
    phases = phase_spans(timeline)
    assert [one.phase for one in phases][:2] == [Phase.FORWARD, Phase.BACKWARD]
    instants, stack = _columns(timeline, phases[0].start, phases[-1].end)
    assert stack.sum(axis=0).max() == timeline.peak_allocated_bytes
    assert len(instants) < timeline.instants
    # All step long: parameters, optimizer state and the batch.
    assert sum(layer.min() > 0 for layer in stack) == 3
    save_memory_curve(report, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1600, 800))


# A step small enough to know.


class Net(nn.Module):
    """A layer, something of the model's own, and a layer."""

    def __init__(self, side):
        super().__init__()
        self.first, self.last = nn.Linear(16, side), nn.Linear(side, 4)

    def forward(self, images):
        return self.last(torch.tanh(self.first(images)))


def small(side=32, *, card="cpu", optimizer="adam", settings=None, **options):
    where = parse_cards(card)[0]
    make = partial(
        foreign_job, partial(Net, side), torch.ones(64, 16), optimizer=named_optimizer(optimizer), name="net"
    )
    profile = trace_job(make, device=where.kind)
    return ProfileReport(profile, where, card_memory(profile, where), settings or {}, **options)


def test_what_the_model_computes_itself_has_a_line_of_its_own():
    rows = {row.name: row for row in small().rows()}
    assert list(rows) == [MODEL_ITSELF, "first", "last", "loss"]
    assert rows[MODEL_ITSELF].saved_bytes == 64 * 32 * 4
    assert rows["first"].parameter_bytes == (16 * 32 + 32) * 4
    assert rows["first"].flops == 2 * 2 * 64 * 16 * 32


def test_the_timeline_is_that_of_the_step_that_needs_most():
    found = small()
    assert found.timeline is found.profile.timeline
    assert not found.is_first_step
    swapped = replace(
        found, profile=replace(found.profile, timeline=found.profile.first_timeline, first_timeline=found.timeline)
    )
    assert swapped.is_first_step
    assert swapped.timeline is found.timeline
    assert "first step" in swapped.peak_moment


def test_a_step_of_its_own_kind_is_told_in_one_line():
    report = small(settings={"inputs": ["float32 64x16", "int64 64"], "optimizer": "sgd", "loss": "mean"})
    assert report.headline() == "net, float32 64x16, int64 64, optimizer sgd, loss mean, float32"
    levels = {"image": "64x128", "norm": "frozen", "recompute": {"a": "units", "b": "none", "c": "units"}}
    assert small(settings=levels).headline() == "net, 64x128, frozen norm, recompute units (2), none (1), float32"


def test_the_object_has_every_figure_and_adds_up():
    report = small(settings={"optimizer": "adam"}, card="v100")
    found = profile_object(report, report.rows())
    memory = report.memory
    assert (found["model"], found["optimizer"], found["precision"]) == ("net", "adam", "float32")
    assert (found["device"], found["card"]) == ("cuda", "v100")
    assert found["peak_allocated_bytes"] == memory.peak_allocated_bytes
    assert found["peak_reserved_bytes"] == memory.peak_reserved_bytes
    assert found["device_total_bytes"] == memory.device_total_bytes
    tensors = found["peak_tensor_bytes"]
    assert tensors == max(found["first_step_peak_bytes"], found["steady_step_peak_bytes"])
    assert sum(found["by_category"].values()) == sum(one["size_bytes"] for one in found["alive_at_peak"]) == tensors
    assert [layer["name"] for layer in found["layers"]] == [row.name for row in report.rows()]
    beyond = found["beyond_tensors"]
    assert beyond["reserved_but_not_allocated_bytes"] == memory.unallocated_bytes
    assert sum(term["size_bytes"] for term in beyond["terms"] if not term["in_allocator"]) == (
        memory.device_total_bytes - memory.peak_reserved_bytes
    )
    assert "measured_peak_allocated_bytes" not in found
    assert json.loads(json.dumps(found)) == found


def test_on_the_cpu_the_object_has_no_reserved_memory():
    found = profile_object(small(measured_bytes=123), [])
    assert (found["peak_reserved_bytes"], found["device_total_bytes"]) == (None, None)
    assert "beyond_tensors" not in found
    assert found["measured_peak_allocated_bytes"] == 123


def test_an_alive_tensor_is_told_to_programs_with_all_that_is_known_of_it():
    (found,) = (
        one
        for one in profile_object(small(), [])["alive_at_peak"]
        if one["operation"] == "aten.tanh" and one["category"] == Category.SAVED
    )
    assert found == {
        "size_bytes": 64 * 32 * 4,
        "category": "saved activation",
        "made_by": "",
        "operation": "aten.tanh",
        "shape": [64, 32],
        "dtype": "float32",
        "waits_for": {"phase": "backward", "layer": ""},
        "removed_by": None,
    }


def test_of_thousands_of_alive_tensors_programs_get_the_largest(report):
    many = replace(report)
    one = AliveTensor(8, Category.SAVED, "", "", (2,), "float32", None, None)
    many.__dict__["alive"] = [one] * (MOST_ALIVE + 1)
    assert len(profile_object(many, [])["alive_at_peak"]) == MOST_ALIVE


def test_the_table_for_programs_has_every_row_unrounded():
    rows = small().rows()
    (header, *lines) = csv.reader(profile_csv(rows).splitlines())
    assert header[:3] == ["name", "saved_bytes", "peak_bytes"]
    assert [line[0] for line in lines] == [row.name for row in rows]
    assert [float(line[header.index("forward_s")]) for line in lines] == [row.forward_s for row in rows]


def test_the_terminal_shows_the_three_figures_of_a_cuda_card_and_one_of_the_cpu():
    on_card, on_cpu = (shown(small(card=card), 200) for card in ("v100", "cpu"))
    assert "reserved by the allocator" in on_card
    assert "on the device with CUDA context" in on_card
    assert "reserved by the allocator" not in on_cpu
    for text in (on_card, on_cpu):
        assert "alive at the peak" in text
        assert "first step, without optimizer state until its end: " in text


def test_all_that_is_alive_is_shown_or_counted_with_the_others():
    report = small()
    lines = shown(report, 200).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("alive at the peak"))
    end = next(index for index, line in enumerate(lines) if " others " in line)
    alone = [one for one in report.alive if one.category is not Category.PARAMETER][:10]
    assert end - start - 1 == len(alone)
    assert lines[end].startswith(f"{len(report.alive) - len(alone)} others")
    assert (
        format_bytes(sum(one.size_bytes for one in report.alive) - sum(one.size_bytes for one in alone)) in lines[end]
    )


@pytest.mark.parametrize(("predicted", "told"), [(102, "+2.0 %"), (98, "-2.0 %"), (100, "+0.0 %"), (99.99, "+0.0 %")])
def test_a_measurement_is_told_with_the_error_of_the_prediction(predicted, told):
    assert measured_line(int(predicted * 2**20), 100 * 2**20).endswith(f"the prediction is off by {told}")


def test_layers_with_brackets_in_their_names_are_shown_as_they_are():
    class Marked(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("[bold]", nn.Linear(16, 4))

        def forward(self, images):
            return self._modules["[bold]"](images)

    profile = trace_job(partial(foreign_job, Marked, torch.ones(64, 16), optimizer=None, name="[red]net[/red]"))
    card = parse_cards("cpu")[0]
    text = shown(ProfileReport(profile, card, card_memory(profile, card)), 200)
    assert "[bold]" in text
    assert text.startswith("[red]net[/red], ")
