"""A coarse map upsampled bilinearly to a fine one's size and joined to it, by bands: neither ever exists whole."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from memseg.nn import chains
from memseg.nn.autograd import wide_dtype
from memseg.nn.banded import banded
from memseg.nn.batch_norm import Statistics, batch_statistics, join_statistics
from memseg.nn.layout import Band, band_limit, bands, channels_last, images, narrowed, rows
from memseg.nn.upsample import row_sources

_aten = torch.ops.aten


def join(*inputs: Tensor) -> Tensor:
    """One map as it is; of two, the first upsampled bilinearly to the second's size, then both concatenated."""
    if len(inputs) == 1:
        return inputs[0]
    coarse, skip = inputs
    upsampled = F.interpolate(coarse, skip.shape[2:], mode="bilinear", align_corners=False)
    return torch.cat([upsampled, skip], 1)


def joined_size(inputs: Sequence[Tensor]) -> tuple[int, int]:
    """(H, W) of the joined inputs: that of the last."""
    return inputs[-1].shape[2], inputs[-1].shape[3]


def joined_channels(inputs: Sequence[Tensor]) -> int:
    """Channels of all inputs together."""
    return sum(x.shape[1] for x in inputs)


def upsample_rows(coarse: Tensor, size: tuple[int, int], start: int, stop: int) -> Tensor:
    """Rows start..stop of F.interpolate(coarse, size, mode="bilinear"), channels-last (N, C, stop - start, W).

    In `wide_dtype`: rounded to half precision before they are normalised, many would change sign.
    """
    sources = row_sources(coarse.shape[2], size[0], start, stop, coarse.device)
    source = rows(coarse[:, :, sources.read]).to(wide_dtype(coarse.dtype))
    between = images(sources.mix(source, dim=1))
    if between.shape[3] == size[1]:
        return between
    return F.interpolate(between, (stop - start, size[1]), mode="bilinear", align_corners=False)


def read_rows(inputs: Sequence[Tensor], band: Band) -> Iterator[Tensor]:
    """Rows low..high (n, rows, W, C_i) of each of the inputs to be joined, the coarse one's upsampled."""
    *coarse, fine = inputs
    for x in coarse:
        yield rows(upsample_rows(x[band.first : band.last], joined_size(inputs), band.low, band.high))
    yield rows(fine)[band.first : band.last, band.low : band.high]


def joined_statistics(inputs: Sequence[Tensor]) -> Statistics:
    """Batch statistics of the joined inputs."""
    own = batch_statistics(inputs[-1])
    if len(inputs) == 1:
        return own
    mean, var = upsampled_statistics(inputs[0], *joined_size(inputs))
    return Statistics(torch.cat([mean, own.mean]), torch.cat([var, own.var]), own.values)


def _bands(coarse: Tensor, size: tuple[int, int]) -> list[Band]:
    row_bytes = size[1] * coarse.shape[1] * coarse.element_size()
    return bands(coarse.shape[0], size, row_bytes, band_limit(coarse), halo=0)


def _narrow(coarse: Tensor, size: tuple[int, int]) -> tuple[Tensor, int, int]:
    """The coarse map over a few bands, and images and rows of the fine one."""
    batch, height = narrowed(_bands(coarse, size), coarse.shape[0], size[0])
    return coarse[:batch, :, : -(-height * coarse.shape[2] // size[0])], batch, height


def _narrow_statistics(coarse: Tensor, height: int, width: int) -> tuple[Any, ...]:
    part, _, fine_rows = _narrow(coarse, (height, width))
    return part, fine_rows, width


def _fake_statistics(coarse: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(coarse.dtype)
    return coarse.new_empty(coarse.shape[1], dtype=wide), coarse.new_empty(coarse.shape[1], dtype=wide)


@banded(narrow=_narrow_statistics, fake=_fake_statistics)
def upsampled_statistics(coarse: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of F.interpolate(coarse, (height, width), mode="bilinear")."""
    parts = []
    for band in _bands(coarse, (height, width)):
        up = upsample_rows(coarse[band.first : band.last], (height, width), band.start, band.stop)
        parts.append(batch_statistics(channels_last(up)))
        del up
    means, variances = torch.stack([part.mean for part in parts]), torch.stack([part.var for part in parts])
    counts = means.new_tensor([part.values for part in parts]).unsqueeze(1)
    mean, var, _ = join_statistics(means, variances, counts)
    return mean, var


def _narrow_complete(grad: Tensor, coarse: Tensor, *numbers: Tensor) -> tuple[Any, ...]:
    part, batch, height = _narrow(coarse, (grad.shape[2], grad.shape[3]))
    return grad[:batch, :, :height], part, *numbers


@banded(mutates=["grad"], narrow=_narrow_complete)
def complete_upsampled(grad: Tensor, coarse: Tensor, scale: Tensor, constant: Tensor, slope: Tensor) -> None:
    """grad = scale * grad + constant + slope * x in place, x being `coarse` upsampled to the size of `grad`."""
    size = (grad.shape[2], grad.shape[3])
    for band in _bands(coarse, size):
        up = upsample_rows(coarse[band.first : band.last], size, band.start, band.stop)
        part = rows(grad)[band.first : band.last, band.start : band.stop]
        chains.complete(part, rows(channels_last(up)), scale, constant, slope)
        del up


def upsample_backward(grad: Tensor, coarse: Tensor) -> Tensor:
    """Gradient of the coarse map from that of the upsampled one."""
    out = _aten.upsample_bilinear2d_backward(
        channels_last(grad), list(grad.shape[2:]), list(coarse.shape), False, None, None
    )
    return cast(Tensor, out)
