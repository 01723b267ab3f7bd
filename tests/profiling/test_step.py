"""The predicted peak of a training step is what the allocator hands out in a real one."""

from functools import partial

import pytest
import torch
from torch import nn

from memseg.errors import InputError, UnknownNameError
from memseg.levels import NormMode, Recompute
from memseg.models import build_model
from memseg.profiling import (
    UntraceableError,
    foreign_job,
    measure_job,
    measure_step,
    named_optimizer,
    profile_step,
    trace_job,
    watch_allocator,
)
from memseg.profiling.jobs.job import LOSS
from memseg.profiling.timeline import Category, Phase

MINI = "ladder-densenet-mini"
IMAGE, BATCH = (128, 256), 2


@pytest.fixture(scope="module")
def profile():
    """Of the plain network, whose optimizer is Adam in one kernel."""
    return profile_step(partial(build_model, MINI), image=IMAGE, batch=BATCH)


@pytest.mark.parametrize("norm", NormMode)
@pytest.mark.parametrize("level", Recompute)
def test_the_predicted_peak_is_the_measured_one(level, norm):
    build = partial(build_model, MINI, norm=norm)
    predicted = profile_step(build, image=IMAGE, batch=BATCH, recompute=level).timeline.peak_allocated_bytes
    measured = measure_step(build, image=IMAGE, batch=BATCH, recompute=level)
    # Each of the five blocks and the context, rebuilt whole, keeps the state of random numbers: fake tensors have none.
    if level is Recompute.SEGMENT:
        predicted += 6 * torch.get_rng_state().nbytes
    assert abs(predicted - measured) <= 256


def test_levels_may_differ_by_segment():
    levels = {
        "stem": Recompute.NORMS,
        "block1": Recompute.SEGMENT,
        "block2": Recompute.UNITS,
        "blend1": Recompute.UNITS,
    }
    step = {"image": IMAGE, "batch": BATCH, "recompute": levels}
    predicted = profile_step(partial(build_model, MINI), **step).timeline.peak_allocated_bytes
    assert predicted == pytest.approx(measure_step(partial(build_model, MINI), **step), rel=0.03)


def test_categories_add_up_to_the_peak(profile):
    by_category = profile.timeline.by_category()
    assert set(by_category) == set(Category)
    assert sum(by_category.values()) == profile.timeline.peak_allocated_bytes


def test_parameters_optimizer_state_and_the_batch_are_exact(profile):
    model = build_model(MINI)
    parameters = [*model.parameters()]
    numbers = sum(parameter.numel() for parameter in parameters)
    found = profile.timeline.by_category()
    assert found[Category.PARAMETER] == 4 * numbers + sum(buffer.nbytes for buffer in model.buffers())
    # Adam's two moments, and for each parameter its count of steps, one float32.
    assert found[Category.OPTIMIZER_STATE] == 2 * 4 * numbers + 4 * len(parameters)
    assert found[Category.INPUT] == BATCH * 128 * 256 * (3 * 4 + 1)
    # At the end of the step every parameter has its gradient.
    last = profile.timeline.by_category(profile.timeline.instants - 1)
    assert last[Category.GRADIENT] == 4 * numbers


def test_frozen_norms_have_neither_gradients_nor_optimizer_state():
    build = partial(build_model, MINI, norm=NormMode.FROZEN)
    timeline = profile_step(build, image=IMAGE, batch=BATCH).timeline
    trained = [parameter.numel() for parameter in build().parameters() if parameter.requires_grad]
    assert timeline.by_category(timeline.instants - 1)[Category.GRADIENT] == 4 * sum(trained)
    assert timeline.by_category()[Category.OPTIMIZER_STATE] == 2 * 4 * sum(trained) + 4 * len(trained)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_layers_add_up_to_the_parameters(profile, depth):
    model = build_model(MINI)
    numbers = [*model.parameters(), *model.buffers()]
    rows = [layer.row for layer in profile.layers(depth)]
    assert sum(row.parameter_bytes for row in rows) == sum(number.nbytes for number in numbers)
    assert len({row.name for row in rows}) == len(rows)


def test_the_table_has_a_line_for_each_segment_and_the_loss(profile):
    layers = {layer.row.name: layer for layer in profile.layers()}
    assert list(layers) == [*build_model(MINI).segments, LOSS]
    # The plain stem keeps two maps at half the images' side (BN's input, and its output rectified in place), the
    # pooled one, int64 positions of its maxima, and mean and deviation.
    at_half, at_quarter, channels = 64 * 128, 32 * 64, 32
    stem = BATCH * channels * (2 * 4 * at_half + (4 + 8) * at_quarter) + 2 * 4 * channels
    assert layers["stem"].row.saved_bytes == stem
    assert layers["stem"].forward.flops == 2 * BATCH * at_half * channels * 3 * 7 * 7
    assert max(layer.row.peak_bytes for layer in layers.values()) == profile.timeline.peak_allocated_bytes


