"""How good a segmentation is: counts first, scores from the counts.

The mean over classes of intersection over union must be taken over a whole split, never averaged over images. So each
image only adds to one table of counts. Counts add, also between processes, and the scores are read off at the end.

Three scores are read off them. IoU of classes, whose mean is that of Cityscapes and of Pascal VOC alike; of categories,
which are groups of classes; and Cityscapes' iIoU, for which `InstanceCounts` counts more.

Source: cityscapesscripts/evaluation/evalPixelLevelSemanticLabeling.py; Cordts et al., CVPR 2016, section 4.1. For VOC:
Everingham et al., IJCV 2015, section 4.3.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from memseg.data import IGNORE_INDEX
from memseg.errors import InputError

AVERAGE_INSTANCE_PIXELS: Mapping[str, float] = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}
"""Pixels of an instance of a class of Cityscapes, on average over its training split, as its own script has them."""


class ConfusionMatrix:
    """Pixels counted by their true class (rows) and their predicted class (columns).

    Attributes:
        counts: int64 (num_classes, num_classes) on the CPU; two matrices are joined by adding theirs.

    >>> confusion = ConfusionMatrix(2)
    >>> confusion.update(predicted=torch.tensor([0, 1, 1, 1]), target=torch.tensor([0, 0, 1, 255]))
    >>> confusion.counts.tolist()
    [[1, 1], [0, 1]]
    >>> confusion.iou().tolist(), confusion.miou(), round(confusion.pixel_accuracy(), 3)
    ([0.5, 0.5], 0.5, 0.667)
    """

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Count the labelled pixels of one or more images.

        Args:
            predicted: Class of each pixel, any integer type, any shape; where `target` is unlabelled, anything.
            target: True class of each pixel, same shape and device; 255 is unlabelled and not counted.

        Raises:
            InputError: shapes differ, or a class lies outside 0 .. num_classes - 1.
        """
        if predicted.shape != target.shape:
            raise InputError(
                f"prediction and target must have one shape, got {tuple(predicted.shape)} and {tuple(target.shape)}"
            )
        num_classes = len(self.counts)
        labelled = target != IGNORE_INDEX
        true, found = target[labelled].long(), predicted[labelled].long()
        for what, classes in (("target", true), ("prediction", found)):
            if classes.numel() and (classes.min() < 0 or classes.max() >= num_classes):
                worst = classes.max() if classes.max() >= num_classes else classes.min()
                raise InputError(f"a {what} must lie in 0 .. {num_classes - 1}, got {int(worst)}")
        pairs = torch.bincount(true * num_classes + found, minlength=num_classes**2)
        self.counts += pairs.reshape(num_classes, num_classes).cpu()

    def iou(self) -> Tensor:
        """Intersection over union of each class, float64 (num_classes,); nan where one was neither true nor found."""
        hits = self.counts.diagonal()
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        return hits.double() / union

    def miou(self) -> float:
        """Mean of `iou` over the classes that appear; nan before any labelled pixel."""
        return float(self.iou().nanmean())

    def pixel_accuracy(self) -> float:
        """Share of labelled pixels whose class was found; nan before any labelled pixel."""
        return float(self.counts.diagonal().sum().double() / self.counts.sum())

    def false_alarms(self) -> Tensor:
        """Labelled pixels that were taken for each class and are of another, int64 (num_classes,)."""
        return self.counts.sum(0) - self.counts.diagonal()

    def merged(self, groups: Sequence[int]) -> "ConfusionMatrix":
        """The counts of groups of classes, where a class that is taken for another of its group is a hit.

        Args:
            groups: The number of the group of each class, from 0 without a gap.

        >>> confusion = ConfusionMatrix(3)
        >>> confusion.update(predicted=torch.tensor([1, 0, 2]), target=torch.tensor([0, 1, 1]))
        >>> confusion.merged([0, 0, 1]).counts.tolist()
        [[2, 1], [0, 0]]
        """
        merged = ConfusionMatrix(max(groups) + 1)
        member = torch.zeros(len(self.counts), len(merged.counts), dtype=torch.int64)
        member[torch.arange(len(groups)), torch.tensor(groups)] = 1
        merged.counts = member.T @ self.counts @ member
        return merged


