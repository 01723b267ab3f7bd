"""A data set whose pixels say where they are, and that counts what is decoded of it."""

import numpy as np

from memseg.data import ClassList, SegmentationDataset


class Numbered(SegmentationDataset):
    """Red is the row, green the column; the target is row + 16 x column."""

    name, split = "numbered", "train"
    classes = ClassList(("only",), ((0, 0, 0),))

    def __init__(self, *sizes):
        self.sizes, self.decoded = sizes, []

    def __len__(self):
        return len(self.sizes)

    def key(self, index):
        return str(index)

    def size(self, index):
        return self.sizes[index]

    def image(self, index):
        self.decoded.append("image")
        rows, columns = np.indices(self.sizes[index])
        return np.stack([rows, columns, 0 * rows], 2).astype(np.uint8)

    def target(self, index):
        self.decoded.append("target")
        rows, columns = np.indices(self.sizes[index])
        return (rows + 16 * columns).astype(np.uint8)
