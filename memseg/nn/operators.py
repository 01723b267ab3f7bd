"""BN, ReLU and a convolution without ever holding the normalised map.

A DenseNet is made of BN-ReLU-convolution. Kept or rebuilt whole, the normalised map is as large as the features
themselves. Here it is made band by band (`memseg.nn.layout`): normalise a band into scratch, convolve it, go on; and
backward walks the same bands. 1x1 convolutions are matrix products over pixels; 2x2 average pooling behind one, as in
a DenseNet's transition, is done before it, on the band, as the two commute: a quarter of the products.

Each walk is an operator of its own (`memseg.nn.banded`).

Maps are (N, C, H, W), channels-last or slices of channels of such; a unit's `inputs` are one map, or a coarse and a
fine one that are joined (`memseg.nn.join`). Per-channel numbers are (C,) in `wide_dtype`.

Source: Pleiss et al., arXiv:1707.06990, for rebuilding from shared memory.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memseg.nn import chains
from memseg.nn.banded import banded
from memseg.nn.join import joined_channels, joined_size, read_rows, upsample_rows
from memseg.nn.layout import (
    Band,
    band_limit,
    bands,
    channels_last,
    empty_map,
    images,
    narrowed,
    pixels,
    rows,
    tile_rows,
    tiles,
)
from memseg.nn.products import Scratch, add_product, gradients_like, product

_aten = torch.ops.aten
_Shape = torch.Size | Sequence[int]

# 1x1 convolutions


def _narrow_project(x: Tensor, scale: Any, shift: Any, weight: Any, bias: Any, out: Tensor) -> tuple[Any, ...]:
    first = slice(0, tile_rows(x))
    return x[first], scale, shift, weight, bias, out[first]


@banded(mutates=["out"], narrow=_narrow_project)
def project(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (M, O) = relu(scale * x + shift) @ weight.T + bias, of x (M, C) and weight (O, C)."""
    normalised = x.new_empty(tile_rows(x), x.shape[1])
    for tile in tiles(x):
        part = normalised[: tile.stop - tile.start]
        chains.norm_relu(x[tile], scale, shift, part)
        out[tile] = product(part, weight, bias)


def _narrow_project_backward(grad_out: Tensor, x: Tensor, *others: Any) -> tuple[Any, ...]:
    first = slice(0, tile_rows(x))
    *numbers, grad, add, wants_sums = others
    return grad_out[first], x[first], *numbers, grad[first], add, wants_sums


