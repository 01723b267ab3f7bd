"""From the name of a data set to one split of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memseg.data.ade20k import ade20k_images, open_ade20k
from memseg.data.camvid import camvid_images, open_camvid
from memseg.data.cityscapes import cityscapes_images, open_cityscapes
from memseg.data.dataset import SegmentationDataset
from memseg.data.folder import folder_images, open_folder
from memseg.data.paired_files import ImageFiles
from memseg.data.streets import Streets
from memseg.data.voc import open_voc, voc_images
from memseg.errors import InputError, UnknownNameError


@dataclass(frozen=True)
class _OnDisk:
    """How a data set's folder is read, from the name of a split and the folder."""

    labelled: Callable[[str, Path], SegmentationDataset]
    images: Callable[[str, Path], ImageFiles]


_ON_DISK = {
    "ade20k": _OnDisk(open_ade20k, ade20k_images),
    "camvid": _OnDisk(open_camvid, camvid_images),
    "cityscapes": _OnDisk(open_cityscapes, cityscapes_images),
    "folder": _OnDisk(open_folder, folder_images),
    "voc": _OnDisk(open_voc, voc_images),
}
_STREETS_OPTIONS = ("length", "seed", "size")


def dataset_names() -> tuple[str, ...]:
    """What `open_dataset` knows.

    >>> dataset_names()
    ('ade20k', 'camvid', 'cityscapes', 'folder', 'streets', 'voc')
    """
    return tuple(sorted([*_ON_DISK, "streets"]))


def open_dataset(name: str, split: str, *, root: Path | None = None, **options: Any) -> SegmentationDataset:
    """One split of a data set, checked from the first file to the last.

    Args:
        name: One of `dataset_names()`.
        split: As the data set names it: "train", "val".
        root: Its folder on disk; streets, which are drawn, have none.
        options: For streets: size (height, width), length, seed (see `Streets`). The others take none.

    Raises:
        UnknownNameError: no such data set, option, or split of streets.
        InputError: `root` is missing, or is given where there is none; an option is out of range.
        DataError: the files are not what the data set's layout promises.

    >>> open_dataset("streets", "train", size=(128, 256), length=8).key(7)
    'train_00007'
    """
    if name != "streets":
        on_disk, folder = _on_disk(name, root)
        if options:
            raise InputError(f"{name} takes no options, got {', '.join(sorted(options))}; only streets does")
        return on_disk.labelled(split, folder)
    if root is not None:
        raise InputError(f"streets are drawn and take no folder, got root {str(root)!r}; leave it out")
    for option in options:
        if option not in _STREETS_OPTIONS:
            raise UnknownNameError("option of streets", option, _STREETS_OPTIONS)
    return Streets(split, **options)


def open_images(name: str, split: str, *, root: Path | None = None) -> ImageFiles:
    """The pictures of one split, which needs no labels: Cityscapes' and VOC's test splits have none.

    Args:
        name: One of `dataset_names()` that lies on disk.
        split: As the data set names it: "test".
        root: Its folder.

    Raises:
        UnknownNameError: no such data set.
        InputError: `root` is missing, or the data set is drawn.
        DataError: the pictures are not what the data set's layout promises.
    """
    if name == "streets":
        raise InputError("streets are drawn and have no files of pictures; name a data set that lies on disk")
    on_disk, folder = _on_disk(name, root)
    return on_disk.images(split, folder)


def _on_disk(name: str, root: Path | None) -> tuple[_OnDisk, Path]:
    if name not in _ON_DISK:
        raise UnknownNameError("data set", name, dataset_names())
    if root is None:
        raise InputError(f"{name} lies on disk and needs its folder, got none; give it as data.root")
    return _ON_DISK[name], root
