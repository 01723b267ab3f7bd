"""From the name of a data set to one split of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from memseg.data.camvid import open_camvid
from memseg.data.cityscapes import open_cityscapes
from memseg.data.dataset import SegmentationDataset
from memseg.data.folder import open_folder
from memseg.data.streets import Streets
from memseg.errors import InputError, UnknownNameError

_ON_DISK: dict[str, Callable[[str, Path], SegmentationDataset]] = {
    "camvid": open_camvid,
    "cityscapes": open_cityscapes,
    "folder": open_folder,
}
_STREETS_OPTIONS = ("length", "seed", "size")


def dataset_names() -> tuple[str, ...]:
    """What `open_dataset` knows.

    >>> dataset_names()
    ('camvid', 'cityscapes', 'folder', 'streets')
    """
    return (*sorted(_ON_DISK), "streets")


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
    if name not in dataset_names():
        raise UnknownNameError("data set", name, dataset_names())
    if name == "streets":
        if root is not None:
            raise InputError(f"streets are drawn and take no folder, got root {str(root)!r}; leave it out")
        for option in options:
            if option not in _STREETS_OPTIONS:
                raise UnknownNameError("option of streets", option, _STREETS_OPTIONS)
        return Streets(split, **options)
    if options:
        raise InputError(f"{name} takes no options, got {', '.join(sorted(options))}; only streets does")
    if root is None:
        raise InputError(f"{name} lies on disk and needs its folder, got none; give it as data.root")
    return _ON_DISK[name](split, root)
