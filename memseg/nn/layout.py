"""Feature maps as rows of pixels, and the bands of rows that layers walk over.

Maps are channels-last: (N, C, H, W) whose memory is (N, H, W, C). A pixel's channels lie together, so that
a prefix of channels of a wide map is a matrix with a row stride, a 1x1 convolution is a matrix product for any batch,
and oneDNN and cuDNN convolve without copying into a layout of their own.

A band is a run of rows of one image, or several whole images, small enough to stay in a processor's caches between the
passes over it. On an accelerator bands are large: few large products beat many small ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

CHANNELS_LAST = torch.channels_last

_BAND_BYTES = {"cpu": 4 * 2**20}
"""Of one band's normalised map. On 2 cores of a Zen 4 with 1 MiB of L2 each and 32 MiB of L3, a dense block over bands
of 4 to 64 MiB took the same time but for a few percent, over bands of 1 MiB half again as long
(`python -m benchmarks.bands`)."""
_BAND_BYTES_ELSEWHERE = 64 * 2**20
"""Small beside any card."""
_planned_for: ContextVar[str | None] = ContextVar("memseg_planned_for", default=None)


def channels_last(x: Tensor) -> Tensor:
    """(N, C, H, W) with channels-last memory; no copy where it lies that way already."""
    return x.contiguous(memory_format=CHANNELS_LAST)


def empty_map(like: Tensor, batch: int, channels: int, size: tuple[int, int]) -> Tensor:
    """A new channels-last (batch, channels, *size) of the dtype and device of `like`."""
    shape = (batch, channels, *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=CHANNELS_LAST)


def rows(x: Tensor) -> Tensor:
    """(N, C, H, W) seen as (N, H, W, C)."""
    return x.permute(0, 2, 3, 1)


def images(x: Tensor) -> Tensor:
    """(N, H, W, C) seen as (N, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) as a matrix (N * H * W, C); a view where the map, or the map it is a slice of, is channels-last."""
    return rows(x).reshape(-1, x.shape[1])


def as_pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) that `pixels` can view as a matrix whose rows are contiguous: x itself, or a channels-last copy."""
    _, _, height, width = x.shape
    step = x.stride(3) if width > 1 else x.stride(2)
    lies_so = x.stride(1) == 1 and (height == 1 or x.stride(2) == width * step)
    lies_so = lies_so and (x.shape[0] == 1 or x.stride(0) == height * width * step) and step >= x.shape[1]
    return x if lies_so else channels_last(x)


def as_kernel(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient (O, C) of a 1x1 convolution in the shape of its weight (O, C, 1, 1).

    With the weight's strides too, where these differ only by what a size of 1 leaves open: DistributedDataParallel asks
    for them.
    """
    if grad.stride() == weight.stride()[:2]:
        return grad.as_strided(weight.shape, weight.stride())
    return grad.view_as(weight)


def band_limit(x: Tensor) -> int:
    """Bytes of a band on the device of x."""
    return _BAND_BYTES.get(device_type(x), _BAND_BYTES_ELSEWHERE)


def device_type(x: Tensor) -> str:
    """Type of the device that work on `x` is done on, or planned for."""
    return _planned_for.get() or x.device.type


@contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Inside, all is done as on a type of device, wherever tensors lie: for tracing what would happen there."""
    token = _planned_for.set(device)
    try:
        yield
    finally:
        _planned_for.reset(token)


def tiles(x: Tensor) -> Iterator[slice]:
    """Runs of rows of a matrix (M, C), each about a band's size."""
    step = tile_rows(x)
    for start in range(0, x.shape[0], step):
        yield slice(start, min(start + step, x.shape[0]))


def tile_rows(x: Tensor) -> int:
    """Rows of the tiles of a matrix (M, C); the last tile may have fewer."""
    return max(1, min(x.shape[0], max(256, band_limit(x) // (x.shape[1] * x.element_size()))))


class Band(NamedTuple):
    """Output rows `start`..`stop` of the images `first`..`last`, and the input rows that they read."""

    first: int
    last: int
    start: int
    stop: int
    low: int
    """First input row that is read; `start` - halo, or 0."""
    high: int
    """One past the last."""
    above: int
    """Rows of zeros that stand for what lies above the image."""
    below: int


def bands(batch: int, size: tuple[int, int], row_bytes: int, limit: int, *, halo: int, multiple: int = 1) -> list[Band]:
    """Bands that cover `batch` maps of `size` rows and columns, in order.

    Args:
        batch: Images.
        size: (H, W) of each.
        row_bytes: Of one row of one image.
        limit: Bytes of a band, at least one row, and four times the halo: else most of it would be read again.
        halo: Rows that an output row reads above and below its own. Bands of whole images have none: there the
            convolution pads.
        multiple: Rows that stay together.
    """
    height = size[0]
    if height * row_bytes <= limit or height <= max(multiple, 4 * halo):
        step = max(1, min(batch, limit // max(1, height * row_bytes)))
        return [Band(n, min(n + step, batch), 0, height, 0, height, 0, 0) for n in range(0, batch, step)]
    step = max(multiple, (limit // row_bytes - 2 * halo) // multiple * multiple, 4 * halo)
    found = []
    for n in range(batch):
        for start in range(0, height, step):
            stop = min(start + step, height)
            low, high = max(0, start - halo), min(height, stop + halo)
            found.append(Band(n, n + 1, start, stop, low, high, low - (start - halo), stop + halo - high))
    return found


def narrowed(found: list[Band], batch: int, height: int) -> tuple[int, int]:
    """Images and rows of a map with just the bands that differ: two of whole images, or two of one image."""
    first = found[0]
    if first.stop == height:
        return min(batch, 2 * (first.last - first.first)), height
    return 1, min(height, 2 * first.stop)
