"""Costs of segments, each profiled alone, add up to the step of the whole model."""

from functools import cache, partial

import pytest

from memseg.levels import NormMode, Recompute
from memseg.models import build_model
from memseg.planning.memory import Stage
from memseg.profiling import profile_step
from memseg.profiling.costs import model_costs
from memseg.profiling.jobs.job import LOSS

MINI = "ladder-densenet-mini"
IMAGE, BATCH = (128, 256), 2


@cache
def costs(norm):
    return model_costs(partial(build_model, MINI, norm=norm), image=IMAGE, batch=BATCH, norm=norm)


def choice(norm, wanted):
    """For each segment, by its position in `levels`: as much rebuilding as it offers, up to `wanted`."""
    order = list(Recompute)
    return [
        max(
            number for number, level in enumerate(segment.levels) if order.index(level.recompute) <= order.index(wanted)
        )
        for segment in costs(norm).segments
    ]


def whole_model(norm):
    return Stage(costs(norm), 0, len(costs(norm).segments) - 1)


@pytest.mark.parametrize("norm", NormMode)
@pytest.mark.parametrize("level", Recompute)
def test_the_sum_over_segments_is_the_peak_of_the_whole_step(level, norm):
    stage, levels = whole_model(norm), choice(norm, level)
    recompute = dict(zip((segment.name for segment in stage.segments), stage.recompute_of(levels), strict=True))
    del recompute[LOSS]
    profile = profile_step(partial(build_model, MINI, norm=norm), image=IMAGE, batch=BATCH, recompute=recompute)
    assert stage.peak_of(levels).size == pytest.approx(profile.timeline.peak_allocated_bytes, rel=0.005)


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
