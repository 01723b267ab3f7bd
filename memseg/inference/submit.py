"""Label maps of a whole split, named and numbered as the test servers of Cityscapes and Pascal VOC want them.

A test split takes hours, and what is broken off should go on where it stopped. So each picture is written whole or not
at all, and one that is there is kept. That must never mix two networks in one submission: a file beside the pictures
says what made them, and who comes with something else is told.

A server wants a class for every pixel. Where a network saw only a region of each picture, the pixels around it get the
class of the nearest one that it saw.

Sources: getPrediction in cityscapesscripts/evaluation/evalPixelLevelSemanticLabeling.py; the development kit of
VOC2012, "Submission of Results" of its section on segmentation.
"""

import hashlib
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from memseg.data.cityscapes import CITYSCAPES_CLASSES, LABEL_IDS
from memseg.data.dataset import ClassList, ImageSplit, Pixels
from memseg.data.voc import VOC_CLASSES
from memseg.errors import InputError
from memseg.files import replace_file
from memseg.inference.images import label_png, save_png
from memseg.inference.labelling import Framing, evaluating, label_image
from memseg.levels import Precision
from memseg.models import SegmentedModel

_LABEL_IDS = np.array(LABEL_IDS, np.uint8)


@dataclass(frozen=True)
class SubmissionFormat:
    """What a test server reads."""

    name: str
    """Of the data set, as `open_images` knows it."""
    classes: ClassList
    folder: str
    """Where the pictures lie, below the folder of the submission; "" for there."""
    suffix: str
    """What follows a picture's key in its file's name."""
    picture: Callable[[Pixels], Image.Image]
    """Of class numbers uint8 (H, W)."""
    archive: str
    """Name of the file that is uploaded, which holds all pictures with their folders."""

    @property
    def note(self) -> str:
        """Name of the file that says what made the pictures."""
        return f"{self.archive.partition('.')[0]}.json"


def cityscapes_format(split: str) -> SubmissionFormat:
    """Cityscapes': one channel of the official label ids, not of the numbers that are trained."""

    def picture(labels: Pixels) -> Image.Image:
        return Image.fromarray(_LABEL_IDS[labels])

    archive = f"cityscapes_{split}.zip"
    return SubmissionFormat("cityscapes", CITYSCAPES_CLASSES, "", "_predLabelIds.png", picture, archive)


def voc_format(split: str, competition: str = "comp6") -> SubmissionFormat:
    """VOC's: palette pictures of class numbers, in the folders of its development kit.

    Args:
        split: Named in the folder.
        competition: "comp5" for what learnt from VOC's own train and val alone, "comp6" for all else: weights from
            ImageNet, or labels from SBD, make it that.
    """
    folder = f"results/VOC2012/Segmentation/{competition}_{split}_cls"

    def picture(labels: Pixels) -> Image.Image:
        return label_png(labels, VOC_CLASSES)

    return SubmissionFormat("voc", VOC_CLASSES, folder, ".png", picture, f"voc_{competition}_{split}.tar.gz")


@dataclass(frozen=True)
class Submission:
    """What was written."""

    images: int
    """Pictures in all."""
    kept: int
    """Those of them that were there already."""
    archive: Path


def weights_digest(model: nn.Module) -> str:
    """A short name of a network's weights, which other weights do not have."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def submit(
    model: SegmentedModel,
    images: ImageSplit,
    out_dir: Path,
    form: SubmissionFormat,
    *,
    made_by: Mapping[str, Any],
    device: torch.device | str = "cpu",
    framing: Framing | None = None,
    precision: Precision = Precision.FLOAT32,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Submission:
    """Write a picture of labels for each image of a split, and the archive of them all.

    Args:
        model: Moved to `device`; run in eval mode, and left in the mode it came in.
        images: The split.
        out_dir: Made if absent.
        form: What the server reads.
        made_by: What decides the labels, as values that JSON has: weights, split, scales. Kept beside the pictures.
        device: Where the network runs.
        framing: What of each picture the network sees; None for all of it at its own size.
        precision: As for `label_image`.
        overwrite: Make the pictures anew that are there, also those of another network.
        progress: Told after each picture how many are done, and how many there are.

    Raises:
        InputError: the folder holds pictures that something else made.
        DataError: pictures are smaller than the framing's region; or one cannot be decoded, the others stay.
    """
    framing = framing or Framing()
    device = torch.device(device)
    framing.check(images)
    folder = out_dir / form.folder
    paths = [folder / f"{images.key(index)}{form.suffix}" for index in range(len(images))]
    if overwrite:
        for path in paths:
            path.unlink(missing_ok=True)
    _claim(out_dir / form.note, made_by, sum(path.exists() for path in paths))
    folder.mkdir(parents=True, exist_ok=True)
    kept = 0
    with evaluating(model, device):
        for index, path in enumerate(paths):
            if path.exists():
                kept += 1
            else:
                image = images.image(index)
                labels = label_image(model, image, framing=framing, device=device, precision=precision)
                save_png(form.picture(_filled(labels, framing)), path)
            if progress:
                progress(index + 1, len(paths))
    archive = out_dir / form.archive
    _write_archive(archive, paths, out_dir)
    return Submission(len(paths), kept, archive)


def _claim(note: Path, made_by: Mapping[str, Any], there: int) -> None:
    """Write down what makes the pictures; refuse where those that are there were made by something else."""
    mine = json.dumps(dict(made_by), indent=2, sort_keys=True) + "\n"
    theirs = note.read_text(encoding="utf-8") if note.is_file() else None
    if there and theirs != mine:
        raise InputError(
            f"{note.parent} holds {there} pictures that something else made ({_differing(note, theirs, mine)}); give "
            "another --out, or --overwrite to make them anew"
        )
    note.parent.mkdir(parents=True, exist_ok=True)
    replace_file(note, mine)


def _differing(note: Path, theirs: str | None, mine: str) -> str:
    """What two notes do not agree on, in words."""
    if theirs is None:
        return f"{note.name} is not there"
    try:
        before, now = json.loads(theirs), json.loads(mine)
        names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        return ", ".join(f"{name} was {before.get(name)}, now {now.get(name)}" for name in names)
    except (ValueError, TypeError, AttributeError):
        return f"{note.name} is damaged"


def _filled(labels: Pixels, framing: Framing) -> Pixels:
    """Labels in which pixels outside the region have the class of the nearest pixel inside it."""
    top, bottom, left, right = framing.region_in((labels.shape[0], labels.shape[1]))
    around = ((top, labels.shape[0] - bottom), (left, labels.shape[1] - right))
    return np.pad(labels[top:bottom, left:right], around, mode="edge")


def _write_archive(archive: Path, paths: list[Path], root: Path) -> None:
    """All pictures by their names below `root`; whole or not there."""
    part = archive.with_name(f".{archive.name}.part")
    try:
        if archive.suffix == ".zip":
            # What is in it is compressed already.
            with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as zipped:
                for path in paths:
                    zipped.write(path, path.relative_to(root))
        else:
            with tarfile.open(part, "w:gz", compresslevel=1) as tarred:
                for path in paths:
                    tarred.add(path, path.relative_to(root))
        part.replace(archive)
    finally:
        part.unlink(missing_ok=True)
