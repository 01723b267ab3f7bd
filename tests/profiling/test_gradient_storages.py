"""Gradients that share a storage: predicted peaks of small networks that concatenate and add, held against traces.

What a segment computes is wide enough, or not, for the peak to lie before or behind the moment at which the gradient of
its output is dropped.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memseg.levels import Recompute
from memseg.models.segmented import IMAGES, Segment, SegmentedModel
from memseg.nn import Blend
from memseg.planning.memory import Stage
from memseg.profiling import profile_step, trace_job
from memseg.profiling.costs import model_costs
from memseg.profiling.jobs.job import LOSS
from memseg.profiling.jobs.stage import stage_job

IMAGE, BATCH = (64, 64), 2
WIDTHS = [8, 16, 32, 64]


class Concatenate(nn.Module):
    def forward(self, a, b):
        return torch.cat([a, b], 1)


class Add(nn.Module):
    def forward(self, a, b):
        return a + b


class ConcatenateUpsampled(nn.Module):
    def forward(self, a, b):
        return torch.cat([F.interpolate(a, b.shape[2:]), b], 1)


def convolutions(inputs, outputs, width):
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, padding=1), nn.Sigmoid(),
        nn.Conv2d(width, width, 3, padding=1), nn.Sigmoid(),
        nn.Conv2d(width, outputs, 1),
    )  # fmt: skip


def model(*segments):
    return SegmentedModel("small", list(segments), outputs=[segments[-1].name], num_classes=5, output_stride=1)


def branches(join, width):
    """Two of a kind, joined."""
    channels = 32 if join is Concatenate else 16
    return model(
        Segment("stem", nn.Conv2d(3, 8, 3, padding=1), (IMAGES,)),
        Segment("a", convolutions(8, 16, width), ("stem",)),
        Segment("b", convolutions(8, 16, width), ("stem",)),
        Segment("c", join(), ("a", "b")),
        Segment("logits", nn.Conv2d(channels, 5, 1), ("c",)),
    )


def skip(width):
    """A map that is read twice, by what is smaller and by what joins both, as in a U-Net."""
    return model(
        Segment("fine", convolutions(3, 16, width), (IMAGES,)),
        Segment("coarse", nn.Sequential(nn.MaxPool2d(2), convolutions(16, 8, width)), ("fine",)),
        Segment("joined", ConcatenateUpsampled(), ("coarse", "fine")),
        Segment("logits", nn.Conv2d(24, 5, 1), ("joined",)),
    )


def thin_skip(width):
    """The same, where the map is kept and the second gradient of it comes when all else is small."""
    return model(
        Segment("fine", nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU()), (IMAGES,)),
        Segment("coarse", nn.Conv2d(width, 8, 1), ("fine",)),
        Segment("joined", ConcatenateUpsampled(), ("coarse", "fine")),
        Segment("logits", nn.Conv2d(width + 8, 5, 1), ("joined",)),
    )


def residual(width):
    """Two blocks with the identity beside them."""
    return model(
        Segment("stem", nn.Conv2d(3, 16, 3, padding=1), (IMAGES,)),
        Segment("block1", convolutions(16, 16, width), ("stem",)),
        Segment("sum1", Add(), ("block1", "stem")),
        Segment("block2", convolutions(16, 16, width), ("sum1",)),
        Segment("sum2", Add(), ("block2", "sum1")),
        Segment("logits", nn.Conv2d(16, 5, 1), ("sum2",)),
    )


def frozen(width):
    """A first segment that nothing is trained in, and so has no backward."""
    return model(
        Segment("fixed", convolutions(3, 16, width).requires_grad_(False), (IMAGES,)),
        Segment("fine", convolutions(16, 16, width), ("fixed",)),
        Segment("sum", Add(), ("fine", "fixed")),
        Segment("logits", nn.Conv2d(16, 5, 1), ("sum",)),
    )


class Downsampled(nn.Module):
    """What a block computes last, and what joins it, whose backward comes first."""

    def __init__(self, width):
        super().__init__()
        self.last, self.beside = convolutions(8, 32, width), nn.Conv2d(16, 32, 1, stride=2)

    def forward(self, inside, x):
        return self.last(inside) + self.beside(x)


def downsampled(width):
    """A ResNet's block that halves the map, cut in two; both parts keep what the block reads."""
    return model(
        Segment("stem", nn.Conv2d(3, 16, 3, padding=1), (IMAGES,)),
        Segment("first", nn.Sequential(nn.Conv2d(16, 8, 3, padding=1, stride=2), nn.Sigmoid()), ("stem",)),
        Segment("last", Downsampled(width), ("first", "stem")),
        Segment("logits", nn.Conv2d(32, 5, 1), ("last",)),
    )


def ladder(join, width):
    """A skip that the rest of a split network receives."""
    joined = Blend(16, 16, 8) if join is Blend else join()
    return model(
        Segment("skip", nn.Conv2d(3, 16, 3, padding=1), (IMAGES,)),
        Segment("d", nn.Conv2d(16, 8, 1), ("skip",)),
        Segment("e", convolutions(8, 16, width), ("d",)),
        Segment("f", nn.Conv2d(16, 16, 1), ("e",)),
        Segment("c", joined, ("f", "skip")),
        Segment("logits", nn.Conv2d({Blend: 8, Concatenate: 32, Add: 16}[join], 5, 1), ("c",)),
    )


def costs(build):
    return model_costs(build, image=IMAGE, batch=BATCH)


NETWORKS = {
    "concatenation": partial(branches, Concatenate),
    "sum": partial(branches, Add),
    "skip": skip,
    "thin skip": thin_skip,
    "residual": residual,
    "downsampled": downsampled,
    "frozen": frozen,
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NETWORKS)
def test_joins_are_never_predicted_too_low(name, width):
    build = partial(NETWORKS[name], width)
    found = costs(build)
    predicted = Stage(found, 0, len(found.segments) - 1).peak_of([0] * len(found.segments)).size
    traced = profile_step(build, image=IMAGE, batch=BATCH).timeline.peak_allocated_bytes
    assert traced <= predicted <= 1.001 * traced


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("join", [Concatenate, Add, Blend])
@pytest.mark.parametrize("cut", [2, 4])
def test_nor_are_those_of_the_card_that_receives_the_skip(join, width, cut):
    build = partial(ladder, join, width)
    found = costs(build)
    names = [segment.name for segment in found.segments]
    predicted = Stage(found, cut, len(names) - 1).peak_of([0] * (len(names) - cut)).size
    stages = [names[:cut], [name for name in names[cut:] if name != LOSS]]
    recompute = dict.fromkeys(stages[1], Recompute.NONE)
    make = partial(stage_job, build, stages, 1, image=IMAGE, batch=BATCH, recompute=recompute)
    traced = trace_job(make).timeline.peak_allocated_bytes
    assert traced <= predicted <= 1.1 * traced
