"""A sample before anything random: decoded, cut to a region, resized.

The paper's half-resolution runs cut the bonnet away (rows 30 to 900) and resize to 1024x448. That is the same in every
epoch and in evaluation, so it is apart from flips and crops, and can be kept on disk.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from memseg.data.cache import DecodedCache
from memseg.data.dataset import Pixels, SegmentationDataset
from memseg.errors import InputError

Region = tuple[int, int, int, int]
"""(top, bottom, left, right): rows and columns from the first up to, not including, the second."""


def resize_image(image: Pixels, size: tuple[int, int]) -> Pixels:
    """The image (H, W, 3) at another size (height, width): bilinear, over all that a pixel covers where it shrinks.

    The same filter as Pillow's and torchvision's, several times as fast as the first, of whose values single ones
    differ by 1.

    >>> resize_image(np.array([[[0] * 3, [100] * 3], [[0] * 3, [100] * 3]], np.uint8), (1, 1)).tolist()
    [[[50, 50, 50]]]
    """
    if image.shape[:2] == size:
        return image
    channels_first = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    resized = F.interpolate(channels_first[None], size=size, mode="bilinear", antialias=True)[0]
    return np.ascontiguousarray(resized.permute(1, 2, 0).numpy())


def resize_labels(labels: Pixels, size: tuple[int, int]) -> Pixels:
    """The label map (H, W) at another size (height, width): the label at each new pixel's centre.

    >>> resize_labels(np.array([[0, 1, 2, 3, 4, 5]], np.uint8), (1, 2)).tolist()
    [[1, 4]]
    """
    if labels.shape == size:
        return labels
    tensor = torch.from_numpy(np.ascontiguousarray(labels))[None, None]
    return F.interpolate(tensor, size=size, mode="nearest-exact")[0, 0].numpy()


class PreparedSamples:
    """The samples of a data set, prepared alike.

    Args:
        dataset: Where images and targets come from.
        region: The part of every image to read; None for the whole.
        size: (height, width) to resize it to; None for its own.
        cache: A folder to keep prepared samples in; None to make them anew each time.

    Raises:
        InputError: some image does not reach as far as `region`, or the data set or the folder cannot be cached.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        *,
        region: Region | None = None,
        size: tuple[int, int] | None = None,
        cache: Path | None = None,
    ) -> None:
        self.dataset = dataset
        self._region, self._size = region, size
        self._check_region()
        self._cache = DecodedCache(cache) if cache else None

    def __len__(self) -> int:
        return len(self.dataset)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a prepared sample."""
        top, bottom, left, right = self._region_of(index)
        return self._size or (bottom - top, right - left)

    def image(self, index: int) -> Pixels:
        """The image, uint8 (H, W, 3).

        Raises:
            DataError: as for `SegmentationDataset.image`.
        """
        return self._kept(index, "image", lambda: self._fitted(self.dataset.image(index), index, resize_image))

    def target(self, index: int) -> Pixels:
        """The class of each pixel, uint8 (H, W).

        Raises:
            DataError: as for `SegmentationDataset.target`.
        """
        return self._kept(index, "target", lambda: self._fitted(self.dataset.target(index), index, resize_labels))

    def check_room(self, parts: frozenset[str]) -> None:
        """Whether the cache, if there is one, has room for these parts of all samples.

        Raises:
            InputError: it has not.
        """
        if self._cache:
            places = ((index, part) for index in range(len(self)) for part in sorted(parts))
            self._cache.check_room((self._decided_by(*place), self._shape(*place)) for place in places)

    def _fitted(self, pixels: Pixels, index: int, resize: Callable[[Pixels, tuple[int, int]], Pixels]) -> Pixels:
        top, bottom, left, right = self._region_of(index)
        return resize(pixels[top:bottom, left:right], self.size(index))

    def _kept(self, index: int, part: str, make: Callable[[], Pixels]) -> Pixels:
        if self._cache is None:
            return make()
        return self._cache.get(self._decided_by(index, part), self._shape(index, part), make)

    def _decided_by(self, index: int, part: str) -> str:
        source = self.dataset.source(index, part)
        if source is None:
            raise InputError(f"{self.dataset.name} has no files whose decoded form could be kept; leave data.cache out")
        return f"{part}\n{self._region}\n{self._size}\n{source}"

    def _shape(self, index: int, part: str) -> tuple[int, ...]:
        return (*self.size(index), 3) if part == "image" else self.size(index)

    def _region_of(self, index: int) -> Region:
        return self._region or (0, self.dataset.size(index)[0], 0, self.dataset.size(index)[1])

    def _check_region(self) -> None:
        if self._region is None:
            return
        top, bottom, left, right = self._region
        sizes = [self.dataset.size(index) for index in range(len(self))]
        height, width = min(size[0] for size in sizes), min(size[1] for size in sizes)
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise InputError(
                f"region must be top, bottom, left, right with 0 <= top < bottom <= {height} and"
                f" 0 <= left < right <= {width} (the smallest image), got {list(self._region)}"
            )
