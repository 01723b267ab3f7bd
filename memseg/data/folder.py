"""Any images of your own, with label maps: two folders and a list of the classes.

    root/classes.txt                   one class a line: a name, then its colour or nothing
    root/images/<split>/<name>.jpg     or png, bmp, tif, webp, ppm
    root/labels/<split>/<name>.png     class number of each pixel, 255 = unlabelled; 8 bits, grey or palette

A line of classes.txt is `road`, `road #804080` or `road 128 64 128`; the first is class 0.
"""

import re
from pathlib import Path

from memseg.data.dataset import IGNORE_INDEX, ClassList, split_error, split_folder, visible_files
from memseg.data.paired_files import ImageFile, ImageFiles, Label, PairedFiles, label_table
from memseg.errors import DataError

IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"})
"""Of the pictures that are read; other files beside them are left alone."""
_LINE = re.compile(r"(?P<name>.*?\S)(?:\s+(?:#(?P<hex>[0-9a-fA-F]{6})|(?P<parts>[0-9]+\s+[0-9]+\s+[0-9]+)))?")


def open_folder(split: str, root: Path) -> PairedFiles:
    """The split of the folder `root`.

    Raises:
        DataError: the layout above does not hold.
    """
    images, folder = _images(split, root), root / "images" / split
    classes = read_classes(root / "classes.txt")
    table = label_table({number: number for number in range(len(classes.names))}, ignored=[IGNORE_INDEX])
    pairs = [
        (image, Label((root / "labels" / split / image.path.relative_to(folder)).with_suffix(".png"), table))
        for image in images
    ]
    return PairedFiles("folder", split, root=root, classes=classes, pairs=pairs)


def folder_images(split: str, root: Path) -> ImageFiles:
    """The pictures of a split, with labels or without.

    Raises:
        DataError: the layout above does not hold.
    """
    images = _images(split, root)
    return ImageFiles("folder", split, root=root, classes=read_classes(root / "classes.txt"), images=images)


def _images(split: str, root: Path) -> list[ImageFile]:
    folder = split_folder(root, "images", split)
    found = (path for path in visible_files(folder) if path.suffix.lower() in IMAGE_ENDINGS)
    return [ImageFile("_".join(path.relative_to(folder).with_suffix("").parts), path) for path in found]


def read_classes(path: Path) -> ClassList:
    """The classes in a file such as the module shows; those without a colour get one.

    Raises:
        DataError: it cannot be read, has fewer than 2 or more than 255 classes, names one twice, leaves a line
            empty between two classes, or a colour is out of range.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problem = f"must be a text file (UTF-8) with the name of one class on each line, found: {error}"
        raise DataError(str(path), [problem]) from error
    problems: list[str] = []
    classes: dict[str, tuple[int, int, int]] = {}
    for number, line in enumerate(lines):
        where = f"line {number + 1}"
        match = _LINE.fullmatch(line.strip())
        if match is None:
            problems.append(f"{where}: must name class {number}, found an empty line; remove it")
            continue
        colour = _colour(match, number)
        if max(colour) > 255:
            problems.append(f"{where}: a colour's red, green and blue must be 0 to 255, found {match['parts']}")
        if match["name"] in classes:
            problems.append(f"{where}: class {match['name']!r} is named before; give each class a name of its own")
        classes[match["name"]] = colour
    if not 2 <= len(lines) <= IGNORE_INDEX:
        problems.append(f"must name 2 to {IGNORE_INDEX} classes, one a line, found {len(lines)}")
    if problems:
        raise split_error(path, problems)
    return ClassList(tuple(classes), tuple(classes.values()))


def _colour(match: re.Match[str], number: int) -> tuple[int, int, int]:
    if match["parts"]:
        red, green, blue = (int(part) for part in match["parts"].split())
        return red, green, blue
    if match["hex"]:
        red, green, blue = bytes.fromhex(match["hex"])
        return red, green, blue
    return spread_colour(number + 1)


def spread_colour(number: int) -> tuple[int, int, int]:
    """A colour far from those of nearby numbers: PASCAL VOC's map, which deals the bits out to the channels.

    >>> spread_colour(1), spread_colour(2), spread_colour(15)
    ((128, 0, 0), (0, 128, 0), (192, 128, 128))
    """
    parts = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            parts[channel] |= (number >> (3 * place + channel) & 1) << (7 - place)
    return parts[0], parts[1], parts[2]
