"""Data sets of images and label maps, and the view of them that training reads.

That view, `memseg.data.training_view`, and its `loader` are not imported here: they load torchvision, which takes a
second that only training needs.
"""

from memseg.data.class_weights import CLASS_WEIGHT_SCHEMES, class_weights
from memseg.data.dataset import IGNORE_INDEX, ClassList, ImageSplit, SegmentationDataset
from memseg.data.loading import dataset_names, open_dataset, open_images
from memseg.data.paired_files import ImageFiles
from memseg.data.prepare import Region, resize_image
from memseg.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Fit,
    pad_to,
    pad_to_multiple,
    to_tensor,
)

__all__ = [
    "CLASS_WEIGHT_SCHEMES",
    "IGNORE_INDEX",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ClassList",
    "Fit",
    "ImageFiles",
    "ImageSplit",
    "Region",
    "SegmentationDataset",
    "class_weights",
    "dataset_names",
    "open_dataset",
    "open_images",
    "pad_to",
    "pad_to_multiple",
    "resize_image",
    "to_tensor",
]
