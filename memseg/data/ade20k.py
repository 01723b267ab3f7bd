"""ADE20K (SceneParsing, 150 classes), and folders laid out like it with any number of classes.

    root/images/<split>/<image>.jpg           training, validation; `train` and `val` name them too
    root/annotations/<split>/<image>.png      0 = unlabelled, n = class n - 1; 8 bits, grey or palette
    root/objectInfo150.txt                    the classes, as the archive has it: a table with tabs, column Name last
    or root/classes.txt                       one class a line, as for `folder`; it is read where both are there

Source: Zhou et al., CVPR 2017; ADEChallengeData2016.zip of sceneparsing.csail.mit.edu.
"""

from collections import Counter
from pathlib import Path

from memseg.data.dataset import IGNORE_INDEX, ClassList, split_folder, visible_files
from memseg.data.folder import IMAGE_ENDINGS, read_classes, spread_colour
from memseg.data.paired_files import ImageFile, ImageFiles, Label, PairedFiles, label_table
from memseg.errors import DataError

_FOLDERS = {"train": "training", "val": "validation"}
_UNLABELLED = 0
_INFO_FILE = "objectInfo150.txt"


def open_ade20k(split: str, root: Path) -> PairedFiles:
    """The split of the ADE20K folder `root`, which holds images and annotations.

    Raises:
        DataError: the layout above does not hold.
    """
    folder = _folder(split, root)
    classes = _classes(root)
    table = label_table({number + 1: number for number in range(len(classes.names))}, ignored=[_UNLABELLED])
    labels = root / "annotations" / folder.name
    pairs = [
        (image, Label((labels / image.path.relative_to(folder)).with_suffix(".png"), table))
        for image in _images(folder)
    ]
    return PairedFiles("ade20k", split, root=root, classes=classes, pairs=pairs)


def ade20k_images(split: str, root: Path) -> ImageFiles:
    """The pictures of a split, with labels or without.

    Raises:
        DataError: the layout above does not hold.
    """
    return ImageFiles("ade20k", split, root=root, classes=_classes(root), images=_images(_folder(split, root)))


def _folder(split: str, root: Path) -> Path:
    """The folder of a split's pictures: of that name, or of the archive's name for it."""
    named = root / "images" / split
    return split_folder(root, "images", split if named.is_dir() else _FOLDERS.get(split, split))


def _images(folder: Path) -> list[ImageFile]:
    found = (path for path in visible_files(folder) if path.suffix.lower() in IMAGE_ENDINGS)
    return [ImageFile("_".join(path.relative_to(folder).with_suffix("").parts), path) for path in found]


def _classes(root: Path) -> ClassList:
    if (root / "classes.txt").is_file() or not (root / _INFO_FILE).is_file():
        return read_classes(root / "classes.txt")
    return read_object_info(root / _INFO_FILE)


def read_object_info(path: Path) -> ClassList:
    """The classes in a file such as objectInfo150.txt: each by the first of its names, where no other has that.

    Raises:
        DataError: it is no table with tabs and a column Name, or its rows are not numbered 1, 2, 3, ..., or two
            have the same names.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path), [f"must be a text file (UTF-8): {error}"]) from error
    heads, *rows = [[cell.strip() for cell in line.split("\t")] for line in lines if line.strip()] or [[""]]
    if "Idx" not in heads or "Name" not in heads:
        raise DataError(str(path), [f"must be a table with tabs and the columns Idx and Name, begins with {heads}"])
    index, name = heads.index("Idx"), heads.index("Name")
    numbers = [row[index] if len(row) == len(heads) else "" for row in rows]
    if numbers != [str(number + 1) for number in range(len(rows))] or not 2 <= len(rows) < IGNORE_INDEX:
        problem = f"Idx must count from 1 to at most {IGNORE_INDEX - 1}, a class a row, found {', '.join(numbers[:5])}"
        raise DataError(str(path), [f"{problem}, ... in {len(rows)} rows; restore the file"])
    names = [row[name] for row in rows]
    first = [full.replace(";", ",").split(",")[0].strip() for full in names]
    shared = {short for short, count in Counter(first).items() if count > 1}
    short_names = tuple(full if short in shared else short for full, short in zip(names, first, strict=True))
    if twice := [name for name, count in Counter(short_names).items() if count > 1]:
        problem = f"each class must have a name of its own, found twice: {', '.join(twice)}; rename one"
        raise DataError(str(path), [problem])
    return ClassList(short_names, tuple(spread_colour(number + 1) for number in range(len(rows))))