def test_saved_bytes_of_all_layers_are_what_is_alive_when_backward_begins(profile):
    timeline = profile.timeline
    alive = timeline.by_category(timeline.backward_start - 1)[Category.SAVED]
    assert sum(layer.row.saved_bytes for layer in profile.layers()) == alive


def test_memory_at_the_end_of_a_step_is_that_of_its_beginning_and_the_gradients(profile):
    timeline = profile.timeline
    at_end = {category for category, size in timeline.by_category(timeline.instants - 1).items() if size}
    fixed = {Category.PARAMETER, Category.OPTIMIZER_STATE, Category.INPUT, Category.GRADIENT}
    # The loss itself, 4 bytes, is still the caller's.
    assert at_end - {Category.SAVED, Category.TEMPORARY} == fixed


def test_the_first_step_runs_without_the_optimizers_state(profile):
    first, steady = profile.first_timeline, profile.timeline
    assert first.by_category(first.backward_start)[Category.OPTIMIZER_STATE] == 0
    assert profile.peak_allocated_bytes == max(first.peak_allocated_bytes, steady.peak_allocated_bytes)
    # Forward and backward are the same, above what is there before them.
    state = steady.by_category()[Category.OPTIMIZER_STATE]
    assert steady.curve[steady.backward_start] - first.curve[first.backward_start] == state
    last = first.by_category(first.instants - 1)
    assert last[Category.OPTIMIZER_STATE] == state
    assert last[Category.GRADIENT] == steady.by_category(steady.instants - 1)[Category.GRADIENT]


def test_the_batch_is_told_in_words(profile):
    assert profile.inputs == ("float32 2x3x128x256", "uint8 2x128x256")
    assert (profile.model, profile.device, profile.accumulation) == (MINI, "cpu", 1)


def test_a_network_of_ours_is_exact_where_gradients_add_up():
    step = {
        "image": (64, 128),
        "batch": BATCH,
        "accumulation": 2,
        "optimizer": named_optimizer("momentum"),
        "recompute": Recompute.UNITS,
    }
    predicted = profile_step(partial(build_model, MINI), **step).peak_allocated_bytes
    assert abs(predicted - measure_step(partial(build_model, MINI), **step)) <= 256


def test_a_network_of_ours_is_exact_where_its_deepest_map_is_one_pixel():
    step = {"image": (64, 64), "batch": 8, "recompute": Recompute.NONE}
    predicted = profile_step(partial(build_model, MINI), **step).peak_allocated_bytes
    assert abs(predicted - measure_step(partial(build_model, MINI), **step)) <= 256


class ReadOften(nn.Module):
    """A map that several thin layers read: its gradient is a sum, and the peak lies where it is taken."""

    def __init__(self, readers, held):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.readers = nn.ModuleList(nn.Conv2d(32, 4, 1) for _ in range(readers))
        self.last = nn.Conv2d(4 * readers, 5, 1)
        self.held = held

    def forward(self, images):
        maps = self.stem(images)
        if self.held:
            maps.retain_grad()
        return self.last(torch.cat([reader(maps) for reader in self.readers], 1))


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("readers", [2, 3, 6])
def test_gradients_are_added_in_place_where_nobody_else_holds_them(readers, held):
    make = partial(foreign_job, partial(ReadOften, readers, held), torch.empty(4, 3, 64, 64), optimizer=None)
    assert trace_job(make).peak_allocated_bytes == pytest.approx(measure_job(make), rel=0.002)


@pytest.mark.parametrize("readers", [2, 6])
def test_so_it_is_with_real_tensors_and_with_a_backward_inside_the_loss(readers):
    def loss(out):
        out.mean().backward(retain_graph=True)
        return out.mean()

    make = partial(foreign_job, partial(ReadOften, readers, held=False), torch.empty(4, 3, 64, 64), optimizer=None)
    inside = partial(make, loss=loss)
    assert trace_job(inside).peak_allocated_bytes == pytest.approx(measure_job(inside), rel=0.005)
    real = trace_job(partial(make, real=True), real=True)
    assert real.peak_allocated_bytes == pytest.approx(measure_job(make), rel=0.005)


class AddedInPython(torch.autograd.Function):
    """Its backward adds two tensors of its own and returns a third."""

    @staticmethod
    def forward(ctx, maps):
        return maps + 1

    @staticmethod
    def backward(ctx, grad):
        first, second = grad * 2, grad * 3
        return first + second


class Around(nn.Module):
    """An operation between two convolutions."""

    def __init__(self, operation):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 5, 1)
        self.operation = operation

    def forward(self, images):
        return self.last(self.operation(self.first(images)))


