"""Splits that are files on disk: pictures alone, or pairs of a picture and a label.

A training run of a day should not die in its ninth hour because one label is missing. So opening a split looks at every
file of it once: each image must have a label of the same size and of a kind that can hold class numbers. Only headers
are read for that, thousands of files in a second or two, and all that is wrong is told at once. What only decoding can
show, a file that breaks off or a label value that is no class, is told with the file's name when it is read.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memseg.data.dataset import (
    IGNORE_INDEX,
    UNREADABLE,
    ClassList,
    ImageSplit,
    InstanceIds,
    Pixels,
    SegmentationDataset,
    decode,
    header,
    read_image,
    reason,
    split_error,
)
from memseg.errors import DataError

NOT_A_CLASS = -1
"""In a table of label values: this value must not occur."""

_IMAGE_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})
"""Pillow's 8-bit modes; the deeper ones would be clipped in silence."""
_LABEL_MODES = frozenset({"L", "P"})
_INSTANCE_MODES = frozenset({"I;16", "L"})

Size = tuple[int, int]


@dataclass(frozen=True)
class ImageFile:
    """An image file, and a key as `ImageSplit.key` gives it."""

    key: str
    path: Path


@dataclass(frozen=True)
class LabelFormat:
    """How the files of labels are written that are no images."""

    check: Callable[[Path], str | None]
    """What is wrong with a file, by its first bytes; None when nothing is."""
    decode: Callable[[Path], npt.NDArray[Any]]
    """The label value of each pixel, (H, W), 0 to 255."""


@dataclass(frozen=True)
class Label:
    """The label file of an image."""

    path: Path
    table: npt.NDArray[np.int16]
    """Class number, IGNORE_INDEX or NOT_A_CLASS of each label value; (256,)."""
    instances: Path | None = None
    """A file with the number of the single thing that each pixel belongs to."""
    form: LabelFormat | None = None
    """None for a picture of label values."""


def label_table(numbers: dict[int, int], *, ignored: Iterable[int] = ()) -> npt.NDArray[np.int16]:
    """A `Label`'s table from class numbers by label value; a value that is in neither argument is not a class.

    >>> label_table({7: 0, 8: 1}, ignored=[0])[[7, 8, 0, 9]].tolist()
    [0, 1, 255, -1]
    """
    table = np.full(256, NOT_A_CLASS, np.int16)
    table[list(ignored)] = IGNORE_INDEX
    for value, number in numbers.items():
        table[value] = number
    return table


class ImageFiles(ImageSplit):
    """A split of pictures on disk, with labels or without.

    Args:
        name: As `open_dataset` knows the data set.
        split: Name of the split.
        root: The data set's folder; errors begin with it.
        classes: What the pixels may be.
        images: In the order of the indices.

    Raises:
        DataError: there are none, two have one key, or a file is missing or is no image.
    """

    def __init__(self, name: str, split: str, *, root: Path, classes: ClassList, images: Sequence[ImageFile]) -> None:
        self.name, self.split, self.classes, self.root = name, split, classes, root
        self._images = list(images)
        self._sizes: list[Size] = []
        if not images:
            raise DataError(str(root), [f"split {split!r} must hold at least one image, found none"])
        problems: list[str] = []
        owners: dict[str, Path] = {}
        for number, image in enumerate(images):
            if image.key in owners:
                first, second = self._short(owners[image.key]), self._short(image.path)
                problems.append(f"{first} and {second} share one label; rename one of them, with a label of its own")
            owners.setdefault(image.key, image.path)
            self._sizes.append(self._checked_size(image.path, problems))
            self._check_beside(number, problems)
        if problems:
            raise split_error(root, problems)

    def __len__(self) -> int:
        return len(self._images)

    def key(self, index: int) -> str:
        return self._images[index].key

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self._images[index].path

    def size(self, index: int) -> Size:
        return self._sizes[index]

    def image(self, index: int) -> Pixels:
        return read_image(self._images[index].path)

    def _short(self, path: Path) -> str:
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def _checked_size(self, path: Path, problems: list[str]) -> Size:
        """(height, width) of an image by its header; (0, 0), and a line in `problems`, where it cannot be read."""
        image = self._short(path)
        try:
            size, mode = header(path)
        except UNREADABLE as error:
            problems.append(f"{image}: cannot be read as an image ({reason(error)}); restore or remove it")
            return 0, 0
        if mode not in _IMAGE_MODES:
            problems.append(f"{image}: must have 8 bits for each channel, found Pillow mode {mode}; convert it")
        return size

    def _check_beside(self, index: int, problems: list[str]) -> None:
        """What is wrong with the files beside an image joins `problems`."""


