"""Scores, on tables small enough to count by hand."""

import math

import pytest
import torch

from memseg.errors import InputError
from memseg.training.metrics import ConfusionMatrix, InstanceCounts


def test_scores_match_a_table_counted_by_hand():
    confusion = ConfusionMatrix(4)
    confusion.update(
        predicted=torch.tensor([[0, 0, 1], [1, 2, 0]], dtype=torch.uint8),
        target=torch.tensor([[0, 0, 0], [1, 1, 255]], dtype=torch.uint8),
    )
    assert confusion.counts.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    # 0: 2 of 3 pixels; 1: 1 hit in the union of 3; 2: found once, never there; 3: appears nowhere.
    assert confusion.iou()[:3].tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert math.isnan(confusion.iou()[3])
    assert confusion.miou() == pytest.approx(1 / 3)
    assert confusion.pixel_accuracy() == pytest.approx(3 / 5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_any_integer_type_and_any_number_of_classes_count_alike(dtype):
    # 255 classes of uint8: a product of labels would overflow the type of the labels.
    confusion = ConfusionMatrix(255)
    confusion.update(torch.tensor([254, 0], dtype=dtype), torch.tensor([254, 255], dtype=dtype))
    assert confusion.counts.nonzero().tolist() == [[254, 254]]


def test_batches_add_up():
    target, predicted = torch.randint(0, 3, (2, 8, 8)), torch.randint(0, 3, (2, 8, 8))
    whole, parts = ConfusionMatrix(3), ConfusionMatrix(3)
    whole.update(predicted, target)
    for one, other in zip(predicted, target, strict=True):
        parts.update(one, other)
    assert torch.equal(whole.counts, parts.counts)


def test_labels_out_of_range_are_refused_and_not_counted_elsewhere():
    confusion = ConfusionMatrix(2)
    with pytest.raises(InputError, match=r"a prediction must lie in 0 \.\. 1, got 2"):
        confusion.update(torch.tensor([2]), torch.tensor([0]))
    with pytest.raises(InputError, match=r"a target must lie in 0 \.\. 1, got -1"):
        confusion.update(torch.tensor([0]), torch.tensor([-1]))
    with pytest.raises(InputError, match="one shape"):
        confusion.update(torch.tensor([[0, 1]]), torch.tensor([[0], [1]]))
    assert confusion.counts.sum() == 0


def test_no_labelled_pixel_gives_no_score():
    confusion = ConfusionMatrix(2)
    confusion.update(torch.tensor([0]), torch.tensor([255]))
    assert math.isnan(confusion.miou())
    assert math.isnan(confusion.pixel_accuracy())


def test_a_class_taken_for_another_of_its_group_is_a_hit_of_the_group():
    confusion = ConfusionMatrix(3)
    confusion.update(predicted=torch.tensor([0, 1, 1, 2, 0]), target=torch.tensor([0, 0, 1, 1, 2]))
    groups = confusion.merged([0, 0, 1])
    assert groups.counts.tolist() == [[3, 1], [1, 0]]
    assert groups.iou().tolist() == pytest.approx([3 / 5, 0])
    assert confusion.false_alarms().tolist() == [1, 1, 1]


def test_every_instance_counts_alike_whatever_its_size():
    # A large one all found, a small one missed: half, where IoU says nine tenths.
    counts = InstanceCounts([None, 5.0])
    target = torch.ones(10, dtype=torch.uint8)
    instances = torch.tensor([1000] * 9 + [1001])
    counts.update(torch.tensor([1] * 9 + [0]), target, instances)
    assert counts.iou()[1] == pytest.approx(0.5)
    assert counts.confusion.iou()[1] == pytest.approx(0.9)


def test_pixels_of_groups_and_false_alarms_are_not_weighted():
    counts = InstanceCounts([None, 8.0, 2.0], groups=[0, 1, 1])
    # Of class 1: an instance of 4 pixels, 2 found and 1 taken for class 2; a group that is missed; one false alarm.
    counts.update(
        predicted=torch.tensor([1, 1, 2, 0, 0, 0, 1]),
        target=torch.tensor([1, 1, 1, 1, 1, 1, 0]),
        instances=torch.tensor([1007, 1007, 1007, 1007, -1, -1, -1]),
    )
    assert counts.iou()[1] == pytest.approx((2 * 8 / 4) / (4 * 8 / 4 + 1))
    assert counts.iou()[2] == 0
    # In its group the pixel of class 2 is a hit, and no false alarm.
    assert counts.group_iou()[1] == pytest.approx((3 * 8 / 4) / (4 * 8 / 4 + 1))
    assert math.isnan(counts.group_iou()[0])
    assert counts.images == 1


def test_an_instance_of_no_class_is_refused():
    with pytest.raises(InputError, match=r"an instance must be of a class 0 \.\. 1, got 2"):
        InstanceCounts([1.0, 1.0]).update(torch.tensor([0]), torch.tensor([0]), torch.tensor([2000]))
