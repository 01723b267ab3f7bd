"""Evaluation, with a network that cannot err and a data set made to trip it."""

import numpy as np
import pytest
import torch
from torch import nn

from memseg.data import ClassList, SegmentationDataset, to_tensor
from memseg.errors import DataError, InputError
from memseg.inference.evaluate import evaluate
from memseg.inference.labelling import Framing

CLASSES = ClassList(("road", "car", "sky", "tram"), ((1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0)))
GREY_PER_CLASS = 60


class Painted(SegmentationDataset):
    """Pictures whose grey tells the class, of sizes that are no multiple of anything; `tram` never appears."""

    classes, name, split = CLASSES, "painted", "val"
    sizes = ((50, 70), (33, 31), (64, 64))

    def __len__(self):
        return len(self.sizes)

    def key(self, index):
        return f"painted_{index}"

    def size(self, index):
        return self.sizes[index]

    def image(self, index):
        true = np.random.default_rng(index).integers(0, 3, self.sizes[index], dtype=np.uint8)
        return np.repeat(true[..., None] * GREY_PER_CLASS, 3, axis=2)

    def target(self, index):
        target = self.image(index)[..., 0] // GREY_PER_CLASS
        target[:5] = 255
        return target


class Unlabelled(Painted):
    """No label anywhere."""

    def target(self, index):
        return np.full(self.sizes[index], 255, dtype=np.uint8)


class ReadsGrey(nn.Module):
    """Knows the classes of `Painted` from their greys; wants sides that are multiples of 32, as a real network does."""

    output_stride = 32

    def __init__(self, num_classes=4):
        super().__init__()
        self.num_classes = num_classes
        greys = np.arange(num_classes, dtype=np.uint8)[None, :, None] * GREY_PER_CLASS
        self.greys = nn.Parameter(to_tensor(np.repeat(greys, 3, axis=2))[:, 0])

    def coarse_outputs(self, images):
        assert all(side % self.output_stride == 0 for side in images.shape[2:])
        assert not self.training
        distance = images[:, :, None] - self.greys[None, :, :, None, None]
        return (-distance.square().sum(1),)


def test_a_network_that_cannot_err_scores_one():
    model = ReadsGrey().train()
    told = []
    result = evaluate(model, Painted(), progress=lambda done, total: told.append((done, total)))
    assert (result.images, result.miou, result.pixel_accuracy) == (3, 1.0, 1.0)
    assert result.iou == {"road": 1.0, "car": 1.0, "sky": 1.0, "tram": None}
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert model.training


def test_only_the_region_is_counted():
    class WrongBelow(Painted):
        def target(self, index):
            target = super().target(index)
            target[20:] = 3
            return target

    assert evaluate(ReadsGrey(), WrongBelow()).miou < 1
    assert evaluate(ReadsGrey(), WrongBelow(), framing=Framing(region=(0, 20, 0, 31))).miou == 1


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(InputError, match="a class for each of the data set's 4, it has 3"):
        evaluate(ReadsGrey(num_classes=3), Painted())
    with pytest.raises(DataError, match=r"painted, split val.*\n.*no pixel that the network sees is labelled"):
        evaluate(ReadsGrey(), Unlabelled())


def test_scores_are_the_same_in_float64():
    assert evaluate(ReadsGrey().to(torch.float64), Painted()).miou == 1
