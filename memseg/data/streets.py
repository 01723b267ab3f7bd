"""Street scenes that are drawn, not downloaded: something to learn from within a minute of installing.

Each index is one street, the same on every machine, at whatever size is asked for: in perspective, with labels exact to
the pixel. Thin poles and small people far away are hard, near cars easy, as in the photographs that it stands in for.
It shows whether a network, a recipe and a machine work together; it says nothing about photographs.
"""

from memseg.data.dataset import ClassList, Pixels, SegmentationDataset
from memseg.data.streets_scene import render
from memseg.errors import InputError, UnknownNameError

STREETS_CLASSES = ClassList(
    ("road", "sidewalk", "building", "pole", "vegetation", "sky", "person", "car"),
    (
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (153, 153, 153),
        (107, 142, 35),
        (70, 130, 180),
        (220, 20, 60),
        (0, 0, 142),
    ),
)
LENGTHS = {"train": 400, "val": 100}
"""The splits, and their number of scenes where none is given."""
_SMALLEST = 32
"""Pixels; below this a scene has no room for anything but road and sky."""


class Streets(SegmentationDataset):
    """Generated street scenes.

    Args:
        split: "train" or "val"; they share no scene.
        size: (height, width) of every image in pixels, at least 32 each.
        length: Scenes in the split; by default 400 for train, 100 for val.
        seed: Another seed is another city; at least 0.

    Raises:
        UnknownNameError: no such split.
        InputError: `size`, `length` or `seed` is too small.

    >>> scenes = Streets("val", size=(64, 128))
    >>> len(scenes), scenes.image(0).shape, scenes.target(0).shape
    (100, (64, 128, 3), (64, 128))
    """

    name = "streets"
    classes = STREETS_CLASSES

    def __init__(
        self, split: str, *, size: tuple[int, int] = (256, 512), length: int | None = None, seed: int = 0
    ) -> None:
        if split not in LENGTHS:
            raise UnknownNameError("split of streets", split, LENGTHS)
        length = LENGTHS[split] if length is None else length
        if min(size) < _SMALLEST:
            raise InputError(f"streets: each side must be at least {_SMALLEST} pixels, got {size[0]}x{size[1]}")
        if length < 1:
            raise InputError(f"streets: length must be at least 1 scene, got {length}")
        if seed < 0:
            raise InputError(f"streets: seed must be at least 0, got {seed}")
        self.split = split
        self._size, self._length, self._seed = size, length, seed
        self._latest: tuple[int, Pixels, Pixels] | None = None

    def __len__(self) -> int:
        return self._length

    def key(self, index: int) -> str:
        return f"{self.split}_{self._checked(index):05d}"

    def size(self, index: int) -> tuple[int, int]:
        self._checked(index)
        return self._size

    def image(self, index: int) -> Pixels:
        return self._scene(index)[0].copy()

    def target(self, index: int) -> Pixels:
        return self._scene(index)[1].copy()

    def _checked(self, index: int) -> int:
        if not 0 <= index < self._length:
            raise IndexError(f"streets: index must be 0 to {self._length - 1}, got {index}")
        return index

    def _scene(self, index: int) -> tuple[Pixels, Pixels]:
        """Image and target; the latest scene is kept, because most callers ask for one after the other."""
        if self._latest is None or self._latest[0] != index:
            words = (self._seed, list(LENGTHS).index(self.split), self._checked(index))
            self._latest = (index, *render(*self._size, words))
        return self._latest[1], self._latest[2]
