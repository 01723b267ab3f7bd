"""What every data set is, and how its files are found and read.

Training, scores and class weights need labels; a network that is trained needs pictures only, and the official test
splits have no labels. So there are two nouns: an ImageSplit has pictures and says what the classes are, a
SegmentationDataset has the class of every pixel beside it.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from memseg.errors import DataError, suggest

Pixels = npt.NDArray[np.uint8]
InstanceIds = npt.NDArray[np.uint16]

IGNORE_INDEX = 255
"""The value of a target's unlabelled pixels, which neither loss nor metrics count."""

SHOWN_PROBLEMS = 10
"""Lines of an error about a split that are printed; the error carries all of them."""
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises on files that are no image, or that are damaged."""


@dataclass(frozen=True)
class ClassList:
    """The classes of a data set, in the order of their numbers.

    >>> ClassList(("road", "sky"), ((128, 64, 128), (70, 130, 180))).names[1]
    'sky'
    """

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    """Red, green, blue of each class in pictures, 0 to 255."""
    categories: tuple[str, ...] = ()
    """The group of each class, where the data set scores groups too, as Cityscapes does; otherwise empty."""

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colours):
            raise ValueError(f"each class needs one colour, got {len(self.names)} names, {len(self.colours)} colours")
        if self.categories and len(self.names) != len(self.categories):
            raise ValueError(
                f"each class needs one category, got {len(self.names)} names, {len(self.categories)} categories"
            )


class ImageSplit(ABC):
    """One split of a data set: its images, and which classes their pixels may have."""

    name: str
    """As `open_dataset` knows it."""
    split: str
    classes: ClassList

    @abstractmethod
    def __len__(self) -> int:
        """Number of images in the split."""

    @abstractmethod
    def key(self, index: int) -> str:
        """A name for the image that no other of the split has, and that a file may have."""

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels, without decoding the image."""

    @abstractmethod
    def image(self, index: int) -> Pixels:
        """The image, uint8 (H, W, 3), RGB.

        Raises:
            DataError: the file cannot be decoded.
        """


class SegmentationDataset(ImageSplit):
    """One split of a data set: images, and for each the class of every pixel."""

    has_instances: bool = False
    """Whether `instances` knows every image."""

    @abstractmethod
    def target(self, index: int) -> Pixels:
        """The class number of each pixel, uint8 (H, W); IGNORE_INDEX where there is none.

        Raises:
            DataError: the file cannot be decoded, or holds a value that is no class.
        """

    def instances(self, index: int) -> InstanceIds | None:
        """Which single thing each pixel belongs to, uint16 (H, W), numbered as the data set does; None if not known.

        Raises:
            DataError: the file cannot be decoded.
        """
        return None

    def source(self, index: int, part: str) -> str | None:
        """What decides `part` ("image" or "target") of a sample: alike as long as it is; None where nothing can tell.

        Raises:
            DataError: the file is gone.
        """
        return None


def split_error(root: Path, problems: Sequence[str]) -> DataError:
    """An error that carries all `problems` and prints the first few.

    >>> error = split_error(Path("root"), [f"{n}.png: has no label" for n in range(12)])
    >>> print(error)  # doctest: +ELLIPSIS
    root: 12 problems
      0.png: has no label
      ...
      9.png: has no label
      ... and 2 more
    """
    error = DataError(str(root), problems)
    if len(problems) > SHOWN_PROBLEMS:
        lines = str(error).split("\n")[: SHOWN_PROBLEMS + 1]
        error.args = ("\n".join([*lines, f"  ... and {len(problems) - SHOWN_PROBLEMS} more"]),)
    return error


def split_folder(root: Path, images: str, split: str) -> Path:
    """The folder root/images/split, when it is there.

    Args:
        root: The data set's folder.
        images: The folder of images inside it, with a folder for each split; "" is `root` itself.
        split: Name of the split.

    Raises:
        DataError: it is not; tells which splits there are.
    """
    if not root.is_dir():
        raise DataError(str(root), ["must be the folder of the data set, found no such folder; correct data.root"])
    above = root / images
    if not above.is_dir():
        problem = f"must hold a folder {images}, found {_listing(root)}; give the folder above {images} as data.root"
        raise DataError(str(root), [problem])
    folder = above / split
    if not split or not folder.is_dir():
        splits = sorted(path.name for path in above.iterdir() if path.is_dir() and not path.name.startswith("."))
        near = suggest(split, splits)
        mend = f"; did you mean {near}?" if near else ""
        raise DataError(str(root), [f"there is no split {split!r}, found {', '.join(splits) or 'none'}{mend}"])
    return folder


def visible_files(folder: Path, ending: str = "") -> list[Path]:
    """Files anywhere below `folder` with that ending, sorted; not those whose name begins with a dot."""
    found = (path for path in folder.rglob(f"*{ending}") if not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def read_image(path: Path) -> Pixels:
    """The image in a file, uint8 (H, W, 3), RGB; a rotation noted in the file's EXIF data is not carried out.

    Raises:
        DataError: it is no image, or breaks off.
    """
    return np.asarray(decode(path, "RGB"), np.uint8)


def decode(path: Path, mode: str | None = None) -> npt.NDArray[Any]:
    """The values in an image file, (H, W) or (H, W, channels).

    Args:
        path: Of the file.
        mode: Pillow's name of what to convert to; None for the values as they are, such as numbers in a palette.

    Raises:
        DataError: it is no image, or breaks off.
    """
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode) if mode and image.mode != mode else image)
    except UNREADABLE as error:
        raise undecodable(path, error) from error


def undecodable(path: Path, error: BaseException) -> DataError:
    """What is raised when a file's content is damaged."""
    return DataError(str(path), [f"cannot be decoded ({reason(error)}); restore it from its source, or remove it"])


def header(path: Path) -> tuple[tuple[int, int], str]:
    """((height, width), Pillow mode) of an image file, from its header alone."""
    with Image.open(path) as image:
        return (image.height, image.width), image.mode


def reason(error: BaseException) -> str:
    """Why a file cannot be read, in the words of what tried."""
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    return str(error) or type(error).__name__


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
