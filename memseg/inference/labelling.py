"""The class of every pixel of one picture, at the picture's own size.

A network must see a picture as it did in training: the same region, at the same scale. Its logits then have to come
back to the picture's own pixels. Done in the usual way, that makes tensors of num_classes floats per pixel, twice
when the picture was resized. Here the logits stay at the network's output resolution, and both steps are one bilinear
interpolation, done for a band of rows at a time, of which only the strongest class is kept.

A picture may be looked at several times, at other scales and mirrored. Of each view only the coarse logits are kept;
their probabilities are made and added up band by band.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from memseg.data import IGNORE_INDEX, Fit, ImageSplit, Region, pad_to_multiple, resize_image, to_tensor
from memseg.data.dataset import Pixels, split_error
from memseg.errors import InputError
from memseg.levels import Precision
from memseg.nn.autograd import wide_dtype
from memseg.nn.layout import band_limit
from memseg.nn.loss import bands, upsample_rows
from memseg.nn.precision import computing
from memseg.nn.upsample import row_sources
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
    """What of a picture the network sees, how large, and how often."""

    region: Region | None = None
    """(top, bottom, left, right) in pixels of the picture; None for all of it."""
    size: tuple[int, int] | None = None
    """(height, width) that the region is resized to; None for its own size."""
    scales: tuple[float, ...] = (1.0,)
    """The picture is seen at each of these multiples of that size, and the probabilities are averaged."""
    flip: bool = False
    """Each is seen mirrored left to right too."""

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise InputError(
                f"scales must be one or more numbers above 0, got {list(self.scales)}; try 0.75, 1 and 1.25"
            )

    @classmethod
    def of(cls, data: DataConfig, *, scales: Sequence[float] = (1.0,), flip: bool = False) -> Self:
        """As in training, but for random crops: those show the picture at its own scale, and so do we, whole."""
        size = data.image if data.fit is Fit.RESIZE else None
        return cls(region=data.region, size=size, scales=tuple(scales), flip=flip)

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

    def check(self, images: ImageSplit) -> None:
        """Do nothing where every picture of a split reaches as far as the region, by its header.

        Raises:
            DataError: some do not; all of them are told.
        """
        problems = []
        for index in range(len(images)):
            try:
                self.region_in(images.size(index))
            except InputError as error:
                problems.append(f"{images.key(index)}: {error}")
        if problems:
            raise split_error(Path(f"{images.name}, split {images.split}"), problems)


class _View(NamedTuple):
    """What the network said to a picture, seen once."""

    coarse: Tensor
    """Logits (1, K, h, w)."""
    whole: tuple[float, float]
    """(height, width) that they cover, in pixels of the picture's region: it and the padding."""


@contextmanager
def evaluating(model: Network, device: torch.device) -> Iterator[None]:
    """The model on a device and in eval mode; afterwards in the mode it came in."""
    was_training = model.training
    model.to(device).eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def label_image(
    model: Network,
    image: Pixels,
    *,
    framing: Framing,
    device: torch.device,
    precision: Precision = Precision.FLOAT32,
) -> Pixels:
    """The class of every pixel of a picture, uint8 (H, W); 255 outside the framing's region.

    What the network sees is padded on the right and at the bottom, with the mean colour, to a multiple of its output
    stride, and the padding's part of the answer is dropped. Of several views the softmax probabilities are averaged.

    Args:
        model: In eval mode, on `device`.
        image: uint8 (H, W, 3), RGB.
        framing: What of it the network sees.
        device: Where the network runs.
        precision: A half precision is autocast; the others compute in the type of the weights.

    Raises:
        InputError: the picture is smaller than the framing's region.
    """
    top, bottom, left, right = framing.region_in((image.shape[0], image.shape[1]))
    with computing(precision, device.type):
        scales = _seen_at_each_scale(model, image[top:bottom, left:right], framing, device)
    labels = np.full(image.shape[:2], IGNORE_INDEX, dtype=np.uint8)
    coarse = scales[0][0].coarse
    row_bytes = coarse.shape[1] * (right - left) * wide_dtype(coarse.dtype).itemsize
    for band in bands(bottom - top, row_bytes, band_limit(coarse)):
        strongest = _strength(scales, band, right - left).argmax(0)
        labels[top + band.start : top + band.stop, left:right] = strongest.to(torch.uint8).cpu().numpy()
    return labels


def _seen_at_each_scale(model: Network, seen: Pixels, framing: Framing, device: torch.device) -> list[list[_View]]:
    """For each scale the view of the picture, and with flips after it that of the mirrored picture."""
    height, width = seen.shape[:2]
    dtype = next(model.parameters()).dtype
    scales = []
    for scale in framing.scales:
        base = framing.size or (height, width)
        size = max(1, round(base[0] * scale)), max(1, round(base[1] * scale))
        shown = resize_image(seen, size)
        views = []
        for pixels in (shown, shown[:, ::-1]) if framing.flip else (shown,):
            given = pad_to_multiple(to_tensor(pixels), model.output_stride)
            whole = given.shape[1] * height / size[0], given.shape[2] * width / size[1]
            views.append(_View(model.coarse_outputs(given[None].to(device, dtype))[0], whole))
        scales.append(views)
    return scales


def _strength(scales: list[list[_View]], rows: slice, width: int) -> Tensor:
    """(K, len(rows), width), strongest where the class is: logits of one view, summed probabilities of several."""
    if len(scales) == len(scales[0]) == 1:
        return _fine_logits(scales[0][0], rows, width)
    total: Tensor | float = 0.0
    for upright, *mirrored in scales:
        # A view and its mirror image are added first: so the answer to a mirrored picture is the same, mirrored.
        found = _fine_logits(upright, rows, width).softmax(0)
        for view in mirrored:
            found += _fine_logits(view, rows, width).softmax(0).flip(2)
        total = found + total
    assert isinstance(total, Tensor)
    return total


def _fine_logits(view: _View, rows: slice, width: int) -> Tensor:
    """Rows of a view's logits at the picture's own size, (K, len(rows), width)."""
    coarse, (whole_height, whole_width) = view.coarse, view.whole
    if whole_height.is_integer() and whole_width.is_integer():
        return upsample_rows(coarse, (int(whole_height), int(whole_width)), rows)[0, :, :, :width]
    # Scaled and padded, the picture's last column may lie between two of the network's; `interpolate` has no such size.
    across = row_sources(coarse.shape[3], whole_width, 0, width, coarse.device)
    down = row_sources(coarse.shape[2], whole_height, rows.start, rows.stop, coarse.device)
    source = coarse[:, :, down.read, across.read].to(wide_dtype(coarse.dtype))
    between = down.mix(source, dim=2)
    return across.mix(between, dim=3)[0]
