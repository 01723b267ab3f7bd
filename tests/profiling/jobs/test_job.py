"""A step with its optimizer: what is predicted of it is what the CPU's allocator hands out when it runs."""

from functools import partial

import pytest
import torch
from torch import nn

from memseg.errors import InputError, UnknownNameError
from memseg.profiling import Category, Phase, foreign_job, measure_job, named_optimizer, trace_job
from memseg.profiling.jobs.job import LOSS, Job, fused_adam, optimizer_names, run_batch, run_step

SIZES = (64, 256, 32)
PARAMETERS = 4 * (64 * 256 + 256 + 256 * 32 + 32)
"""Bytes."""
SCALARS = 64
"""Losses, step sizes: single numbers, of which a few more or less are alive at a peak."""


def network():
    first, hidden, last = SIZES
    return nn.Sequential(nn.Linear(first, hidden), nn.Tanh(), nn.Linear(hidden, last))


def job(optimizer="sgd", *, real=False, batch=32, **settings):
    made = None if optimizer is None else named_optimizer(optimizer)
    return foreign_job(network, torch.ones(batch, SIZES[0]), optimizer=made, real=real, **settings)


def trace(optimizer="sgd", **settings):
    return trace_job(partial(job, optimizer, **settings))


def at_end(timeline):
    return timeline.by_category(timeline.instants - 1)


@pytest.mark.parametrize("batch", [1, 512])
@pytest.mark.parametrize("optimizer", [None, *optimizer_names()])
def test_the_predicted_peak_is_the_measured_one_with_every_optimizer(optimizer, batch):
    # With one image the optimizer needs most, with many the backward pass.
    measured = measure_job(partial(job, optimizer, real=True, batch=batch))
    assert abs(trace(optimizer, batch=batch).peak_allocated_bytes - measured) <= SCALARS


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("accumulation", [2, 3])
def test_the_predicted_peak_is_the_measured_one_where_gradients_add_up(optimizer, accumulation):
    settings = {"accumulation": accumulation, "batch": 512}
    predicted = trace(optimizer, **settings)
    measured = measure_job(partial(job, optimizer, real=True, **settings))
    assert abs(predicted.peak_allocated_bytes - measured) <= SCALARS
    assert predicted.accumulation == accumulation


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 0), ("momentum", 1), ("adam", 2), ("adamw", 2)])
@pytest.mark.parametrize("kernel", ["", "-fused", "-foreach", "-loop"])
def test_sgd_has_no_state_momentum_one_copy_of_the_parameters_and_adam_two(optimizer, copies, kernel):
    found = trace(optimizer + kernel)
    counts = 4 * 4 if copies == 2 else 0
    for timeline in (found.timeline, found.first_timeline):
        assert at_end(timeline)[Category.OPTIMIZER_STATE] == copies * PARAMETERS + counts


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adam-fused"])
def test_state_is_born_at_the_end_of_the_first_step_and_there_from_the_start_of_later_ones(optimizer):
    found = trace(optimizer)
    first, steady = found.first_timeline, found.timeline
    assert first.by_category(first.backward_start)[Category.OPTIMIZER_STATE] == 0
    born = [one for one in first.allocations if one.category is Category.OPTIMIZER_STATE]
    assert {one.phase for one in born} == {Phase.OPTIMIZER}
    assert all(one.died == first.instants for one in born)
    again = [one for one in steady.allocations if one.category is Category.OPTIMIZER_STATE]
    assert {one.phase for one in again} == {Phase.SETUP}
    assert sum(one.size_bytes for one in again) == sum(one.size_bytes for one in born)


def test_first_and_later_steps_differ_in_the_state_alone():
    found = trace("momentum", batch=512)
    first, steady = found.first_timeline, found.timeline
    assert steady.peak_allocated_bytes == first.peak_allocated_bytes + PARAMETERS
    assert steady.peak_moment == first.peak_moment
    assert found.peak_allocated_bytes == steady.peak_allocated_bytes
    plain = trace("sgd", batch=512)
    assert plain.first_timeline.peak_allocated_bytes == plain.timeline.peak_allocated_bytes


