"""Scores, on tables small enough to count by hand."""

import math

import pytest
import torch

from memseg.errors import InputError
from memseg.training.metrics import ConfusionMatrix


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