class InstanceCounts:
    """Hits and misses of single instances, weighted so that a small one counts as much as a large one: iIoU.

    A car close by has a hundred times the pixels of one far away, and IoU hardly sees the second. For iIoU a pixel of
    an instance counts as the average size of instances of its class over the size of this one. False alarms belong to
    no instance and count as they are. Only images with a map of instances take part, for their false alarms alone would
    make a score too low.

    Attributes:
        images: How many images took part.
        confusion: Their labelled pixels, of all classes.
        hits, misses: float64 (num_classes,), weighted pixels of instances of each class.
        group_hits: The same where a pixel taken for another class of its group is a hit.

    Args:
        average_pixels: Of an instance of each class; None for a class without instances.
        groups: The number of the group of each class, from 0 without a gap; None for every class by itself.

    One car of 4 pixels, of which 3 were found, where cars have 8 on average; and a false alarm of 1 pixel:

    >>> counts = InstanceCounts([None, 8.0])
    >>> found, target = torch.tensor([1, 1, 1, 0, 1]), torch.tensor([1, 1, 1, 1, 0])
    >>> counts.update(found, target, instances=torch.tensor([1001, 1001, 1001, 1001, -1]))
    >>> counts.iou().tolist(), 3 * 8 / 4 / (8 + 1)
    ([nan, 0.6666666666666666], 0.6666666666666666)
    """

    INSTANCES_PER_CLASS = 1000
    """In a map of instances a pixel is its class number times this, plus a number of its own."""

    def __init__(self, average_pixels: Sequence[float | None], groups: Sequence[int] | None = None) -> None:
        self.images = 0
        self.confusion = ConfusionMatrix(len(average_pixels))
        self.hits, self.misses, self.group_hits = torch.zeros(3, len(average_pixels), dtype=torch.float64).unbind()
        self._average_pixels = torch.tensor([size or 0.0 for size in average_pixels], dtype=torch.float64)
        self._groups = torch.tensor(range(len(average_pixels)) if groups is None else groups)

    def update(self, predicted: Tensor, target: Tensor, instances: Tensor) -> None:
        """Count one image.

        Args:
            predicted, target: As for `ConfusionMatrix.update`, on the CPU.
            instances: int64 or int32 of the same shape: class number * 1000 + number of the instance; -1 where a pixel
                is of none.

        Raises:
            InputError: as for `ConfusionMatrix.update`, or an instance is of no class.
        """
        self.confusion.update(predicted, target)
        self.images += 1
        inside = instances >= 0
        numbers, owner = torch.unique(instances[inside].long(), return_inverse=True)
        classes = numbers // self.INSTANCES_PER_CLASS
        if len(classes) and classes.max() >= len(self._groups):
            raise InputError(f"an instance must be of a class 0 .. {len(self._groups) - 1}, got {int(classes.max())}")
        found, true = predicted[inside].long(), classes[owner]
        size = owner.bincount(minlength=len(numbers)).double()
        weight = self._average_pixels[classes] / size
        hits = owner[found == true].bincount(minlength=len(numbers)).double()
        group_hits = owner[self._groups[found] == self._groups[true]].bincount(minlength=len(numbers)).double()
        self.hits.index_add_(0, classes, hits * weight)
        self.misses.index_add_(0, classes, (size - hits) * weight)
        self.group_hits.index_add_(0, classes, group_hits * weight)

    def iou(self) -> Tensor:
        """iIoU of each class, float64 (num_classes,); nan for a class without instances, or that appears nowhere."""
        weighted = self.hits / (self.hits + self.misses + self.confusion.false_alarms())
        return weighted.where(self._average_pixels > 0, torch.nan)

    def group_iou(self) -> Tensor:
        """iIoU of each group, float64 (num_groups,); nan for one with a class without instances, or that is nowhere."""
        num_groups = int(self._groups.max()) + 1
        zeros = torch.zeros(num_groups, dtype=torch.float64)
        hits = zeros.index_add(0, self._groups, self.group_hits)
        whole = zeros.index_add(0, self._groups, self.hits + self.misses)
        false_alarms = self.confusion.merged(self._groups.tolist()).false_alarms()
        without = zeros.index_add(0, self._groups, (self._average_pixels == 0).double())
        return (hits / (whole + false_alarms)).where(without == 0, torch.nan)
