"""What every data set is, and the pairs of files that most of them are.

A training run of a day should not die in its ninth hour because one label is missing. So opening a split looks at every
file of it once: each image must have a label of the same size and of a kind that can hold class numbers. Only headers
are read for that, thousands of files in a second or two, and all that is wrong is told at once. What only decoding can
show, a file that breaks off or a label value that is no class, is told with the file's name when it is read.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from memseg.errors import DataError, suggest

Pixels = npt.NDArray[np.uint8]

IGNORE_INDEX = 255
"""The value of a target's unlabelled pixels, which neither loss nor metrics count."""

SHOWN_PROBLEMS = 10
"""Lines of an error about a split that are printed; the error carries all of them."""
NOT_A_CLASS = -1
"""In a table of label values: this value must not occur."""

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises on files that are no image, or that are damaged."""
_IMAGE_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})
"""Pillow's 8-bit modes; the deeper ones would be clipped in silence."""
_LABEL_MODES = frozenset({"L", "P"})


@dataclass(frozen=True)
class ClassList:
    """The classes of a data set, in the order of their numbers.

    >>> ClassList(("road", "sky"), ((128, 64, 128), (70, 130, 180))).names[1]
    'sky'
    """

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    """Red, green, blue of each class in pictures, 0 to 255."""

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colours):
            raise ValueError(f"each class needs one colour, got {len(self.names)} names, {len(self.colours)} colours")


class SegmentationDataset(ABC):
    """One split of a data set: images, and for each the class of every pixel."""

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

    @abstractmethod
    def target(self, index: int) -> Pixels:
        """The class number of each pixel, uint8 (H, W); IGNORE_INDEX where there is none.

        Raises:
            DataError: the file cannot be decoded, or holds a value that is no class.
        """


@dataclass(frozen=True)
class Pair:
    """An image file and its label file."""

    key: str
    image: Path
    label: Path
    table: npt.NDArray[np.int16]
    """Class number, IGNORE_INDEX or NOT_A_CLASS of each label value; (256,)."""


def label_table(numbers: dict[int, int], *, ignored: Iterable[int] = ()) -> npt.NDArray[np.int16]:
    """A `Pair`'s table from class numbers by label value; a value that is in neither argument is not a class.

    >>> label_table({7: 0, 8: 1}, ignored=[0])[[7, 8, 0, 9]].tolist()
    [0, 1, 255, -1]
    """
    table = np.full(256, NOT_A_CLASS, np.int16)
    table[list(ignored)] = IGNORE_INDEX
    for value, number in numbers.items():
        table[value] = number
    return table


class PairedFiles(SegmentationDataset):
    """A split that is pairs of files on disk.

    Args:
        name: As `open_dataset` knows the data set.
        split: Name of the split.
        root: The data set's folder; errors begin with it.
        classes: Its classes.
        pairs: In the order of the indices.
        hint: What to do when no label at all is there.

    Raises:
        DataError: there are no pairs, two have one key, or a file is missing, is no image, or differs in size
            from its partner.
    """

    def __init__(
        self, name: str, split: str, *, root: Path, classes: ClassList, pairs: Sequence[Pair], hint: str = ""
    ) -> None:
        self.name, self.split, self.classes, self.root = name, split, classes, root
        self._pairs = list(pairs)
        self._sizes: list[tuple[int, int]] = []
        if not pairs:
            raise DataError(str(root), [f"split {split!r} must hold at least one image, found none"])
        if not any(pair.label.is_file() for pair in pairs):
            problem = f"split {split!r} has {len(pairs)} images and not one label, such as {pairs[0].label}"
            raise DataError(str(root), [f"{problem}; {hint or 'take a split with labels'}"])
        problems: list[str] = []
        owners: dict[str, Path] = {}
        for pair in pairs:
            if pair.key in owners:
                first, second = self._short(owners[pair.key]), self._short(pair.image)
                problems.append(f"{first} and {second} share one label; rename one of them, with a label of its own")
            owners.setdefault(pair.key, pair.image)
            self._sizes.append(self._check(pair, problems))
        if problems:
            raise split_error(root, problems)

    def __len__(self) -> int:
        return len(self._pairs)

    def key(self, index: int) -> str:
        return self._pairs[index].key

    def size(self, index: int) -> tuple[int, int]:
        return self._sizes[index]

    def image(self, index: int) -> Pixels:
        return read_image(self._pairs[index].image)

    def target(self, index: int) -> Pixels:
        pair = self._pairs[index]
        values = _decode(pair.label, None)
        numbers = pair.table[values]
        if numbers.min() == NOT_A_CLASS:
            bad = np.unique(values[numbers == NOT_A_CLASS]).tolist()
            row, column = (int(place) for place in np.argwhere(numbers == NOT_A_CLASS)[0])
            known = np.flatnonzero(pair.table != NOT_A_CLASS).tolist()
            found = f"found {_ranges(bad)}, first at row {row}, column {column}"
            raise DataError(
                str(pair.label),
                [f"label values must be {_ranges(known)} ({self.name}), {found}; correct the label or the class list"],
            )
        return numbers.astype(np.uint8)

    def _short(self, path: Path) -> str:
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def _check(self, pair: Pair, problems: list[str]) -> tuple[int, int]:
        """(height, width) of the image by its header; what is wrong with the pair joins `problems`."""
        image, label = self._short(pair.image), self._short(pair.label)
        size = (0, 0)
        try:
            size, mode = _header(pair.image)
            if mode not in _IMAGE_MODES:
                problems.append(f"{image}: must have 8 bits for each channel, found Pillow mode {mode}; convert it")
        except _UNREADABLE as error:
            problems.append(f"{image}: cannot be read as an image ({_reason(error)}); restore or remove it")
        if not pair.label.is_file():
            problems.append(f"{image}: has no label; add {label}, or remove the image")
            return size
        try:
            label_size, mode = _header(pair.label)
        except _UNREADABLE as error:
            problems.append(f"{label}: cannot be read as an image ({_reason(error)}); restore it")
            return size
        if mode not in _LABEL_MODES:
            problems.append(
                f"{label}: must hold one 8-bit class number a pixel (Pillow mode L or P), found mode {mode}"
            )
        if size != (0, 0) and label_size != size:
            (height, width), (label_height, label_width) = size, label_size
            problems.append(
                f"{label}: must be {height}x{width} like its image, found {label_height}x{label_width}"
                " (height x width); take the label that was drawn on this image"
            )
        return size


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
    return _decode(path, "RGB")


def _decode(path: Path, mode: str | None) -> Pixels:
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode) if mode and image.mode != mode else image, np.uint8)
    except _UNREADABLE as error:
        problem = f"cannot be decoded ({_reason(error)}); restore it from its source, or remove it"
        raise DataError(str(path), [problem]) from error


def _header(path: Path) -> tuple[tuple[int, int], str]:
    """((height, width), Pillow mode), from the header alone."""
    with Image.open(path) as image:
        return (image.height, image.width), image.mode


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    return str(error) or type(error).__name__


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"


def _ranges(values: Sequence[int]) -> str:
    """Whole numbers in rising order as people write them.

    >>> _ranges([0, 1, 2, 255]), _ranges([12])
    ('0-2, 255', '12')
    """
    parts: list[list[int]] = []
    for value in values:
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
