"""Weights of the classes in the loss, from how often each occurs in a training split.

A third of a street scene is road and a hundredth of it poles, so a plain mean over pixels learns the road. The usual
cure is a weight for each class, larger for rarer ones. Two schemes are in use; both need one look at every label.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from memseg.data.dataset import IGNORE_INDEX, SegmentationDataset
from memseg.errors import DataError, UnknownNameError

ClassWeightScheme = Literal["median-frequency", "enet"]
CLASS_WEIGHT_SCHEMES: tuple[str, ...] = get_args(ClassWeightScheme)
"""What `class_weights` knows."""

_ENET_OFFSET = 1.02
"""Bounds ENet's weights to about 1.4 .. 50.5. Source: Paszke et al., section 5.2."""


def class_weights(
    dataset: SegmentationDataset, scheme: str, progress: Callable[[int, int], None] | None = None
) -> tuple[float, ...]:
    """The weight of each class, in the order of their numbers.

    A class that never occurs gets 0: no pixel of the split asks for its weight, and it has no frequency to take part
    in a median.

    Args:
        dataset: The training split; every label is read, at its full size.
        scheme: "median-frequency": the median of all frequencies over that of the class, where a frequency is the
            pixels of a class over all pixels of the images in which it occurs. "enet": 1 / ln(1.02 + share), where
            the share is that of all labelled pixels.
        progress: Told the labels read and the labels in all, after each.

    Raises:
        UnknownNameError: no such scheme.
        DataError: a label cannot be read, or no pixel is labelled.

    >>> from memseg.data.streets import Streets
    >>> weights = class_weights(Streets("train", size=(64, 128), length=8), "median-frequency")
    >>> weights[Streets.classes.names.index("person")] > weights[Streets.classes.names.index("road")]
    True

    Sources: Eigen and Fergus, ICCV 2015, section 4.3.2; Paszke et al., ENet, arXiv:1606.02147, section 5.2.
    """
    if scheme not in CLASS_WEIGHT_SCHEMES:
        raise UnknownNameError("scheme of class weights", scheme, CLASS_WEIGHT_SCHEMES)
    pixels, surroundings = _count(dataset, progress)
    there = pixels > 0
    if not there.any():
        raise DataError(f"{dataset.name}, split {dataset.split}", ["no pixel is labelled; there are no class weights"])
    weights = np.zeros(len(pixels))
    if scheme == "enet":
        weights[there] = 1 / np.log(_ENET_OFFSET + pixels[there] / pixels.sum())
    else:
        frequency = pixels[there] / surroundings[there]
        weights[there] = np.median(frequency) / frequency
    return tuple(weights.tolist())


def _count(
    dataset: SegmentationDataset, progress: Callable[[int, int], None] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of each class, its pixels, and all pixels of the images that have some of it; both int64 (K,)."""
    number = len(dataset.classes.names)
    pixels, surroundings = np.zeros(number, np.int64), np.zeros(number, np.int64)
    for index in range(len(dataset)):
        target = dataset.target(index)
        counts = np.bincount(target.reshape(-1), minlength=IGNORE_INDEX + 1)[:number]
        pixels += counts
        surroundings += (counts > 0) * target.size
        if progress:
            progress(index + 1, len(dataset))
    return pixels, surroundings