@banded(mutates=["grad"], narrow=_narrow_project_backward, fake=lambda *args: gradients_like(args[6], args[9]))
def project_backward(
    grad_out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    bias: Tensor,
    weight: Tensor,
    grad: Tensor,
    add: bool,
    wants_sums: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the weight (O, C), and sum(g) and sum(g * (x - mean)) as (2, C), both in `wide_dtype`.

    scale * g is written to `grad` (M, C), or added to it, without the terms through batch statistics.
    """
    grad_weight, sums = gradients_like(weight, wants_sums)
    back = weight.t().contiguous()
    scratch = Scratch(x.new_empty(tile_rows(x), x.shape[1]), scale, shift, mean, bias, wants_sums)
    for tile in tiles(x):
        normalised, centred = scratch.normalise(x[tile])
        add_product(grad_weight, grad_out[tile], normalised)
        part = product(grad_out[tile], back)
        chains.spread(part, normalised, scale, to=grad[tile], add=add, centred=centred, sums=sums)
        del part
    return grad_weight, sums


# 1x1 convolutions behind 2x2 average pooling


def _narrow_pooled(x: Tensor, scale: Any, shift: Any, weight: Any, bias: Any, out: Tensor) -> tuple[Any, ...]:
    batch, height = narrowed(_pool_bands(x), x.shape[0], x.shape[2] // 2 * 2)
    return x[:batch, :, :height], scale, shift, weight, bias, out[:batch, :, : height // 2]


@banded(mutates=["out"], narrow=_narrow_pooled)
def project_pooled(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (N, O, H // 2, W // 2) = averages of 2x2 of relu(scale * x + shift) times weight (O, C), x (N, C, H, W)."""
    source, target = rows(x), rows(out)
    for band in _pool_bands(x):
        region = _pool_region(x, band)
        normalised = torch.empty_like(source[region])
        chains.norm_relu(source[region], scale, shift, normalised)
        pooled = F.avg_pool2d(images(normalised), 2)
        part = target[band.first : band.last, band.start // 2 : band.stop // 2]
        del normalised
        part.copy_(product(pixels(pooled), weight, bias).view(part.shape))
        del pooled


def _narrow_pooled_backward(grad_out: Tensor, x: Tensor, *others: Any) -> tuple[Any, ...]:
    batch, height = narrowed(_pool_bands(x), x.shape[0], x.shape[2] // 2 * 2)
    *numbers, grad, wants_sums = others
    part = slice(0, batch), slice(None), slice(0, height)
    return grad_out[:batch, :, : height // 2], x[part], *numbers, grad[part], wants_sums


@banded(mutates=["grad"], narrow=_narrow_pooled_backward, fake=lambda *args: gradients_like(args[6], args[8]))
def project_pooled_backward(
    grad_out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    bias: Tensor,
    weight: Tensor,
    grad: Tensor,
    wants_sums: bool,
) -> tuple[Tensor, Tensor]:
    """As `project_backward`, of x and grad (N, C, H, W) and grad_out (N, O, H // 2, W // 2)."""
    grad_weight, sums = gradients_like(weight, wants_sums)
    back = weight.t().contiguous()
    source, target, grads = rows(x), rows(grad), rows(grad_out)
    if x.shape[2] % 2 or x.shape[3] % 2:
        grad.zero_()  # pooling leaves out the last row or column of an odd side
    for band in _pool_bands(x):
        region = _pool_region(x, band)
        scratch = Scratch(torch.empty_like(source[region]), scale, shift, mean, bias, wants_sums)
        normalised, centred = scratch.normalise(source[region])
        pooled = pixels(F.avg_pool2d(images(normalised), 2))
        grad_part = grads[band.first : band.last, band.start // 2 : band.stop // 2].reshape(-1, weight.shape[0])
        add_product(grad_weight, grad_part, pooled)
        del pooled
        grad_pooled = product(grad_part, back).mul_(0.25)
        batch, height, width, channels = normalised.shape
        part = torch.empty_like(normalised)
        quarters = part.view(batch, height // 2, 2, width // 2, 2, channels)
        quarters.copy_(grad_pooled.view(batch, height // 2, 1, width // 2, 1, channels))
        del grad_pooled
        chains.spread(part, normalised, scale, to=target[region], add=False, centred=centred, sums=sums)
        del scratch, normalised, centred, part
    return grad_weight, sums


# k x k convolutions


def _narrow_inputs(inputs: list[Tensor], weight: Tensor, dilation: int) -> tuple[list[Tensor], int, int]:
    """The inputs over a few bands, and images and rows of the fine one."""
    fine = inputs[-1]
    batch, height = narrowed(_conv_bands(inputs, _halo(weight, dilation)), fine.shape[0], fine.shape[2])
    return [x[:batch, :, : -(-height * x.shape[2] // fine.shape[2])] for x in inputs], batch, height


def _narrow_convolve(
    inputs: list[Tensor], scale: Any, shift: Any, weight: Tensor, bias: Any, dilation: int, out: Tensor
) -> tuple[Any, ...]:
    parts, batch, height = _narrow_inputs(inputs, weight, dilation)
    return parts, scale, shift, weight, bias, dilation, out[:batch, :, :height]


@banded(mutates=["out"], narrow=_narrow_convolve)
def convolve(
    inputs: list[Tensor],
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    out: Tensor,
) -> None:
    """out (N, O, H, W): convolution of relu(scale * x + shift), same size, x being the joined inputs."""
    halo = _halo(weight, dilation)
    weight = channels_last(weight)
    for band in _conv_bands(inputs, halo):
        normalised = _conv_band(inputs, band, scale, shift)
        padding = [0 if _is_part(band, out) else halo, halo]
        made = F.conv2d(images(normalised), weight, bias, padding=padding, dilation=dilation)
        del normalised
        out[band.first : band.last, :, band.start : band.stop].copy_(made)
        del made


def _narrow_convolve_backward(grad_out: Tensor, inputs: list[Tensor], *others: Any) -> tuple[Any, ...]:
    *numbers, weight, dilation, grads, wants_sums = others
    parts, batch, height = _narrow_inputs(inputs, weight, dilation)
    region = slice(0, batch), slice(None), slice(0, height)
    return grad_out[region], parts, *numbers, weight, dilation, [grad[region] for grad in grads], wants_sums


@banded(mutates=["grads"], narrow=_narrow_convolve_backward, fake=lambda *args: gradients_like(args[5], args[8]))
def convolve_backward(
    grad_out: Tensor,
    inputs: list[Tensor],
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    weight: Tensor,
    dilation: int,
    grads: list[Tensor],
    wants_sums: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the weight (O, C, k, k), and sum(g) and sum(g * (x - mean)) as (2, C), both in `wide_dtype`.

    g itself, the gradient at the normalised and rectified map, is written to `grads`: one map (N, C_i, H, W) for each
    input, all of the fine size.
    """
    grad_weight, sums = gradients_like(weight, wants_sums)
    halo, kernel, size = _halo(weight, dilation), channels_last(weight), joined_size(inputs)
    for band in _conv_bands(inputs, halo):
        part = _is_part(band, grad_out)
        normalised = _conv_band(inputs, band, scale, shift)
        grad_band = _grad_band(grad_out, band, halo if part else 0)
        own = slice(halo, grad_band.shape[2] - halo) if part else slice(None)
        padding = [0 if part else halo, halo]
        grad_weight += _convolution_backward(
            channels_last(grad_band[:, :, own]), images(normalised), kernel, padding, dilation, of_weight=True
        )
        normalised = normalised[:, own]
        # With its neighbours' rows the gradient reaches every row of the band in full, so that none is visited twice.
        padding = [2 * halo if part else halo, halo]
        grad_x = rows(_convolution_backward(grad_band, images(normalised), kernel, padding, dilation, of_weight=False))
        del grad_band
        start = 0
        for index, (target, x) in enumerate(zip(grads, inputs, strict=True)):
            channels = slice(start, start + target.shape[1])
            region = rows(target)[band.first : band.last, band.start : band.stop]
            chains.mask(grad_x[..., channels], normalised[..., channels], region)
            if wants_sums and index < len(inputs) - 1:
                up = channels_last(upsample_rows(x[band.first : band.last], size, band.start, band.stop))
                sums[:, channels] += chains.moments(region.to(up.dtype), rows(up), mean[channels])
            start = channels.stop
        del normalised, grad_x
    if wants_sums:
        own = slice(-inputs[-1].shape[1], None)
        sums[:, own] += chains.moments(rows(grads[-1]), rows(channels_last(inputs[-1])), mean[own])
    return grad_weight, sums


def _convolution_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, padding: list[int], dilation: int, *, of_weight: bool
) -> Tensor:
    """Gradient of a convolution's weight, or of x, of which then the shape alone is looked at; channels-last."""
    grads = _aten.convolution_backward(
        grad_out,
        x,
        weight,
        None,
        [1, 1],
        padding,
        [dilation] * 2,
        False,
        [0, 0],
        1,
        [not of_weight, of_weight, False],
    )
    return cast(Tensor, grads[1]) if of_weight else channels_last(grads[0])


def _grad_band(grad_out: Tensor, band: Band, halo: int) -> Tensor:
    """Rows start - halo .. stop + halo of a gradient (N, O, H, W), zeros outside the image; channels-last."""
    if not halo:
        return channels_last(grad_out[band.first : band.last])
    height = band.stop - band.start + 2 * halo
    out = empty_map(grad_out, 1, grad_out.shape[1], (height, grad_out.shape[3]))
    out[:, :, : band.above].zero_()
    out[:, :, height - band.below :].zero_()
    out[:, :, band.above : height - band.below].copy_(grad_out[band.first : band.last, :, band.low : band.high])
    return out


def _halo(weight: Tensor, dilation: int) -> int:
    return int(dilation * (weight.shape[2] // 2))


def _conv_bands(inputs: Sequence[Tensor], halo: int) -> list[Band]:
    size, channels, x = joined_size(inputs), joined_channels(inputs), inputs[-1]
    row_bytes = size[1] * channels * x.element_size()
    return bands(x.shape[0], size, row_bytes, band_limit(x), halo=halo)


def _is_part(band: Band, x: Tensor) -> bool:
    """Whether a band has rows above or below, or zeros in their place."""
    return band.stop - band.start < x.shape[2]


def _conv_band(inputs: Sequence[Tensor], band: Band, scale: Tensor, shift: Tensor) -> Tensor:
    """Rows low..high of the normalised map, zeros above and below: (n, rows, W, C)."""
    width, channels = joined_size(inputs)[1], joined_channels(inputs)
    height = band.above + band.high - band.low + band.below
    out = inputs[-1].new_empty(band.last - band.first, height, width, channels)
    inside = out[:, band.above : height - band.below]
    out[:, : band.above].zero_()
    out[:, height - band.below :].zero_()
    start = 0
    for x in read_rows(inputs, band):
        own = slice(start, start + x.shape[-1])
        chains.norm_relu(x, scale[own], shift[own], inside[..., own])
        start = own.stop
        del x
    return out


def _pool_bands(x: Tensor) -> list[Band]:
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    row_bytes = width * x.shape[1] * x.element_size()
    return bands(x.shape[0], (height, width), row_bytes, band_limit(x), halo=0, multiple=2)


def _pool_region(x: Tensor, band: Band) -> tuple[slice, slice, slice]:
    """A band of (N, H, W, C), without the last column of an odd width."""
    return slice(band.first, band.last), slice(band.start, band.stop), slice(0, x.shape[3] // 2 * 2)


# Multiplications and additions, for the flop counter


@register_flop_formula(torch.ops.memseg.project)
def _(x: _Shape, scale: Any, shift: Any, weight: _Shape, *_: Any, **__: Any) -> int:
    return 2 * weight[0] * weight[1] * x[0]


@register_flop_formula(torch.ops.memseg.project_backward)
def _(grad_out: _Shape, x: _Shape, *_: Any, **__: Any) -> int:
    return 4 * grad_out[1] * x[1] * x[0]


@register_flop_formula(torch.ops.memseg.project_pooled)
def _(x: _Shape, scale: Any, shift: Any, weight: _Shape, *_: Any, **__: Any) -> int:
    return 2 * weight[0] * weight[1] * x[0] * (x[2] // 2) * (x[3] // 2)


@register_flop_formula(torch.ops.memseg.project_pooled_backward)
def _(grad_out: _Shape, x: _Shape, *_: Any, **__: Any) -> int:
    return 4 * grad_out[1] * x[1] * grad_out[0] * grad_out[2] * grad_out[3]


@register_flop_formula(torch.ops.memseg.convolve)
def _(inputs: Any, scale: Any, shift: Any, weight: _Shape, bias: Any, dilation: Any, out: _Shape, **_: Any) -> int:
    return 2 * weight[0] * weight[1] * weight[2] * weight[3] * out[0] * out[2] * out[3]


@register_flop_formula(torch.ops.memseg.convolve_backward)
def _(grad_out: _Shape, inputs: Any, scale: Any, shift: Any, mean: Any, weight: _Shape, *_: Any, **__: Any) -> int:
    return 4 * weight[0] * weight[1] * weight[2] * weight[3] * grad_out[0] * grad_out[2] * grad_out[3]
