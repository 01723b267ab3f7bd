"""From images and label maps of any size to tensors of one size, with random flips, scales, crops and colours.

Where a model is split over two processes, the first reads images and the last reads targets. They must agree on every
flip and crop without talking to each other, and a run that was killed must see on resuming what it would have seen. A
random number generator with state gives neither, and that is what torchvision's random transforms draw from. So each
random choice is drawn here, as a function of (seed, epoch, index) alone: any process, at any time, can say what sample
17 of epoch 3 looks like. torchvision.transforms.v2 carries the choices out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Image, Mask

from memseg.data.dataset import IGNORE_INDEX, SegmentationDataset
from memseg.data.prepare import PreparedSamples, Region
from memseg.data.transforms import Fit, normalise, pad_to
from memseg.errors import InputError

Range = tuple[float, float]
"""The smallest and the largest."""
Place = tuple[int, int]
"""(epoch, index), both from 0."""
Part = TypeVar("Part", Image, Mask)


@dataclass(frozen=True)
class _Choice:
    """What was drawn for one sample."""

    top: int
    left: int
    height: int
    width: int
    """The window that is cut out, in pixels of the prepared image."""
    size: tuple[int, int]
    """(height, width) that it is resized to; it is padded from there."""
    flipped: bool
    colours: tuple[float, float, float]
    """Factors of brightness, contrast and saturation."""


class TrainingView(Dataset[dict[str, Tensor]]):
    """What training reads: "image" float32 (3, H, W), normalised, and "target" uint8 (H, W), all of one size.

    Its samples are asked for by epoch and index: `view[3, 17]`.

    Args:
        dataset: Where images and targets come from.
        size: (height, width) of what comes out.
        fit: How an image of another size becomes one of this size.
        flip: Mirror half of the samples left to right.
        seed: Of the random choices; at least 0.
        parts: What to decode and give; {"image"}, {"target"} or both. It changes no random choice.
        region: The part of every image to read, before anything else; None for the whole.
        scale: Resize every image by a factor from this range, drawn anew each time, keeping its ratio of height to
            width; then cut out a part at random where it is larger than `size`, and pad where it is smaller.
        color_jitter: Multiply brightness, contrast and saturation, each by a factor from 1 - this to 1 + this.
        cache: A folder that keeps decoded images and targets, as they are before anything random; None for none.

    Raises:
        InputError: some image does not reach as far as `region`, or is too large for Fit.PAD; `cache` cannot be used.

    >>> from memseg.data.streets import Streets
    >>> view = TrainingView(Streets("train", size=(64, 128)), size=(32, 64), fit=Fit.CROP, flip=True, seed=0)
    >>> {part: tuple(tensor.shape) for part, tensor in view[0, 17].items()}
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
        scale: Range | None = None,
        color_jitter: float = 0.0,
        cache: Path | None = None,
    ) -> None:
        self.parts = frozenset(parts)
        if not self.parts or not self.parts <= {"image", "target"}:
            raise ValueError(f'parts must be "image", "target" or both, got {sorted(self.parts)}')
        self.size, self.seed = size, seed
        self._fit, self._flip, self._scale, self._color_jitter = fit, flip, scale, color_jitter
        self._samples = PreparedSamples(dataset, region=region, size=size if fit is Fit.RESIZE else None, cache=cache)
        self._check_sizes()
        self._samples.check_room(self.parts)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, place: Place) -> dict[str, Tensor]:
        epoch, index = place
        choice = self._choice(epoch, index)
        sample: dict[str, Tensor] = {}
        if "image" in self.parts:
            # Channels stay last in memory, as decoded, until the end: so resizing is several times as fast.
            image = Image(torch.from_numpy(self._samples.image(index)).permute(2, 0, 1))
            shown = _coloured(_shown(image, choice), choice.colours)
            sample["image"] = pad_to(normalise(shown.as_subclass(Tensor).contiguous()), self.size)
        if "target" in self.parts:
            target = _shown(Mask(torch.from_numpy(self._samples.target(index))[None]), choice)
            sample["target"] = pad_to(target.as_subclass(Tensor)[0].contiguous(), self.size, fill=IGNORE_INDEX)
        return sample

    def _choice(self, epoch: int, index: int) -> _Choice:
        """What is drawn for a sample: the same for both parts, in every process."""
        random = np.random.default_rng([self.seed, epoch, index])
        flipped = bool(random.random() < 0.5) and self._flip
        factor = float(random.uniform(*self._scale)) if self._scale else 1.0
        height, width = self._samples.size(index)
        rows, shown_height = _window(height, self.size[0], factor)
        columns, shown_width = _window(width, self.size[1], factor)
        top = int(random.integers(0, height - rows, endpoint=True))
        left = int(random.integers(0, width - columns, endpoint=True))
        low, high = 1 - self._color_jitter, 1 + self._color_jitter
        brightness, contrast, saturation = random.uniform(low, high, 3).tolist()
        return _Choice(
            top, left, rows, columns, (shown_height, shown_width), flipped, (brightness, contrast, saturation)
        )

    def _check_sizes(self) -> None:
        if self._fit is not Fit.PAD or self._scale:
            return
        sizes = [self._samples.size(index) for index in range(len(self))]
        height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
        if height > self.size[0] or width > self.size[1]:
            raise InputError(
                f"with fit = pad no image may be larger than the training size {self.size[0]}x{self.size[1]},"
                f" found up to {height}x{width}; take fit = crop or resize, or image = {height}x{width} or more"
            )


def _window(side: int, wanted: int, factor: float) -> tuple[int, int]:
    """How much of a side of an image is cut out, and how long that is when resized by `factor`: at most `wanted`.

    The image is cut first and resized after, which is the same at less cost.

    >>> _window(1024, 512, 1.0), _window(1024, 512, 2.0), _window(1024, 768, 0.5)
    ((512, 512), (256, 512), (1024, 512))
    """
    scaled = max(1, round(side * factor))
    return (side, scaled) if scaled <= wanted else (min(side, max(1, round(wanted / factor))), wanted)


def _shown(part: Part, choice: _Choice) -> Part:
    """The window of a part (C, H, W), at the size and the way round that was drawn."""
    window = F.crop(part, choice.top, choice.left, choice.height, choice.width)
    if choice.size != (choice.height, choice.width):
        if isinstance(part, Mask):
            # F.resize would take the label half a pixel off, where NEAREST has it.
            window = Mask(F.resize_image(window, list(choice.size), InterpolationMode.NEAREST_EXACT))
        else:
            window = F.resize(window, list(choice.size), antialias=True)
    return F.horizontal_flip(window) if choice.flipped else window


def _coloured(image: Image, factors: tuple[float, float, float]) -> Image:
    for adjust, factor in zip((F.adjust_brightness, F.adjust_contrast, F.adjust_saturation), factors, strict=True):
        if factor != 1:
            image = adjust(image, factor)
    return image
