"""Cityscapes in its official layout: 2048x1024 street scenes, 19 classes to learn.

    root/leftImg8bit/<split>/<city>/<frame>_leftImg8bit.png
    root/gtFine/<split>/<city>/<frame>_gtFine_labelIds.png

The official labels number 34 kinds of things; 19 of them are learnt and scored, under numbers of their own (trainIds).
The mapping is done here on reading, so the official archives serve as they come. Where a frame has no labelIds but a
`_gtFine_labelTrainIds.png`, as the official scripts write it, that is read instead.

Source: Cordts et al., CVPR 2016; the table is that of cityscapesScripts, helpers/labels.py.
"""

from pathlib import Path

from memseg.data.dataset import (
    IGNORE_INDEX,
    ClassList,
    Pair,
    PairedFiles,
    label_table,
    split_folder,
    visible_files,
)

_CLASSES = (
    # label id, name, colour; in the order of the trainIds
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
CITYSCAPES_CLASSES = ClassList(tuple(name for _, name, _ in _CLASSES), tuple(colour for _, _, colour in _CLASSES))
_LAST_ID = 33
_LABEL_IDS = label_table({value: number for number, (value, _, _) in enumerate(_CLASSES)}, ignored=range(_LAST_ID + 1))
_TRAIN_IDS = label_table({number: number for number in range(len(_CLASSES))}, ignored=[IGNORE_INDEX])


def open_cityscapes(split: str, root: Path) -> PairedFiles:
    """The split of the Cityscapes folder `root`, which holds leftImg8bit and gtFine.

    Raises:
        DataError: the layout above does not hold.
    """
    ending = "_leftImg8bit.png"
    pairs = []
    for image in visible_files(split_folder(root, "leftImg8bit", split), ending):
        key = image.name.removesuffix(ending)
        label = root / "gtFine" / split / image.parent.name / f"{key}_gtFine_labelIds.png"
        train_ids = label.with_name(f"{key}_gtFine_labelTrainIds.png")
        if not label.is_file() and train_ids.is_file():
            pairs.append(Pair(key, image, train_ids, _TRAIN_IDS))
        else:
            pairs.append(Pair(key, image, label, _LABEL_IDS))
    hint = "unpack gtFine_trainvaltest.zip beside leftImg8bit"
    return PairedFiles("cityscapes", split, root=root, classes=CITYSCAPES_CLASSES, pairs=pairs, hint=hint)
