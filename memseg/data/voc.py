"""PASCAL VOC 2012, segmentation: photographs of any size, 20 kinds of things and the background, 255 = border or void.

    root/VOCdevkit/VOC2012/      or root itself, when it is VOC2012 or VOCdevkit
        ImageSets/Segmentation/<split>.txt        train, val, trainval, or test, which has no labels
        JPEGImages/<image>.jpg
        SegmentationClass/<image>.png             palette pictures

The split `train_aug` adds the labels that Hariharan et al. drew (SBD) to VOC's training split, less all that is in
VOC's val: 10,582 images of the real sets. They are read from either of

    SegmentationClassAug/<image>.png              in VOC2012 or in root: the label maps as pictures, as often handed on
    benchmark_RELEASE/dataset/                    in root or in VOC2012: the release, with cls/<image>.mat

torchvision's VOCSegmentation and SBDataset know neither `test` nor this union, nor check the files; tests hold what is
read here to what they read.

Sources: Everingham et al., IJCV 2010; Hariharan et al., "Semantic Contours from Inverse Detectors", ICCV 2011.
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memseg.data.dataset import IGNORE_INDEX, UNREADABLE, ClassList, undecodable
from memseg.data.folder import spread_colour
from memseg.data.paired_files import ImageFile, ImageFiles, Label, LabelFormat, PairedFiles, label_table
from memseg.errors import DataError, suggest

_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOC_CLASSES = ClassList(_NAMES, tuple(spread_colour(number) for number in range(len(_NAMES))))
AUGMENTED = "train_aug"
_TABLE = label_table({number: number for number in range(len(_NAMES))}, ignored=[IGNORE_INDEX])


def open_voc(split: str, root: Path) -> PairedFiles:
    """The split of VOC 2012 in or below the folder `root`.

    Raises:
        DataError: the layout above does not hold, or SBD is not there for `train_aug`.
    """
    voc = _voc_folder(root)
    if split == AUGMENTED:
        pairs = _augmented_pairs(root, voc)
    else:
        pairs = [(_image(name, voc), _voc_label(name, voc)) for name in _listed(split, root, voc)]
    hint = "take train, val, trainval or train_aug; memseg predict needs no labels"
    return PairedFiles("voc", split, root=root, classes=VOC_CLASSES, pairs=pairs, hint=hint)


def voc_images(split: str, root: Path) -> ImageFiles:
    """The pictures of a split, with labels or without.

    Raises:
        DataError: as for `open_voc`.
    """
    voc = _voc_folder(root)
    if split == AUGMENTED:
        images = [image for image, _ in _augmented_pairs(root, voc)]
    else:
        images = [_image(name, voc) for name in _listed(split, root, voc)]
    return ImageFiles("voc", split, root=root, classes=VOC_CLASSES, images=images)


def _voc_folder(root: Path) -> Path:
    """The folder VOC2012: `root`, or in it."""
    if not root.is_dir():
        raise DataError(str(root), ["must be the folder of the data set, found no such folder; correct data.root"])
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    problem = "must hold VOCdevkit/VOC2012 with JPEGImages, as VOCtrainval_11-May-2012.tar unpacks; correct data.root"
    raise DataError(str(root), [problem])


def _listed(split: str, root: Path, voc: Path) -> list[str]:
    """Names of the images of a split, in the order of its list."""
    lists = voc / "ImageSets" / "Segmentation"
    path = lists / f"{split}.txt"
    if not split or not path.is_file():
        splits = sorted([*(found.stem for found in lists.glob("*.txt")), AUGMENTED])
        near = suggest(split, splits)
        mend = f"; did you mean {near}?" if near else ""
        raise DataError(str(root), [f"there is no split {split!r} in {lists}, found {', '.join(splits)}{mend}"])
    return _names_in(path)


def _names_in(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path), [f"must be a text file with the name of one image on each line: {error}"]) from error


def _image(name: str, voc: Path) -> ImageFile:
    return ImageFile(name, voc / "JPEGImages" / f"{name}.jpg")


def _voc_label(name: str, voc: Path) -> Label:
    return Label(voc / "SegmentationClass" / f"{name}.png", _TABLE)


def _augmented_pairs(root: Path, voc: Path) -> list[tuple[ImageFile, Label]]:
    """VOC's training split, then what SBD adds to it, less VOC's val."""
    train, held_out = _listed("train", root, voc), set(_listed("val", root, voc))
    known = held_out.union(train)
    pairs = [(_image(name, voc), _voc_label(name, voc)) for name in train]
    for pictures in (voc / "SegmentationClassAug", root / "SegmentationClassAug"):
        if pictures.is_dir():
            added = sorted({path.stem for path in pictures.glob("[!.]*.png")} - known)
            return [*pairs, *((_image(name, voc), Label(pictures / f"{name}.png", _TABLE)) for name in added)]
    for release in (root / "benchmark_RELEASE" / "dataset", voc / "benchmark_RELEASE" / "dataset"):
        if release.is_dir():
            added = sorted({*_names_in(release / "train.txt"), *_names_in(release / "val.txt")} - known)
            return [*pairs, *((_sbd_image(name, voc, release), _sbd_label(name, release)) for name in added)]
    raise DataError(
        str(root),
        [
            f"split {AUGMENTED!r} needs the labels of SBD; unpack its benchmark.tgz"
            " (www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours) so that"
            f" {root / 'benchmark_RELEASE' / 'dataset'} is there, or put its label maps as pictures into"
            f" {voc / 'SegmentationClassAug'}"
        ],
    )


def _sbd_image(name: str, voc: Path, release: Path) -> ImageFile:
    """VOC's picture, or the same in SBD's release: VOC's archive of 2012 has nearly all of them."""
    image = _image(name, voc)
    return image if image.path.is_file() else ImageFile(name, release / "img" / f"{name}.jpg")


def _sbd_label(name: str, release: Path) -> Label:
    return Label(release / "cls" / f"{name}.mat", _TABLE, form=_MAT)


def _check_mat(path: Path) -> str | None:
    """What is wrong with a MATLAB file, by its first words."""
    with path.open("rb") as file:
        start = file.read(19)
    return None if start == b"MATLAB 5.0 MAT-file" else f"must be a MATLAB 5.0 file, begins with {start!r}; restore it"


def _decode_mat(path: Path) -> npt.NDArray[Any]:
    """GTcls.Segmentation of an SBD file: the class of each pixel, uint8 (H, W).

    Raises:
        DataError: the file is damaged, or holds something else.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        found = np.asarray(loadmat(path, variable_names=["GTcls"])["GTcls"]["Segmentation"].item())
    except (*UNREADABLE, MatReadError, zlib.error, LookupError, TypeError, NotImplementedError) as error:
        raise undecodable(path, error) from error
    if found.dtype != np.uint8 or found.ndim != 2:
        problem = f"GTcls.Segmentation must be uint8 (H, W), found {found.dtype} {found.shape}; restore the file"
        raise DataError(str(path), [problem])
    return found


_MAT = LabelFormat(_check_mat, _decode_mat)
