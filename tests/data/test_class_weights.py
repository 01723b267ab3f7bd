"""Weights of classes: the published formulas, on counts that can be checked by hand."""

import math

import numpy as np
import pytest

from memseg.data import CLASS_WEIGHT_SCHEMES, ClassList, SegmentationDataset, class_weights, open_dataset
from memseg.errors import DataError, UnknownNameError


class Labels(SegmentationDataset):
    """Targets that are given."""

    name, split = "labels", "train"

    def __init__(self, classes, *targets):
        self.classes = ClassList(tuple("abcdef"[:classes]), ((0, 0, 0),) * classes)
        self.targets = [np.array(target, np.uint8) for target in targets]

    def __len__(self):
        return len(self.targets)

    def key(self, index):
        return str(index)

    def size(self, index):
        return self.targets[index].shape

    def image(self, index):
        raise AssertionError("weights need no images")

    def target(self, index):
        return self.targets[index]


def test_median_frequency_is_over_the_images_that_have_the_class():
    labels = Labels(4, [[0, 0, 0, 0], [0, 255, 255, 1]], [[0, 0, 0, 0], [0, 0, 2, 255]])
    # a has 11 pixels of 16, b 1 of 8, c 1 of 8, d none: the median of 11/16, 1/8 and 1/8 is 1/8.
    assert class_weights(labels, "median-frequency") == pytest.approx((2 / 11, 1.0, 1.0, 0.0))


def test_enet_is_of_the_share_of_labelled_pixels():
    labels = Labels(3, [[0, 0, 0, 1], [255, 255, 255, 255]])
    expected = (1 / math.log(1.02 + 0.75), 1 / math.log(1.02 + 0.25), 0.0)
    assert class_weights(labels, "enet") == pytest.approx(expected)


def test_camvids_weights_follow_from_its_published_counts(shared_data):
    train = open_dataset("camvid", "train", root=shared_data / "camvid")
    told = []
    enet = class_weights(train, "enet", lambda done, total: told.append((done, total)))
    # Pixels of road and of bicyclist, of all that are labelled, as the data set's description counts them.
    assert enet[3] == pytest.approx(1 / math.log(1.02 + 20076880 / 60913605), rel=1e-9)
    assert enet[10] == pytest.approx(1 / math.log(1.02 + 184967 / 60913605), rel=1e-9)
    assert told == [(done, 367) for done in range(1, 368)]


def test_schemes_are_named_and_labels_needed():
    assert CLASS_WEIGHT_SCHEMES == ("median-frequency", "enet")
    with pytest.raises(UnknownNameError, match="unknown scheme of class weights 'median'"):
        class_weights(Labels(2, [[0]]), "median")
    with pytest.raises(DataError, match="no pixel is labelled"):
        class_weights(Labels(2, [[255]]), "enet")
