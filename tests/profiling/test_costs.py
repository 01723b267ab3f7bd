"""Costs of segments, each profiled alone, add up to the step of the whole model."""

from functools import cache, partial

import pytest

from memseg.levels import NormMode, Recompute
from memseg.models import build_model
from memseg.planning.memory import Stage
from memseg.profiling.costs import model_costs
from memseg.profiling.step import profile_step

MINI = "ladder-densenet-mini"
IMAGE, BATCH = (128, 256), 2


@cache
def costs(norm):
    return model_costs(partial(build_model, MINI, norm=norm), image=IMAGE, batch=BATCH, norm=norm)


def peak(norm, recompute):
    """Of the whole model on one card; segments without that level run at the one they have."""
    stage = Stage(costs(norm), 0, len(costs(norm).segments) - 1)
    offered = [[level.recompute for level in segment.levels] for segment in stage.segments]
    return stage.peak_of([levels.index(recompute) if recompute in levels else 0 for levels in offered]).size


@pytest.mark.parametrize("norm", NormMode)
@pytest.mark.parametrize("level", Recompute)
def test_the_sum_over_segments_is_the_peak_of_the_whole_step(level, norm):
    whole = profile_step(partial(build_model, MINI, norm=norm), image=IMAGE, batch=BATCH, recompute=level)
    assert peak(norm, level) == pytest.approx(whole.timeline.peak_allocated_bytes, rel=0.005)


@pytest.mark.parametrize("norm", NormMode)
def test_rebuilding_more_never_needs_more_and_always_costs_work(norm):
    segments = costs(norm).segments
    for segment in segments:
        plain, *others = segment.levels
        assert plain.recompute is Recompute.NONE
        for level in others:
            assert level.saved_bytes <= plain.saved_bytes
            assert level.forward.flops == plain.forward.flops
            assert level.backward.flops >= plain.backward.flops
    assert peak(norm, Recompute.UNITS) < 0.8 * peak(norm, Recompute.NONE)


def test_costs_know_what_they_are_of():
    found = costs(NormMode.BATCH)
    model = build_model(MINI)
    assert [segment.name for segment in found.segments] == [*model.segments, "loss"]
    assert (found.image, found.batch, found.norm, found.precision) == (IMAGE, BATCH, NormMode.BATCH, "float32")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert sum(segment.parameter_bytes for segment in found.segments) == 4 * numbers
    assert found.image_bytes == BATCH * 3 * 4 * IMAGE[0] * IMAGE[1]