class PairedFiles(ImageFiles, SegmentationDataset):
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
        self,
        name: str,
        split: str,
        *,
        root: Path,
        classes: ClassList,
        pairs: Sequence[tuple[ImageFile, Label]],
        hint: str = "",
    ) -> None:
        self._labels = [label for _, label in pairs]
        if pairs and not any(label.path.is_file() for label in self._labels):
            problem = f"split {split!r} has {len(pairs)} images and not one label, such as {self._labels[0].path}"
            raise DataError(str(root), [f"{problem}; {hint or 'take a split with labels'}"])
        super().__init__(name, split, root=root, classes=classes, images=[image for image, _ in pairs])
        self.has_instances = all(label.instances is not None for label in self._labels)

    def target(self, index: int) -> Pixels:
        label = self._labels[index]
        values = label.form.decode(label.path) if label.form else decode(label.path)
        if values.shape != self._sizes[index]:
            raise DataError(str(label.path), [_other_size(values.shape, self._sizes[index])])
        numbers: npt.NDArray[np.int16] = label.table[values]
        if numbers.min() == NOT_A_CLASS:
            bad = np.unique(values[numbers == NOT_A_CLASS]).tolist()
            row, column = (int(place) for place in np.argwhere(numbers == NOT_A_CLASS)[0])
            known = np.flatnonzero(label.table != NOT_A_CLASS).tolist()
            found = f"found {_ranges(bad)}, first at row {row}, column {column}"
            raise DataError(
                str(label.path),
                [f"label values must be {_ranges(known)} ({self.name}), {found}; correct the label or the class list"],
            )
        return numbers.astype(np.uint8)

    def instances(self, index: int) -> InstanceIds | None:
        path = self._labels[index].instances
        if path is None:
            return None
        ids: InstanceIds = decode(path).astype(np.uint16)
        return ids

    def source(self, index: int, part: str) -> str:
        label = self._labels[index]
        path = self._images[index].path if part == "image" else label.path
        try:
            state = path.stat()
        except OSError as error:
            raise DataError(str(path), [f"cannot be read ({error.strerror}); restore it"]) from error
        table = zlib.crc32(label.table.tobytes()) if part == "target" else 0
        return f"{path.resolve()}\n{state.st_size} {state.st_mtime_ns} {table}"

    def _check_beside(self, index: int, problems: list[str]) -> None:
        label, size = self._labels[index], self._sizes[index]
        if not label.path.is_file():
            image = self._short(self._images[index].path)
            problems.append(f"{image}: has no label; add {self._short(label.path)}, or remove the image")
        elif label.form is None:
            self._check_map(label.path, size, _LABEL_MODES, "hold one 8-bit class number a pixel", problems)
        elif problem := label.form.check(label.path):
            problems.append(f"{self._short(label.path)}: {problem}")
        if label.instances:
            self._check_map(label.instances, size, _INSTANCE_MODES, "hold one 16-bit number a pixel", problems)

    def _check_map(self, path: Path, size: Size, modes: frozenset[str], must: str, problems: list[str]) -> None:
        """What is wrong with a picture of numbers that belongs to an image of `size` joins `problems`."""
        try:
            found, mode = header(path)
        except UNREADABLE as error:
            problems.append(f"{self._short(path)}: cannot be read as an image ({reason(error)}); restore it")
            return
        if mode not in modes:
            kinds = " or ".join(sorted(modes))
            problems.append(f"{self._short(path)}: must {must} (Pillow mode {kinds}), found mode {mode}")
        if size != (0, 0) and found != size:
            problems.append(f"{self._short(path)}: {_other_size(found, size)}")


def _other_size(found: Sequence[int], size: Size) -> str:
    return (
        f"must be {size[0]}x{size[1]} like its image, found {'x'.join(str(side) for side in found)}"
        " (height x width); take the label that was drawn on this image"
    )


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
