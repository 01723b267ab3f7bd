"""The score of a network on a split of a data set.

Scores are compared between papers and between frameworks, so they must be those of the labels as they were drawn: every
label pixel at its own size, none resized, whatever size the network works at.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from memseg.data import IGNORE_INDEX, SegmentationDataset
from memseg.errors import DataError, InputError
from memseg.inference.labelling import Framing, Network, label_image
from memseg.training.metrics import ConfusionMatrix

Progress = Callable[[int, int], None]
"""Called with the pictures done and the pictures in all."""


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found. Scores are shares, from 0 to 1."""

    images: int
    """Pictures in the split."""
    miou: float
    """Mean of `iou` over the classes that appear in the labels or in the predictions."""
    pixel_accuracy: float
    """Share of labelled pixels whose class was found."""
    iou: dict[str, float | None]
    """Intersection over union of each class over the whole split; None for a class that appears nowhere."""
    seconds: float
    """Wall time of the whole pass, reading of pictures included."""


def evaluate(
    model: Network,
    dataset: SegmentationDataset,
    *,
    device: torch.device | str = "cpu",
    framing: Framing | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """The score of a network on every picture of a split, one picture at a time.

    Args:
        model: Moved to `device`; run in eval mode, and left in the mode it came in.
        dataset: Its classes are those of the network.
        device: Where the network runs.
        framing: What of each picture the network sees; None for all of it at its own size. Labels outside its region
            are not counted.
        progress: Told after each picture.

    Raises:
        InputError: network and data set differ in their number of classes, or a picture is smaller than the region.
        DataError: a picture cannot be read, or no pixel of the split is labelled.
    """
    names = dataset.classes.names
    if model.num_classes != len(names):
        raise InputError(
            f"the network must have a class for each of the data set's {len(names)}, it has {model.num_classes}; "
            f"evaluate it on the data set it was trained on"
        )
    framing = framing or Framing()
    device = torch.device(device)
    started = time.perf_counter()
    confusion = ConfusionMatrix(len(names))
    was_training = model.training
    model.to(device).eval()
    try:
        for index in range(len(dataset)):
            predicted = torch.from_numpy(label_image(model, dataset.image(index), framing=framing, device=device))
            target = torch.from_numpy(dataset.target(index))
            confusion.update(predicted, torch.where(predicted == IGNORE_INDEX, IGNORE_INDEX, target))
            if progress:
                progress(index + 1, len(dataset))
    finally:
        model.train(was_training)
    if not confusion.counts.any():
        raise DataError(
            f"{dataset.name}, split {dataset.split}", ["no pixel that the network sees is labelled; there is no score"]
        )
    return EvalResult(
        images=len(dataset),
        miou=confusion.miou(),
        pixel_accuracy=confusion.pixel_accuracy(),
        iou={name: None if math.isnan(iou) else iou for name, iou in zip(names, confusion.iou().tolist(), strict=True)},
        seconds=time.perf_counter() - started,
    )
