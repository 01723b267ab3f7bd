"""The class of every pixel of one picture, at the picture's own size.

A network must see a picture as it did in training: the same region, at the same scale. Its logits then have to come
back to the picture's own pixels. Done in the usual way, that makes tensors of num_classes floats per pixel, twice
when the picture was resized. Here the logits stay at the network's output resolution, and both steps are one bilinear
interpolation, done for a band of rows at a time, of which only the strongest class is kept.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from PIL import Image

from memseg.data import IGNORE_INDEX, Fit, pad_to_multiple, to_tensor
from memseg.data.dataset import Pixels
from memseg.data.transforms import Region
from memseg.errors import InputError
from memseg.models import SegmentedModel
from memseg.nn.loss import bands, upsample_rows
from memseg.training.recipe import DataConfig


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
def label_image(model: SegmentedModel, image: Pixels, *, framing: Framing, device: torch.device) -> Pixels:
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
    for band in bands(height, coarse.shape[1] * whole[1] * coarse.element_size()):
        strongest = upsample_rows(coarse, whole, band)[0, :, :, :width].argmax(0)
        labels[top + band.start : top + band.stop, left:right] = strongest.to(torch.uint8).cpu().numpy()
    return labels
