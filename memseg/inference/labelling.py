"""The class of every pixel of one picture, at the picture's own size.

A network must see a picture as it did in training: the same region, at the same scale. Its logits then have to come
back to the picture's own pixels. Done in the usual way, that makes tensors of num_classes floats per pixel, twice
when the picture was resized. Here the logits stay at the network's output resolution, and both steps are one bilinear
interpolation, done for a band of rows at a time, of which only the strongest class is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from memseg.data import IGNORE_INDEX, Fit, pad_to_multiple, to_tensor
from memseg.data.dataset import Pixels
from memseg.data.transforms import Region
from memseg.errors import InputError
from memseg.nn.layout import band_limit
from memseg.nn.loss import bands, upsample_rows
from memseg.training.tables import DataConfig


class Network(Protocol):
    """What of a network is needed here: a SegmentedModel is one, a model in training on several cards another."""

    @property
    def output_stride(self) -> int:
        """Input sides must be multiples of it."""

    @property
    def num_classes(self) -> int:
        """Channels of the logits."""

    training: bool

    def to(self, device: torch.device) -> Self:
        """Itself, on a device."""

    def eval(self) -> Self:
        """Itself, in eval mode."""

    def train(self, mode: bool = True) -> Self:
        """Itself, in training mode or not."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of this process."""

    def coarse_outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Coarse logits of images (N, 3, H, W), the main ones first."""


@dataclass(frozen=True)
class Framing:
    """What of a picture the network sees, and how large."""

    region: Region | None = None
    """(top, bottom, left, right) in pixels of the picture; None for all of it."""
    size: tuple[int, int] | None = None
    """(height, width) that the region is resized to, a multiple of the output stride; None for its own size."""

    @classmethod
    def of(cls, data: DataConfig) -> Self:
        """As in training, but for random crops: those show the picture at its own scale, and so do we, whole."""
        return cls(region=data.region, size=data.image if data.fit is Fit.RESIZE else None)

    def region_in(self, size: tuple[int, int]) -> Region:
        """(top, bottom, left, right) in a picture of `size` (height, width).

        Raises:
            InputError: the picture does not reach as far as the region.
        """
        top, bottom, left, right = self.region or (0, size[0], 0, size[1])
        if bottom > size[0] or right > size[1]:
            raise InputError(
                f"a picture must reach row {bottom} and column {right}, where the region that the network was trained "
                f"on ends (data.region), got {size[0]}x{size[1]}"
            )
        return top, bottom, left, right


@torch.inference_mode()
def label_image(model: Network, image: Pixels, *, framing: Framing, device: torch.device) -> Pixels:
    """The class of every pixel of a picture, uint8 (H, W); 255 outside the framing's region.

    A region at its own size is padded on the right and at the bottom, with the mean colour, to a multiple of the
    network's output stride, and the padding's part of the answer is dropped.

    Args:
        model: In eval mode, on `device`.
        image: uint8 (H, W, 3), RGB.
        framing: What of it the network sees.
        device: Where the network runs.

    Raises:
        InputError: the picture is smaller than the framing's region, or a side of `framing.size` is no multiple of the
            output stride.
    """
    top, bottom, left, right = framing.region_in((image.shape[0], image.shape[1]))
    seen = image[top:bottom, left:right]
    height, width = seen.shape[:2]
    if framing.size is None:
        given = pad_to_multiple(to_tensor(seen), model.output_stride)
        whole = (given.shape[1], given.shape[2])
    else:
        resized = Image.fromarray(seen).resize(framing.size[::-1], Image.Resampling.BILINEAR)
        given = to_tensor(np.asarray(resized))
        whole = (height, width)
    coarse = model.coarse_outputs(given[None].to(device, next(model.parameters()).dtype))[0]
    labels = np.full(image.shape[:2], IGNORE_INDEX, dtype=np.uint8)
    for band in bands(height, coarse.shape[1] * whole[1] * coarse.element_size(), band_limit(coarse)):
        strongest = upsample_rows(coarse, whole, band)[0, :, :, :width].argmax(0)
        labels[top + band.start : top + band.stop, left:right] = strongest.to(torch.uint8).cpu().numpy()
    return labels
