"""How good a segmentation is: counts first, scores from the counts.

The mean over classes of intersection over union must be taken over a whole split, never averaged over images. So each
image only adds to one table of counts. Counts add, also between processes, and the scores are read off at the end.
"""

import torch
from torch import Tensor

from memseg.data import IGNORE_INDEX
from memseg.errors import InputError


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
