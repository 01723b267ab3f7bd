"""A network's stem as one autograd node: convolution, BN, ReLU and max-pooling, rebuilt from the images.

The stem's convolution makes the largest map of a DenseNet, and plain autograd keeps it twice, with eight-byte indices
of the pooling on top. Here forward keeps the images, which are there anyway, and for each pooled number one byte: which
number of its window was the largest, or -1 where that was not positive, so that no gradient goes through. Backward
convolves again, and turns the convolution's output in place into its own gradient.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from memseg.nn import chains
from memseg.nn.autograd import check_dtypes, compute_dtype, once_differentiable, without_autocast
from memseg.nn.banded import banded
from memseg.nn.batch_norm import BatchNorm2d, check_norm
from memseg.nn.layout import CHANNELS_LAST, band_limit, channels_last, empty_map, images, pixels, rows, tiles
from memseg.nn.norm_relu import NormRelu

_aten = torch.ops.aten


@_disable_dynamo
def conv_norm_relu_pool(
    x: Tensor, *, conv: nn.Conv2d, norm: BatchNorm2d, pool: nn.MaxPool2d, keep_conv: bool = False
) -> Tensor:
    """pool(relu(norm(conv(x)))) as one autograd node that keeps x, and a byte for each pooled number.

    Args:
        x: (N, C, H, W), the images.
        conv: Of any stride, padding by zeros.
        norm: Of its output.
        pool: A square window of up to 11, without dilation, `ceil_mode` or `return_indices`.
        keep_conv: Also keep the convolution's output, so that it need not be computed again.

    Returns:
        (N, O, h, w), channels-last.
    """
    parameters = (norm.weight, norm.bias, conv.weight, conv.bias)
    check_norm(norm)
    check_dtypes(x, conv.weight)
    dtype = compute_dtype(x)
    with without_autocast(x.device.type):
        return cast(Tensor, _StemNode.apply(norm, conv, pool, keep_conv, *parameters, x.to(dtype)))


class _StemNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        module: BatchNorm2d,
        conv: nn.Conv2d,
        pool: nn.MaxPool2d,
        keep_conv: bool,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x: Tensor,
    ) -> Tensor:
        ctx.geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        ctx.window = _side(pool.kernel_size), _side(pool.stride), _side(pool.padding)
        convolved = _convolve(x, weight, bias, ctx.geometry)
        norm = NormRelu.of(module, norm_weight, norm_bias, module.statistics(convolved))
        kernel, stride, padding = ctx.window
        wants_offsets = any(ctx.needs_input_grad)
        out, offsets = pool_normalised(convolved, norm.scale, norm.shift, kernel, stride, padding, wants_offsets)
        ctx.norm, ctx.keep_conv, ctx.has_bias = norm.without_tensors(), keep_conv, bias is not None
        kept = [convolved] if keep_conv else []
        ctx.save_for_backward(norm_weight, norm_bias, weight, bias, *norm.statistics[:2], x, offsets, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        norm_weight, norm_bias, weight, bias, mean, var, x, offsets, *kept = ctx.saved_tensors
        norm: NormRelu = ctx.norm.over(norm_weight, norm_bias, mean, var)
        grad_out = channels_last(grad_out)
        # What was kept must stay as it is, for a graph may be walked again; hooks may have laid it out otherwise.
        convolved = kept[0].clone(memory_format=CHANNELS_LAST) if kept else _convolve(x, weight, bias, ctx.geometry)
        sums = mean.new_zeros(2, 0)
        if norm.needs_sums:
            sums = pool_sums(grad_out, offsets, convolved, mean, *ctx.window)
        gradients = norm.gradients_(sums)
        pool_backward(grad_out, offsets, convolved, norm.scale, gradients.constant, gradients.slope, *ctx.window)
        stride, padding, dilation, groups = ctx.geometry
        wants_x, wants_weight = ctx.needs_input_grad[8], ctx.needs_input_grad[6]
        grad_x, grad_weight, grad_bias = _aten.convolution_backward(
            convolved,
            x,
            weight.to(x.dtype),
            [weight.shape[0]] if ctx.has_bias else None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [wants_x, wants_weight, ctx.has_bias],
        )
        found = (gradients.weight, gradients.bias, grad_weight, grad_bias)
        dtypes = (norm_weight.dtype, norm_bias.dtype, weight.dtype, weight.dtype)
        of_parameters = (
            grad.to(dtype) if needed and grad is not None else None
            for grad, dtype, needed in zip(found, dtypes, ctx.needs_input_grad[4:8], strict=True)
        )
        return None, None, None, None, *of_parameters, grad_x


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
    kernel = channels_last(weight.to(x.dtype))
    return channels_last(F.conv2d(x, kernel, None if bias is None else bias.to(x.dtype), *geometry))


def _side(value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[0]


def _narrow_pool(x: Tensor, size: tuple[int, int], kernel: int, stride: int) -> tuple[int, int]:
    """Rows of x that make a few bands, and pooled rows that they make."""
    height = min(size[0], 2 * _window_bands(x, size, stride)[0][2])
    return min(x.shape[2], (height - 1) * stride + kernel), height


def _narrow_normalised(
    x: Tensor, scale: Any, shift: Any, kernel: int, stride: int, padding: int, wants_offsets: bool
) -> tuple[Any, ...]:
    high, _ = _narrow_pool(x, _pooled_size(x, kernel, stride, padding), kernel, stride)
    return x[:1, :, :high], scale, shift, kernel, stride, padding, wants_offsets


def _fake_normalised(
    x: Tensor, scale: Any, shift: Any, kernel: int, stride: int, padding: int, wants_offsets: bool
) -> tuple[Tensor, Tensor]:
    size = _pooled_size(x, kernel, stride, padding)
    offsets = empty_map(x.new_empty(0, dtype=torch.int8), x.shape[0] if wants_offsets else 0, x.shape[1], size)
    return empty_map(x, x.shape[0], x.shape[1], size), offsets


def _narrow_scatter(grad_out: Tensor, offsets: Tensor, x: Tensor, *others: Any) -> tuple[Any, ...]:
    *_, kernel, stride, _ = others
    high, height = _narrow_pool(x, (grad_out.shape[2], grad_out.shape[3]), kernel, stride)
    return grad_out[:1, :, :height], offsets[:1, :, :height], x[:1, :, :high], *others


@banded(narrow=_narrow_normalised, fake=_fake_normalised)
def pool_normalised(
    x: Tensor, scale: Tensor, shift: Tensor, kernel: int, stride: int, padding: int, wants_offsets: bool
) -> tuple[Tensor, Tensor]:
    """Max-pooled relu(scale * x + shift), and the offset of the largest in each window, -1 where none is positive.

    x is (N, C, H, W), channels-last; the offsets are int8, and empty where they are not wanted.
    """
    size = _pooled_size(x, kernel, stride, padding)
    out = empty_map(x, x.shape[0], x.shape[1], size)
    offsets = empty_map(x.new_empty(0, dtype=torch.int8), x.shape[0] if wants_offsets else 0, x.shape[1], size)
    for image, start, stop in _window_bands(x, size, stride):
        # Below zero, so that what lies outside the image is never the largest.
        low, high, above, height = _reach(x, start, stop, kernel, stride, padding)
        band = x.new_full((1, height, x.shape[3], x.shape[1]), -1)
        chains.norm_relu(rows(x)[image : image + 1, low:high], scale, shift, band[:, above : above + high - low])
        pooled, indices = F.max_pool2d(images(band), kernel, stride, (0, padding), return_indices=True)
        del band
        out[image, :, start:stop].copy_(pooled[0])
        if wants_offsets:
            corner = _corners(x, size[1], stop - start, stride, padding)
            row, column = indices // x.shape[3], indices % x.shape[3]
            found = (row - corner[0]) * kernel + (column - corner[1])
            offsets[image, :, start:stop].copy_(found.masked_fill_(pooled <= 0, -1)[0])
            del row, column, found
        del pooled, indices
    return out, offsets


@banded(narrow=_narrow_scatter, fake=lambda grad_out, offsets, x, mean, *_: mean.new_empty(2, x.shape[1]))
def pool_sums(
    grad_out: Tensor, offsets: Tensor, x: Tensor, mean: Tensor, kernel: int, stride: int, padding: int
) -> Tensor:
    """sum(g) and sum(g * (x - mean)) as (2, C), g being the gradient at the rectified map."""
    sums = mean.new_zeros(2, x.shape[1])
    for image, start, stop in _window_bands(x, (grad_out.shape[2], grad_out.shape[3]), stride):
        reach, part = _scatter(grad_out, offsets, x, image, start, stop, kernel, stride, padding)
        wide = part.to(mean.dtype)
        sums[0] += wide.sum((0, 1))
        sums[1] += (rows(x)[image, reach] - mean).mul_(wide).sum((0, 1))
        del part, wide
    return sums


@banded(mutates=["x"], narrow=_narrow_scatter)
def pool_backward(
    grad_out: Tensor,
    offsets: Tensor,
    x: Tensor,
    scale: Tensor,
    constant: Tensor,
    slope: Tensor,
    kernel: int,
    stride: int,
    padding: int,
) -> None:
    """x = scale * g + constant + slope * x in place: the map becomes its own gradient."""
    flat = pixels(x)
    for tile in tiles(flat):
        flat[tile] = torch.addcmul(constant, flat[tile].to(slope.dtype), slope)
    for image, start, stop in _window_bands(x, (grad_out.shape[2], grad_out.shape[3]), stride):
        reach, part = _scatter(grad_out, offsets, x, image, start, stop, kernel, stride, padding)
        rows(x)[image, reach] += part.to(scale.dtype).mul_(scale)
        del part


def _pooled_size(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in x.shape[2:])
    return height, width


def _window_bands(x: Tensor, size: tuple[int, int], stride: int) -> list[tuple[int, int, int]]:
    """(image, start, stop) of bands of pooled rows."""
    step = max(1, band_limit(x) // (x.shape[3] * x.shape[1] * x.element_size() * stride))
    starts = range(0, size[0], step)
    return [(image, start, min(start + step, size[0])) for image in range(x.shape[0]) for start in starts]


def _reach(x: Tensor, start: int, stop: int, kernel: int, stride: int, padding: int) -> tuple[int, int, int, int]:
    """Rows low..high of x that pooled rows start..stop read, rows outside the image above them, and rows in all."""
    first, height = start * stride - padding, (stop - 1 - start) * stride + kernel
    low, high = max(0, first), min(x.shape[2], first + height)
    return low, high, low - first, height


def _corners(x: Tensor, width: int, height: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """First row and column of each window of a band, as (height, 1) and (width,)."""
    row = torch.arange(height, device=x.device).mul_(stride).unsqueeze(1)
    return row, torch.arange(width, device=x.device).mul_(stride).sub_(padding)


def _scatter(
    grad_out: Tensor,
    offsets: Tensor,
    x: Tensor,
    image: int,
    start: int,
    stop: int,
    kernel: int,
    stride: int,
    padding: int,
) -> tuple[slice, Tensor]:
    """What pooled rows start..stop of an image hand back to the rows of x they reach: these, and (rows, W, C)."""
    low, high, above, height = _reach(x, start, stop, kernel, stride, padding)
    found = offsets[image : image + 1, :, start:stop]
    grad = grad_out[image : image + 1, :, start:stop].masked_fill(found < 0, 0)
    row, column = _corners(x, grad_out.shape[3], stop - start, stride, padding)
    place = found.long().clamp_(min=0)
    indices = (place // kernel).add_(row).mul_(x.shape[3]).add_(column).add_(place.remainder_(kernel))
    # A window over the padding cannot have its largest number there, save where nothing was positive.
    indices.clamp_(min=0)
    shape = empty_map(x, 1, x.shape[1], (height, x.shape[3]))
    part = _aten.max_pool2d_with_indices_backward(
        channels_last(grad), shape, [kernel] * 2, [stride] * 2, [0, padding], [1, 1], False, channels_last(indices)
    )
    return slice(low, high), rows(part)[0, above : above + high - low]
