"""From images and label maps of any size to tensors of one size.

Where a model is split over two processes, the first reads images and the last reads targets. They must agree on every
flip and crop without talking to each other, and a run that was killed must see on resuming what it would have seen. A
random number generator with state gives neither. So each random choice is a function of (seed, epoch, index) alone: any
process, at any time, can say what sample 17 of epoch 3 looks like.
"""

from collections.abc import Iterable
from enum import StrEnum

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from memseg.data.dataset import IGNORE_INDEX, Pixels, SegmentationDataset
from memseg.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green, blue over ImageNet, 0 to 1; what torchvision's weights were trained with."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Their standard deviation."""

Region = tuple[int, int, int, int]
"""(top, bottom, left, right): rows and columns from the first up to, not including, the second."""


class Fit(StrEnum):
    """How an image of another size becomes one of the training size."""

    PAD = "pad"
    """Pad right and bottom; an image that is larger is refused."""
    CROP = "crop"
    """Cut out a part at random; pad where the image is smaller."""
    RESIZE = "resize"
    """Resize: image bilinear, target nearest. The ratio of height to width is not kept."""


def to_tensor(image: Pixels) -> Tensor:
    """The image (H, W, 3) as a float32 tensor (3, H, W), normalised as torchvision's models expect.

    >>> to_tensor(np.full((1, 1, 3), 255, np.uint8)).flatten()
    tensor([2.2489, 2.4286, 2.6400])
    """
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(torch.float32).div_(255)
    return tensor.sub_(torch.tensor(IMAGENET_MEAN).view(3, 1, 1)).div_(torch.tensor(IMAGENET_STD).view(3, 1, 1))


def pad_to(tensor: Tensor, size: tuple[int, int], *, fill: float = 0) -> Tensor:
    """The tensor (..., H, W) grown at the right and the bottom to `size` (height, width).

    Args:
        tensor: Normalised images, or targets.
        size: At least that of the tensor.
        fill: For images 0, which is the mean colour; for targets IGNORE_INDEX.

    Raises:
        InputError: the tensor is larger than `size`.

    >>> pad_to(torch.ones(1, 2), (2, 3), fill=IGNORE_INDEX).tolist()
    [[1.0, 1.0, 255.0], [255.0, 255.0, 255.0]]
    """
    height, width = tensor.shape[-2:]
    if height > size[0] or width > size[1]:
        raise InputError(f"padding must not shrink: the image is {height}x{width}, got {size[0]}x{size[1]}")
    return F.pad(tensor, (0, size[1] - width, 0, size[0] - height), value=fill)


def pad_to_multiple(tensor: Tensor, stride: int, *, fill: float = 0) -> Tensor:
    """The tensor (..., H, W) grown at the right and the bottom until `stride` divides both sides; see `pad_to`.

    >>> pad_to_multiple(torch.zeros(3, 360, 480), 64).shape
    torch.Size([3, 384, 512])
    """
    height, width = (-(-side // stride) * stride for side in tensor.shape[-2:])
    return pad_to(tensor, (height, width), fill=fill)


class TrainingView(Dataset[dict[str, Tensor]]):
    """What training reads: "image" float32 (3, H, W), normalised, and "target" uint8 (H, W), all of one size.

    Args:
        dataset: Where images and targets come from.
        size: (height, width) of what comes out.
        fit: How an image of another size becomes one of this size.
        flip: Mirror half of the samples left to right.
        seed: Of the random choices; at least 0.
        parts: What to decode and give; {"image"}, {"target"} or both. It changes no random choice.
        region: The part of every image to read, before anything else; None for the whole.

    Raises:
        InputError: some image does not reach as far as `region`, or is too large for Fit.PAD.

    >>> from memseg.data.streets import Streets
    >>> view = TrainingView(Streets("train", size=(64, 128)), size=(32, 64), fit=Fit.CROP, flip=True, seed=0)
    >>> {part: tuple(tensor.shape) for part, tensor in view[0].items()}
    {'image': (3, 32, 64), 'target': (32, 64)}
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        *,
        size: tuple[int, int],
        fit: Fit,
        flip: bool,
        seed: int,
        parts: Iterable[str] = ("image", "target"),
        region: Region | None = None,
    ) -> None:
        self.parts = frozenset(parts)
        if not self.parts or not self.parts <= {"image", "target"}:
            raise ValueError(f'parts must be "image", "target" or both, got {sorted(self.parts)}')
        self.dataset, self.size, self.fit, self.flip, self.seed = dataset, size, fit, flip, seed
        self.region = region
        self._epoch = 0
        self._check_sizes()

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the flips and crops of `epoch`, counted from 0; call it before making a DataLoader's iterator."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rows, columns, flipped = self._choices(index)
        sample: dict[str, Tensor] = {}
        if "image" in self.parts:
            pixels = self._fitted(self.dataset.image(index)[rows, columns], Image.Resampling.BILINEAR, flipped)
            sample["image"] = pad_to(to_tensor(pixels), self.size)
        if "target" in self.parts:
            labels = self._fitted(self.dataset.target(index)[rows, columns], Image.Resampling.NEAREST, flipped)
            sample["target"] = pad_to(torch.from_numpy(np.ascontiguousarray(labels)), self.size, fill=IGNORE_INDEX)
        return sample

    def _choices(self, index: int) -> tuple[slice, slice, bool]:
        """Rows and columns to cut out, and whether to mirror: the same for both parts, in every process."""
        random = np.random.default_rng([self.seed, self._epoch, index])
        flipped = bool(random.random() < 0.5) and self.flip
        top, bottom, left, right = self._region_of(index)
        if self.fit is Fit.CROP:
            height, width = self.size
            top += int(random.integers(0, max(0, bottom - top - height), endpoint=True))
            left += int(random.integers(0, max(0, right - left - width), endpoint=True))
            bottom, right = min(bottom, top + height), min(right, left + width)
        return slice(top, bottom), slice(left, right), flipped

    def _fitted(self, pixels: Pixels, resampling: Image.Resampling, flipped: bool) -> Pixels:
        if self.fit is Fit.RESIZE and pixels.shape[:2] != self.size:
            height, width = self.size
            pixels = np.array(Image.fromarray(pixels).resize((width, height), resampling))
        return pixels[:, ::-1] if flipped else pixels

    def _region_of(self, index: int) -> Region:
        return self.region or (0, self.dataset.size(index)[0], 0, self.dataset.size(index)[1])

    def _check_sizes(self) -> None:
        sizes = [self.dataset.size(index) for index in range(len(self))]
        if self.region:
            top, bottom, left, right = self.region
            height, width = min(size[0] for size in sizes), min(size[1] for size in sizes)
            if not (0 <= top < bottom <= height and 0 <= left < right <= width):
                raise InputError(
                    f"region must be top, bottom, left, right with 0 <= top < bottom <= {height} and"
                    f" 0 <= left < right <= {width} (the smallest image), got {list(self.region)}"
                )
            sizes = [(bottom - top, right - left)]
        if self.fit is Fit.PAD:
            height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
            if height > self.size[0] or width > self.size[1]:
                raise InputError(
                    f"with fit = pad no image may be larger than the training size {self.size[0]}x{self.size[1]},"
                    f" found up to {height}x{width}; take fit = crop or resize, or image = {height}x{width} or more"
                )
