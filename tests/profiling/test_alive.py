"""What is alive at the peak adds up to it, and what is said to remove a tensor removes it."""

from collections import Counter
from functools import cache, partial

import pytest

from memseg.levels import Recompute
from memseg.models import build_model
from memseg.profiling import profile_step
from memseg.profiling.alive import alive_at_peak, removing_level
from memseg.profiling.timeline import Allocation, Category, Phase, nearest_layer

LEVELS = {
    "stem": (Recompute.NONE, Recompute.NORMS, Recompute.UNITS),
    "block1": tuple(Recompute),
    "head": (Recompute.NONE, Recompute.SEGMENT),
}


@cache
def profile(segment="", level=Recompute.NONE):
    recompute = {segment: level} if segment else Recompute.NONE
    return profile_step(partial(build_model, "ladder-densenet-mini"), image=(64, 128), batch=2, recompute=recompute)


def kept(found):
    timeline = found.timeline
    return [one for one in timeline.alive(timeline.backward_start - 1) if one.category is Category.SAVED]


def counted(allocations, segment):
    """Of a segment, how many maps there are of each shape."""
    return Counter(
        one.shape
        for one in allocations
        # Of the stem, pooling keeps the places of its maxima, in another type where it is rebuilt.
        if nearest_layer(one.layer, profile().levels) == segment and one.dtype == "float32" and len(one.shape) == 4
    )


def test_all_that_is_alive_adds_up_to_the_peak_largest_first():
    timeline = profile().timeline
    alive = alive_at_peak(timeline, profile().levels)
    sizes = [one.size_bytes for one in alive]
    assert sum(sizes) == timeline.peak_allocated_bytes
    assert sizes == sorted(sizes, reverse=True)
    by_category = Counter()
    for one in alive:
        by_category[one.category] += one.size_bytes
    assert by_category == {category: size for category, size in timeline.by_category().items() if size}


@pytest.mark.parametrize(
    ("segment", "level"),
    [
        ("stem", Recompute.UNITS),
        ("block1", Recompute.NORMS),
        ("block1", Recompute.UNITS),
        ("block1", Recompute.SEGMENT),
        ("context", Recompute.SEGMENT),
    ],
)
def test_a_level_removes_the_tensors_that_it_is_said_to_remove_and_no_others(segment, level):
    order = list(Recompute)
    before = [one for one in kept(profile()) if nearest_layer(one.layer, profile().levels) == segment]
    least = [removing_level(one, profile().levels) for one in before]
    removed = [one for one, of in zip(before, least, strict=True) if of and order.index(of) <= order.index(level)]
    assert removed
    assert counted(before, segment) - counted(removed, segment) == counted(kept(profile(segment, level)), segment)


def test_what_a_segment_returns_is_kept_at_every_level():
    levels = profile().levels
    returned = [one for one in kept(profile()) if set(one.output_of) & set(levels)]
    assert {name for one in returned for name in one.output_of if name in levels} >= {"block1", "block2", "stem"}
    assert {removing_level(one, levels) for one in returned} == {None}


def tensor(layer, *, operation="aten.relu", category=Category.SAVED, output_of=()):
    return Allocation(64, 0, 9, Phase.FORWARD, category, layer, operation, (4, 4), "float32", output_of=output_of)


@pytest.mark.parametrize(
    ("one", "level"),
    [
        (tensor("block1.layer1.norm1"), Recompute.NORMS),
        (tensor("block1.layer1.conv1", operation="aten.convolution"), Recompute.UNITS),
        # What a unit returns is what its level keeps.
        (tensor("block1.layer1.conv2", operation="aten.convolution", output_of=("block1.layer1",)), Recompute.SEGMENT),
        (tensor("block1.layer4.conv2", operation="aten.convolution", output_of=("block1.layer4", "block1")), None),
        (tensor("head.conv"), Recompute.SEGMENT),
        (tensor("head.conv", operation="aten.convolution"), Recompute.SEGMENT),
        (tensor("elsewhere.conv"), None),
        (tensor("block10.conv"), None),
        (tensor(""), None),
        (tensor("block1.layer1.conv1", category=Category.AUTOCAST), Recompute.NORMS),
        (tensor("block1.layer1.conv1", category=Category.PARAMETER), None),
        (tensor("block1.layer1.conv1", category=Category.TEMPORARY), None),
    ],
)
def test_the_level_is_the_lowest_that_rebuilds_the_tensor(one, level):
    assert removing_level(one, LEVELS) is level


def test_a_tensor_tells_who_made_it_and_who_waits_for_it():
    (found,) = (
        one
        for one in alive_at_peak(profile().timeline, profile().levels)
        if one.made_by == "stem.conv0" and one.category is Category.SAVED
    )
    assert (found.shape, found.dtype, found.operation) == ((2, 32, 32, 64), "float32", "aten.convolution")
    # Batch norm reads its input again to make its gradient.
    assert found.waits_for == (Phase.BACKWARD, "stem.norm0")
