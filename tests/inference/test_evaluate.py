"""Evaluation, with a network that cannot err and a data set made to trip it."""

import numpy as np
import pytest
import torch
from torch import nn

from memseg.data import ClassList, SegmentationDataset, to_tensor
from memseg.errors import DataError, InputError
from memseg.inference.evaluate import ImageScore, evaluate
from memseg.inference.labelling import Framing
from memseg.inference.worst import WorstImages, caption, captioned, strip

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


def test_pictures_that_the_region_does_not_fit_in_are_told_before_any_is_labelled():
    labelled = []
    with pytest.raises(DataError, match=r"painted, split val: 1 problem\n  painted_1: a picture must reach row 40"):
        evaluate(
            ReadsGrey(), Painted(), framing=Framing(region=(0, 40, 0, 31)), labelled=lambda *one: labelled.append(one)
        )
    assert not labelled


def test_scores_are_the_same_in_float64():
    assert evaluate(ReadsGrey().to(torch.float64), Painted()).miou == 1


def test_each_picture_has_a_score_of_its_own_and_its_labels_are_handed_on():
    class WrongInTheSecond(Painted):
        def target(self, index):
            target = super().target(index)
            if index == 1:
                target[target == 0] = 1
            return target

    seen = {}
    result = evaluate(ReadsGrey(), WrongInTheSecond(), labelled=lambda score, labels: seen.update({score: labels}))
    assert tuple(seen) == result.image_scores
    first, second, third = result.image_scores
    assert (first.index, first.key, first.miou, first.pixel_accuracy) == (0, "painted_0", 1, 1)
    assert (first.labelled_pixels, third.miou) == (45 * 70, 1)
    assert second.miou < 1
    # Of the whole split, not the mean of pictures: the counts of all pictures are one table.
    assert result.miou != pytest.approx((1 + second.miou + 1) / 3)
    for score, labels in seen.items():
        assert labels.shape == Painted.sizes[score.index]


def test_a_picture_without_labels_has_no_score_and_is_not_among_the_worst():
    class HalfUnlabelled(Painted):
        def target(self, index):
            return super().target(index) if index else np.full(self.sizes[0], 255, dtype=np.uint8)

    worst = WorstImages(3)
    result = evaluate(ReadsGrey(), HalfUnlabelled(), labelled=worst.add)
    assert result.image_scores[0] == ImageScore(0, "painted_0", None, None, 0)
    assert [score.key for score, _ in worst.ranked()] == ["painted_1", "painted_2"]


def test_the_worst_are_kept_in_order_and_no_more_of_them_than_asked_for():
    worst = WorstImages(2)
    for index, miou in enumerate([0.5, 0.2, 0.9, 0.2, 0.1]):
        worst.add(ImageScore(index, f"{index}", miou, miou, 1), np.full((1, 1), index, np.uint8))
    assert [(score.index, int(labels[0, 0])) for score, labels in worst.ranked()] == [(4, 4), (1, 1)]


def test_a_strip_shows_input_truth_and_prediction_in_the_colours_of_the_classes():
    dataset = Painted()
    score = ImageScore(0, "painted_0", 0.25, 0.5, 100)
    sheet = np.asarray(strip(dataset, score, np.full((50, 70), 2, np.uint8)))
    assert sheet.shape == (50, 3 * 70 + 2 * 8, 3)
    assert np.array_equal(sheet[:, :70], dataset.image(0))
    truth = sheet[:, 78:148, 0]
    assert np.array_equal(truth, np.where(dataset.target(0) == 255, 0, dataset.target(0) + 1))
    assert (sheet[:, 156:] == [3, 0, 0]).all()
    assert caption(score) == "painted_0: mIoU 25.0%, pixel accuracy 50.0%"
    titled = np.asarray(captioned(strip(dataset, score, dataset.target(0)), caption(score)))
    assert titled.shape[0] > 70
    assert (titled[:34] < 128).any()