@pytest.mark.parametrize(("optimizer", "copies"), [("adam-foreach", 1), ("adam-fused", 0), ("sgd-foreach", 0)])
def test_kernels_over_lists_of_parameters_take_temporaries_as_large_as_all_of_them(optimizer, copies):
    timeline = trace(optimizer).timeline
    born = [one.born for one in timeline.allocations if one.phase is Phase.OPTIMIZER]
    most = max((timeline.by_category(instant)[Category.TEMPORARY] for instant in born), default=0)
    assert abs(most - copies * PARAMETERS) <= SCALARS


def test_accumulated_gradients_are_there_while_the_second_batch_runs():
    once, twice = (trace("sgd", batch=512, accumulation=count) for count in (1, 2))
    # A gradient that is added to another is a temporary of its own size.
    added = twice.peak_allocated_bytes - once.peak_allocated_bytes
    assert 0 < added <= PARAMETERS + SCALARS
    assert at_end(twice.timeline)[Category.GRADIENT] == at_end(once.timeline)[Category.GRADIENT] == PARAMETERS


def test_work_of_every_batch_counts_and_the_optimizers_once():
    def flops(found, phase):
        return sum(work.flops for (of, _), work in found.work.items() if of is phase)

    def moved(found, phase):
        return sum(work.moved_bytes for (of, _), work in found.work.items() if of is phase)

    once, many = trace("adam"), trace("adam", accumulation=5)
    assert flops(once, Phase.FORWARD) == 2 * 32 * (64 * 256 + 256 * 32)
    assert flops(many, Phase.FORWARD) == 5 * flops(once, Phase.FORWARD)
    assert flops(many, Phase.BACKWARD) == 5 * flops(once, Phase.BACKWARD)
    assert moved(many, Phase.OPTIMIZER) == moved(once, Phase.OPTIMIZER) > 0


@pytest.mark.parametrize("accumulation", [0, -1])
def test_a_step_has_at_least_one_batch(accumulation):
    with pytest.raises(InputError, match=f"at least 1, got {accumulation}"):
        trace("sgd", accumulation=accumulation)


# Optimizers by name.


def test_every_name_makes_the_optimizer_and_takes_the_kernels_that_it_says():
    kernels = {"fused": ("fused", True), "foreach": ("foreach", True), "loop": ("foreach", False)}
    for name in optimizer_names():
        made = named_optimizer(name)([nn.Parameter(torch.ones(2))])
        base, _, kernel = name.partition("-")
        assert type(made).__name__ == {"sgd": "SGD", "momentum": "SGD", "adam": "Adam", "adamw": "AdamW"}[base]
        assert (made.defaults.get("momentum", 0) > 0) == (base == "momentum")
        if kernel:
            setting, value = kernels[kernel]
            assert made.defaults[setting] is value, name
        else:
            assert made.defaults["fused"] is None, name
            assert made.defaults["foreach"] is None, name


def test_an_unknown_optimizer_is_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown optimizer 'adam-fuse'; did you mean adam-fused"):
        named_optimizer("adam-fuse")


def test_memseg_trains_with_adam_in_one_kernel():
    assert fused_adam([nn.Parameter(torch.ones(2))]).defaults["fused"] is True


# Running it.


def test_a_step_trains():
    made = job("sgd", real=True)
    before = [parameter.detach().clone() for parameter in made.model.parameters()]
    run_step(made)
    assert not all(torch.equal(*pair) for pair in zip(before, made.model.parameters(), strict=True))


def test_accumulated_gradients_are_the_mean_over_the_batches():
    torch.manual_seed(0)
    model = network()

    def gradients(accumulation):
        made = foreign_job(model, torch.ones(4, 64), optimizer=None, accumulation=accumulation, real=True)
        for _ in range(accumulation):
            run_batch(made)
        return [parameter.grad for parameter in made.model.parameters()]

    for once, thrice in zip(gradients(1), gradients(3), strict=True):
        torch.testing.assert_close(once, thrice)


def test_a_batch_tells_its_phases_and_the_loss_apart():
    told, layers = [], []

    class Layer:
        def __init__(self, name):
            layers.append(name)

        def __enter__(self):
            return None

        def __exit__(self, *_):
            return None

    loss = run_batch(job(None, real=True), begin=told.append, layer=Layer)
    assert (told, layers) == ([Phase.FORWARD, Phase.BACKWARD], [LOSS])
    assert not loss.requires_grad


def test_without_an_optimizer_gradients_do_not_pile_up():
    made = job(None, real=True)
    for _ in range(2):
        run_step(made)
        assert all(parameter.grad is None for parameter in made.model.parameters())
    assert isinstance(made, Job)
