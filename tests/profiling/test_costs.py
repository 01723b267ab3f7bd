"""Costs of segments, each profiled alone, add up to the step of the whole model."""

import json
import random
from datetime import timedelta
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from memseg.levels import NormMode, Recompute
from memseg.models import build_model
from memseg.planning.memory import Flow, Stage
from memseg.profiling import measure_step, profile_step
from memseg.profiling.costs import model_costs
from memseg.profiling.jobs.job import LOSS

MINI = "ladder-densenet-mini"
IMAGE, BATCH = (128, 256), 2


REPLICAS = 2
LEVELS = list(Recompute)


@cache
def costs(norm, replicas=1):
    build = partial(build_model, MINI, norm=norm)
    return model_costs(build, image=IMAGE, batch=BATCH, norm=norm, replicas=replicas)


def choice(norm, wanted):
    """For each segment, by its position in `levels`: as much rebuilding as it offers, up to `wanted`."""
    return [
        max(
            number
            for number, level in enumerate(segment.levels)
            if LEVELS.index(level.recompute) <= LEVELS.index(wanted)
        )
        for segment in costs(norm).segments
    ]


def whole_model(norm, replicas=1):
    found = costs(norm, replicas)
    return Stage(found, 0, len(found.segments) - 1)


def by_segment(norm, wanted):
    """The levels of that choice by name, as `set_recompute` takes them."""
    stage = whole_model(norm)
    levels = stage.recompute_of(choice(norm, wanted))
    names = (segment.name for segment in stage.segments)
    return {name: level for name, level in zip(names, levels, strict=True) if name != LOSS}


@pytest.mark.parametrize("norm", NormMode)
@pytest.mark.parametrize("level", Recompute)
def test_the_sum_over_segments_is_the_peak_of_the_whole_step(level, norm):
    stage, levels = whole_model(norm), choice(norm, level)
    build = partial(build_model, MINI, norm=norm)
    profile = profile_step(build, image=IMAGE, batch=BATCH, recompute=by_segment(norm, level))
    assert stage.peak_of(levels).size == profile.timeline.peak_allocated_bytes


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", [MINI, "ladder-resnet50"])
def test_a_mix_of_levels_on_small_images_is_never_predicted_too_low(name, accumulation):
    # There gradients and weights are most of the peak, which then lies anywhere in backward.
    image, batch = (64, 128), 1
    build = partial(build_model, name)
    found = model_costs(build, image=image, batch=batch)
    stage = Stage(found, 0, len(found.segments) - 1, Flow(keeps_gradients=accumulation > 1))
    generator = random.Random(name)
    for _ in range(6):
        levels = [generator.randrange(len(segment.levels)) for segment in found.segments]
        names = (segment.name for segment in found.segments)
        recompute = {n: level for n, level in zip(names, stage.recompute_of(levels), strict=True) if n != LOSS}
        profile = profile_step(build, image=image, batch=batch, recompute=recompute, accumulation=accumulation)
        traced, summed = profile.timeline.peak_allocated_bytes, stage.peak_of(levels).size
        assert traced <= summed <= 1.003 * traced, recompute


@pytest.mark.parametrize("norm", NormMode)
def test_rebuilding_more_never_needs_more_and_always_costs_work(norm):
    segments = costs(norm).segments
    for segment in segments:
        plain, *others = segment.levels
        assert plain.recompute is Recompute.NONE
        for level in others:
            assert level.saved_bytes <= plain.saved_bytes
            if segment.name in ("transition1", "transition2", "transition3"):
                # Pooled before it is projected: a quarter of the products.
                assert 4 * level.forward.flops == plain.forward.flops
                assert 4 * level.backward.flops == plain.backward.flops
                continue
            assert level.forward.flops == plain.forward.flops
            assert level.backward.flops >= plain.backward.flops
    plain, rebuilt = (
        whole_model(norm).peak_of(choice(norm, wanted)).size for wanted in (Recompute.NONE, Recompute.UNITS)
    )
    assert rebuilt < 0.8 * plain


def test_costs_know_what_they_are_of():
    found = costs(NormMode.BATCH)
    model = build_model(MINI)
    assert [segment.name for segment in found.segments] == [*model.segments, "loss"]
    assert (found.image, found.batch, found.norm, found.precision) == (IMAGE, BATCH, NormMode.BATCH, "float32")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert sum(segment.parameter_bytes for segment in found.segments) == 4 * numbers
    assert found.image_bytes == BATCH * 3 * 4 * IMAGE[0] * IMAGE[1]


def plain_peak(replicas):
    """Of synced norms, where nothing is rebuilt."""
    stage = whole_model(NormMode.SYNCED, replicas)
    return stage.peak_of([0] * len(stage.segments)).size


def replica(rank, folder, levels):
    """Peaks of real steps of one process, whose norms sync with the others', and what costs say beside a real group."""
    torch.set_num_threads(1)
    meeting = (folder / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=REPLICAS, timeout=timedelta(seconds=300))
    world = dist.group.WORLD
    build = partial(build_model, MINI, norm=NormMode.SYNCED)
    found = {
        wanted: measure_step(build, image=IMAGE, batch=BATCH, recompute=recompute)
        for wanted, recompute in levels.items()
    }
    if rank == 0:
        # Were the others asked, they would not answer.
        found["predicted beside a group"] = plain_peak(REPLICAS)
        assert dist.group.WORLD is world
    dist.barrier()
    (folder / str(rank)).write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("replicas")
    levels = {wanted.value: by_segment(NormMode.SYNCED, wanted) for wanted in LEVELS}
    multiprocessing.start_processes(replica, (folder, levels), nprocs=REPLICAS, start_method="spawn")
    return [json.loads((folder / str(rank)).read_text()) for rank in range(REPLICAS)]


@pytest.mark.parametrize("level", LEVELS)
def test_the_sum_over_segments_is_the_peak_of_each_replica(replicas, level):
    levels = choice(NormMode.SYNCED, level)
    predicted = whole_model(NormMode.SYNCED, REPLICAS).peak_of(levels).size
    for found in replicas:
        assert predicted == pytest.approx(found[level.value], rel=0.005)


def test_costs_of_replicas_are_the_same_beside_a_real_group(replicas):
    assert replicas[0]["predicted beside a group"] == plain_peak(REPLICAS)


def test_costs_of_replicas_leave_no_group_behind():
    costs(NormMode.SYNCED, REPLICAS)
    assert not dist.is_initialized()


def test_plain_norms_keep_more_where_they_are_synced():
    alone, together = (whole_model(NormMode.SYNCED, replicas) for replicas in (1, REPLICAS))
    plain, rebuilt = (choice(NormMode.SYNCED, wanted) for wanted in (Recompute.NONE, Recompute.UNITS))
    assert together.peak_of(plain).size > 1.05 * alone.peak_of(plain).size
    assert together.peak_of(rebuilt).size == pytest.approx(alone.peak_of(rebuilt).size, rel=0.001)


@pytest.mark.parametrize("norm", [NormMode.BATCH, NormMode.FROZEN])
def test_norms_that_are_not_synced_cost_the_same_whatever_the_replicas(norm):
    assert costs(norm, REPLICAS) == costs(norm)
