"""Data sets of images and label maps, and the view of them that training reads."""

from memseg.data.dataset import IGNORE_INDEX, ClassList, SegmentationDataset
from memseg.data.loading import dataset_names, open_dataset
from memseg.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Fit,
    TrainingView,
    pad_to,
    pad_to_multiple,
    to_tensor,
)

__all__ = [
    "IGNORE_INDEX",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ClassList",
    "Fit",
    "SegmentationDataset",
    "TrainingView",
    "dataset_names",
    "open_dataset",
    "pad_to",
    "pad_to_multiple",
    "to_tensor",
]