def scaled_by_statistics(maps):
    deviation, mean = torch.std_mean(maps, (2, 3), keepdim=True)
    return maps.detach() * deviation + mean


ADDING = {
    "a function in Python": lambda maps: AddedInPython.apply(maps) + AddedInPython.apply(maps),
    "mean and deviation": scaled_by_statistics,
    "a Bessel function": torch.special.i1e,
    "shapes that differ": lambda maps: torch.atan2(maps.mean(1, keepdim=True), maps.detach()),
    "a square": lambda maps: maps * maps,
}


@pytest.mark.parametrize("operation", ADDING)
def test_what_a_backward_adds_itself_is_a_new_tensor(operation):
    make = partial(foreign_job, partial(Around, ADDING[operation]), torch.empty(4, 3, 64, 64), optimizer=None)
    assert trace_job(make).peak_allocated_bytes == pytest.approx(measure_job(make), rel=0.002)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_belongs_to_the_layer_of_its_parameter(layout):
    def build():
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))

    # Of images that lie otherwise than the weights, so do the gradients, and autograd copies them where they end.
    images = torch.ones(2, 3, 16, 16).contiguous(memory_format=layout)
    found = trace_job(partial(foreign_job, build, images, optimizer=None))
    gradients = [one for one in found.timeline.allocations if one.category is Category.GRADIENT]
    assert {(one.layer, one.size_bytes) for one in gradients} == {
        *(("0", 4 * 16 * 27), ("0", 4 * 16)),
        *(("2", 4 * 4 * 144), ("2", 4 * 4)),
    }


def test_parameters_of_the_model_itself_are_its_own_line():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.first = nn.Parameter(torch.ones(16)), nn.Linear(16, 4)

        def forward(self, images):
            return self.first(images * self.scale)

    found = trace_job(partial(foreign_job, Scaled, torch.ones(8, 16), optimizer=None))
    rows = {layer.row.name: layer.row for layer in found.layers()}
    assert list(rows) == ["", "first", LOSS]
    assert (rows[""].parameter_bytes, rows[""].saved_bytes) == (16 * 4, 8 * 16 * 4)


def test_a_step_that_reads_values_outside_of_every_layer_says_so():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 4)

        def forward(self, images):
            return self.first(images[: int(images.sum())])

    assert issubclass(UntraceableError, InputError)
    with pytest.raises(UntraceableError, match=r"Cut: the model itself runs aten\._local_scalar_dense"):
        trace_job(partial(foreign_job, Cut, torch.ones(8, 16), optimizer=None))


def test_a_gpu_takes_other_workspaces_than_a_cpu():
    profiles = [
        profile_step(partial(build_model, MINI), image=IMAGE, batch=BATCH, device=device) for device in ("cpu", "cuda")
    ]
    cpu, cuda = (
        {one.size_bytes for one in profile.timeline.allocations if one.category is Category.WORKSPACE}
        for profile in profiles
    )
    assert cpu
    assert cuda
    assert cpu != cuda


def test_work_is_told_by_phase_and_rebuilding_adds_to_backward(profile):
    rebuilt = profile_step(partial(build_model, MINI), image=IMAGE, batch=BATCH, recompute=Recompute.SEGMENT)

    def flops(of, phase):
        return sum(work.flops for (at, _), work in of.work.items() if at is phase)

    # Transitions that rebuild pool before they project: a quarter of the products.
    transitions = sum(
        work.flops
        for (at, layer), work in profile.work.items()
        if at is Phase.FORWARD and layer.startswith("transition")
    )
    assert flops(rebuilt, Phase.FORWARD) == flops(profile, Phase.FORWARD) - transitions * 3 // 4
    # Backward of a convolution is twice its forward, but the images want no gradient.
    assert flops(profile, Phase.BACKWARD) < 2 * flops(profile, Phase.FORWARD)
    extra = flops(rebuilt, Phase.BACKWARD) - flops(profile, Phase.BACKWARD)
    assert extra > 0


def test_a_step_that_cannot_be_is_refused():
    build = partial(build_model, MINI)
    with pytest.raises(InputError, match="nearest is 128x128"):
        profile_step(build, image=(130, 128), batch=1)
    with pytest.raises(InputError, match="nearest is 128x128"):
        measure_step(build, image=(130, 128), batch=1)
    with pytest.raises(UnknownNameError, match="unknown segment 'bloc1'; did you mean block1"):
        profile_step(build, image=IMAGE, batch=1, recompute={"bloc1": Recompute.UNITS})


def test_watching_counts_what_is_allocated_above_the_start():
    before = torch.empty(1000)
    with watch_allocator() as peak:
        torch.empty(300)
        held = torch.empty(100)
        del before
        torch.empty(50)
    assert held.numel() == 100
    assert peak.peak_bytes == 4 * 300
