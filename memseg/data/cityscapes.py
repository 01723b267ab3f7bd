"""Cityscapes in its official layout: 2048x1024 street scenes, 19 classes to learn.

    root/leftImg8bit/<split>/<city>/<frame>_leftImg8bit.png
    root/gtFine/<split>/<city>/<frame>_gtFine_labelIds.png
    root/gtFine/<split>/<city>/<frame>_gtFine_instanceIds.png      where things are told apart, for iIoU

The official labels number 34 kinds of things; 19 of them are learnt and scored, under numbers of their own (trainIds).
The mapping is done here on reading, so the official archives serve as they come. Where a frame has no labelIds but a
`_gtFine_labelTrainIds.png`, as the official scripts write it, that is read instead. The labels of the split `test` are
kept back, the archive has maps of nothing but the borders in their place: its pictures are for prediction.

Source: Cordts et al., CVPR 2016; the table is that of cityscapesScripts, helpers/labels.py.
"""

from pathlib import Path

from memseg.data.dataset import IGNORE_INDEX, ClassList, split_folder, visible_files
from memseg.data.paired_files import ImageFile, ImageFiles, Label, PairedFiles, label_table

_CLASSES = (
    # label id, name, colour, category; in the order of the trainIds
    (7, "road", (128, 64, 128), "flat"),
    (8, "sidewalk", (244, 35, 232), "flat"),
    (11, "building", (70, 70, 70), "construction"),
    (12, "wall", (102, 102, 156), "construction"),
    (13, "fence", (190, 153, 153), "construction"),
    (17, "pole", (153, 153, 153), "object"),
    (19, "traffic light", (250, 170, 30), "object"),
    (20, "traffic sign", (220, 220, 0), "object"),
    (21, "vegetation", (107, 142, 35), "nature"),
    (22, "terrain", (152, 251, 152), "nature"),
    (23, "sky", (70, 130, 180), "sky"),
    (24, "person", (220, 20, 60), "human"),
    (25, "rider", (255, 0, 0), "human"),
    (26, "car", (0, 0, 142), "vehicle"),
    (27, "truck", (0, 0, 70), "vehicle"),
    (28, "bus", (0, 60, 100), "vehicle"),
    (31, "train", (0, 80, 100), "vehicle"),
    (32, "motorcycle", (0, 0, 230), "vehicle"),
    (33, "bicycle", (119, 11, 32), "vehicle"),
)
CITYSCAPES_CLASSES = ClassList(
    tuple(name for _, name, _, _ in _CLASSES),
    tuple(colour for _, _, colour, _ in _CLASSES),
    tuple(category for _, _, _, category in _CLASSES),
)
LABEL_IDS = tuple(label_id for label_id, _, _, _ in _CLASSES)
"""The official label id of each class, which is what the test server reads."""
INSTANCE_CATEGORIES = ("human", "vehicle")
"""Categories whose classes are told apart as single things; iIoU scores these classes."""
INSTANCE_FACTOR = 1000
"""In instance maps a pixel of the n-th thing of a class is label id * this + n; of a group or a stuff, the label id."""

_LAST_ID = 33
_ID_TABLE = label_table({value: number for number, value in enumerate(LABEL_IDS)}, ignored=range(_LAST_ID + 1))
_TRAIN_ID_TABLE = label_table({number: number for number in range(len(_CLASSES))}, ignored=[IGNORE_INDEX])
_ENDING = "_leftImg8bit.png"


def open_cityscapes(split: str, root: Path) -> PairedFiles:
    """The split of the Cityscapes folder `root`, which holds leftImg8bit and gtFine.

    Raises:
        DataError: the layout above does not hold.
    """
    pairs = [(image, _label(image, split, root)) for image in _images(split, root)]
    hint = "unpack gtFine_trainvaltest.zip beside leftImg8bit"
    return PairedFiles("cityscapes", split, root=root, classes=CITYSCAPES_CLASSES, pairs=pairs, hint=hint)


def cityscapes_images(split: str, root: Path) -> ImageFiles:
    """The pictures of a split, with labels or without.

    Raises:
        DataError: the layout above does not hold.
    """
    return ImageFiles("cityscapes", split, root=root, classes=CITYSCAPES_CLASSES, images=_images(split, root))


def _images(split: str, root: Path) -> list[ImageFile]:
    found = visible_files(split_folder(root, "leftImg8bit", split), _ENDING)
    return [ImageFile(path.name.removesuffix(_ENDING), path) for path in found]


def _label(image: ImageFile, split: str, root: Path) -> Label:
    folder = root / "gtFine" / split / image.path.parent.name
    label, train_ids, instances = (
        folder / f"{image.key}_gtFine_{kind}.png" for kind in ("labelIds", "labelTrainIds", "instanceIds")
    )
    known = instances if instances.is_file() else None
    if not label.is_file() and train_ids.is_file():
        return Label(train_ids, _TRAIN_ID_TABLE, known)
    return Label(label, _ID_TABLE, known)
