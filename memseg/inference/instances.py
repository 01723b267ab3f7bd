"""Maps of single instances, as data sets number them, in the numbers that iIoU is counted in.

Only Cityscapes has such maps and average sizes of instances to weight them with; so iIoU is Cityscapes' alone.

Source: instList in cityscapesscripts/evaluation/evalPixelLevelSemanticLabeling.py.
"""

import numpy as np
import numpy.typing as npt

from memseg.data import ClassList
from memseg.data.cityscapes import CITYSCAPES_CLASSES, INSTANCE_FACTOR, LABEL_IDS
from memseg.data.dataset import InstanceIds
from memseg.training.metrics import AVERAGE_INSTANCE_PIXELS, InstanceCounts

_CLASS_OF_ID = np.full(2**16 // INSTANCE_FACTOR + 1, -1, np.int32)
"""Class number of each label id that can be in a map; -1 where it is none, as of caravans. So are 0 and 1, which is
what a label id that is no single thing has for its thousands."""
for _number, _label_id in enumerate(LABEL_IDS):
    _CLASS_OF_ID[_label_id] = _number


def instance_counts(classes: ClassList) -> InstanceCounts | None:
    """What iIoU is counted with; None for classes without sizes of instances, which are all but Cityscapes'."""
    if classes.names != CITYSCAPES_CLASSES.names:
        return None
    sizes = [AVERAGE_INSTANCE_PIXELS.get(name) for name in classes.names]
    return InstanceCounts(sizes, category_numbers(CITYSCAPES_CLASSES))


def category_numbers(classes: ClassList) -> list[int]:
    """The number of each class's category, in the order in which the categories appear.

    >>> category_numbers(CITYSCAPES_CLASSES)
    [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5, 6, 6, 6, 6, 6, 6]
    """
    names = list(dict.fromkeys(classes.categories))
    return [names.index(name) for name in classes.categories]


def class_instances(ids: InstanceIds) -> npt.NDArray[np.int32]:
    """Cityscapes' instance ids as `InstanceCounts` has them; -1 for groups, for stuff and for what is not scored.

    Args:
        ids: (H, W), label id * 1000 + n of the n-th thing of its kind; otherwise the label id.

    >>> class_instances(np.array([[26001, 24000, 26, 29001]], np.uint16)).tolist()
    [[13001, 11000, -1, -1]]
    """
    numbers = _CLASS_OF_ID[ids // INSTANCE_FACTOR]
    return np.where(numbers >= 0, numbers * INSTANCE_FACTOR + ids % INSTANCE_FACTOR, -1)
