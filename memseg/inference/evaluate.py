"""The score of a network on a split of a data set.

Scores are compared between papers and between frameworks, so they must be those of the labels as they were drawn: every
label pixel at its own size, none resized, whatever size the network works at. What a data set scores beside classes is
scored where its files allow it: categories, and single instances. Where some pictures have no map of instances, iIoU is
that of the others, and the result says how many those are.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memseg.data import IGNORE_INDEX, ClassList, SegmentationDataset
from memseg.data.cityscapes import INSTANCE_CATEGORIES
from memseg.data.dataset import Pixels
from memseg.errors import DataError, InputError
from memseg.inference.instances import category_numbers, class_instances, instance_counts
from memseg.inference.labelling import Framing, Network, evaluating, label_image
from memseg.levels import Precision
from memseg.training.metrics import AVERAGE_INSTANCE_PIXELS, ConfusionMatrix, InstanceCounts

Progress = Callable[[int, int], None]
"""Called with the pictures done and the pictures in all."""

Scores = dict[str, float | None]
"""A share from 0 to 1 by name; None for what appears nowhere, or has no such score."""


@dataclass(frozen=True)
class ImageScore:
    """Of one picture."""

    index: int
    """In its split."""
    key: str
    miou: float | None
    """Mean over the classes that appear in this picture's labels or in its prediction; None where none is labelled."""
    pixel_accuracy: float | None
    labelled_pixels: int


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found. Scores are shares, from 0 to 1."""

    images: int
    """Pictures in the split."""
    miou: float
    """Mean of `iou` over the classes that appear in the labels or in the predictions."""
    pixel_accuracy: float
    """Share of labelled pixels whose class was found."""
    iou: Scores
    """Intersection over union of each class over the whole split; None for a class that appears nowhere."""
    category_miou: float | None
    """Mean of `category_iou`; None where the data set has no categories."""
    category_iou: Scores
    """The same of groups of classes: one taken for another of its group is a hit. Empty where there are none."""
    miiou: float | None
    """Mean of `iiou`; None where no picture has a map of instances."""
    iiou: Scores
    """Cityscapes' iIoU, in which each instance counts alike; only classes whose instances are told apart."""
    category_miiou: float | None
    category_iiou: Scores
    """The same of categories."""
    instance_images: int
    """Pictures with a map of instances, which alone `iiou` is taken over."""
    confusion: ConfusionMatrix
    image_scores: tuple[ImageScore, ...]
    """Of each picture, in the order of the split."""
    seconds: float
    """Wall time of the whole pass, reading of pictures included."""

    def to_json(self) -> dict[str, Any]:
        """The scores as plain values, None for what there is not; without single pictures and the confusion matrix."""
        told = {name: value for name, value in vars(self).items() if name not in ("confusion", "image_scores")}
        return {name: None if value == {} else value for name, value in told.items()}


def evaluate(
    model: Network,
    dataset: SegmentationDataset,
    *,
    device: torch.device | str = "cpu",
    framing: Framing | None = None,
    precision: Precision = Precision.FLOAT32,
    instances: bool = True,
    progress: Progress | None = None,
    labelled: Callable[[ImageScore, Pixels], None] | None = None,
) -> EvalResult:
    """The score of a network on every picture of a split, one picture at a time.

    Args:
        model: Moved to `device`; run in eval mode, and left in the mode it came in.
        dataset: Its classes are those of the network.
        device: Where the network runs.
        framing: What of each picture the network sees; None for all of it at its own size. Labels outside its region
            are not counted.
        precision: As for `label_image`.
        instances: Read the maps of single instances too, where there are some, and score iIoU.
        progress: Told after each picture.
        labelled: Given each picture's score and its labels, uint8 (H, W), 255 outside the region.

    Raises:
        InputError: network and data set differ in their number of classes.
        DataError: pictures are smaller than the region, one cannot be read, or no pixel of the split is labelled.
    """
    names = dataset.classes.names
    if model.num_classes != len(names):
        raise InputError(
            f"the network must have a class for each of the data set's {len(names)}, it has {model.num_classes}; "
            f"evaluate it on the data set it was trained on"
        )
    framing = framing or Framing()
    framing.check(dataset)
    device = torch.device(device)
    started = time.perf_counter()
    confusion = ConfusionMatrix(len(names))
    single = instance_counts(dataset.classes) if instances else None
    scores: list[ImageScore] = []
    with evaluating(model, device):
        for index in range(len(dataset)):
            labels = label_image(model, dataset.image(index), framing=framing, device=device, precision=precision)
            predicted = torch.from_numpy(labels)
            unseen = predicted == IGNORE_INDEX
            target = torch.from_numpy(dataset.target(index)).masked_fill(unseen, IGNORE_INDEX)
            one = ConfusionMatrix(len(names))
            one.update(predicted, target)
            confusion.counts += one.counts
            if single and (ids := dataset.instances(index)) is not None:
                single.update(predicted, target, torch.from_numpy(class_instances(ids)).masked_fill_(unseen, -1))
            scores.append(_image_score(index, dataset.key(index), one))
            if labelled:
                labelled(scores[-1], labels)
            if progress:
                progress(index + 1, len(dataset))
    if not confusion.counts.any():
        raise DataError(
            f"{dataset.name}, split {dataset.split}", ["no pixel that the network sees is labelled; there is no score"]
        )
    category_iou = _category_iou(dataset.classes, confusion)
    iiou, category_iiou = _instance_iou(dataset.classes, single)
    return EvalResult(
        images=len(dataset),
        miou=confusion.miou(),
        pixel_accuracy=confusion.pixel_accuracy(),
        iou=_by_name(names, confusion.iou()),
        category_miou=_mean(category_iou),
        category_iou=category_iou,
        miiou=_mean(iiou),
        iiou=iiou,
        category_miiou=_mean(category_iiou),
        category_iiou=category_iiou,
        instance_images=single.images if single else 0,
        confusion=confusion,
        image_scores=tuple(scores),
        seconds=time.perf_counter() - started,
    )


def _image_score(index: int, key: str, counts: ConfusionMatrix) -> ImageScore:
    pixels = int(counts.counts.sum())
    if not pixels:
        return ImageScore(index, key, None, None, 0)
    return ImageScore(index, key, counts.miou(), counts.pixel_accuracy(), pixels)


def _category_iou(classes: ClassList, confusion: ConfusionMatrix) -> Scores:
    if not classes.categories:
        return {}
    return _by_name(list(dict.fromkeys(classes.categories)), confusion.merged(category_numbers(classes)).iou())


def _instance_iou(classes: ClassList, instances: InstanceCounts | None) -> tuple[Scores, Scores]:
    """iIoU of the classes, and of the categories, that have it."""
    if instances is None or not instances.images:
        return {}, {}
    of_classes = _by_name(classes.names, instances.iou())
    of_categories = _by_name(list(dict.fromkeys(classes.categories)), instances.group_iou())
    return (
        {name: iou for name, iou in of_classes.items() if name in AVERAGE_INSTANCE_PIXELS},
        {name: of_categories[name] for name in INSTANCE_CATEGORIES},
    )


def _by_name(names: Sequence[str], values: Tensor) -> Scores:
    return {name: None if math.isnan(one) else one for name, one in zip(names, values.tolist(), strict=True)}


def _mean(scores: Scores) -> float | None:
    """Over what appears; None where nothing does."""
    found = [score for score in scores.values() if score is not None]
    return sum(found) / len(found) if found else None
