"""Batch norm, ReLU and a 1x1 convolution without ever holding the normalised map.

A DenseNet is made of BN-ReLU-convolution. Kept or rebuilt whole, the normalised map is as large as the features
themselves. Here a map is a channel-major matrix (C, M), M = N * H * W, and a 1x1 convolution is a matrix product; so
we walk over columns in tiles small enough for the cache: normalise a tile into scratch, multiply, go on.

Backward walks the same tiles. Batch statistics make each channel's gradient depend on all its columns, but only
through two numbers per channel, so the terms that need them are a line in x and are added afterwards:

    dx = s * g  -  s * sum(g) / M  -  s * (x - mean) / std^2 * sum(g * (x - mean)) / M  =  s * g + constant + slope * x

with g the gradient at the normalised, rectified map and s = weight / std. A map with many readers (every dense layer
reads all before it) adds the lines of all of them in one pass: see `Line`.

Source: Ioffe and Szegedy, arXiv:1502.03167, for the gradient; Pleiss et al., arXiv:1707.06990, for shared memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from memseg.nn.batch_norm import BatchNorm2d

_aten = torch.ops.aten

_TILE_BYTES = {"cpu": 2 * 2**20}
"""Scratch that stays in the processor's caches between the passes over a tile."""
_TILE_BYTES_ELSEWHERE = 64 * 2**20
"""On an accelerator few large products beat many small ones; 64 MiB is small beside any card."""


class Statistics(NamedTuple):
    """Mean and biased variance per channel, each (C,)."""

    mean: Tensor
    var: Tensor


def to_channels(x: Tensor) -> Tensor:
    """(N, C, H, W) as a matrix (C, N * H * W); no copy where the memory lies that way already."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def from_channels(x: Tensor, batch: int, size: tuple[int, int]) -> Tensor:
    """A matrix (C, N * H * W) seen as (N, C, H, W)."""
    return x.view(x.shape[0], batch, *size).transpose(0, 1)


def batch_statistics(x: Tensor) -> Statistics:
    """Statistics of the rows of a (C, M) matrix, or of the channels of (N, C, H, W).

    Raises:
        ValueError: there is one value per channel, so that no variance exists (as torch's batch norm does).
    """
    x = x.unsqueeze(0) if x.dim() == 2 else x
    if x.numel() == x.shape[1]:
        raise ValueError(f"batch statistics need more than 1 value per channel, got input size {tuple(x.shape)}")
    return Statistics(*_aten.batch_norm_update_stats(x, None, None, 0.0))


def statistics_for(norm: BatchNorm2d, x: Tensor) -> Statistics:
    """What `norm` normalises x (C, M) or (N, C, H, W) with now; its running statistics follow a batch."""
    if not norm.uses_batch_statistics:
        return Statistics(norm.running_mean, norm.running_var)
    statistics = batch_statistics(x)
    norm.follow(*statistics, x.numel() // statistics.mean.numel())
    return statistics


@dataclass(frozen=True)
class NormRelu:
    """One BN-ReLU with the numbers it used: what forward did and backward must do again.

    Each of weight, bias and the statistics is (C,). `batch` says that the statistics came from the batch itself, so
    that gradients flow through them.
    """

    weight: Tensor
    bias: Tensor
    statistics: Statistics
    eps: float
    batch: bool

    def whole(self, x: Tensor) -> Tensor:
        """relu(bn(x)) for contiguous (N, C, H, W)."""
        out, unused = torch.empty_like(x), x.new_empty(0)
        mean, var = self.statistics
        torch.native_batch_norm(
            x, self.weight, self.bias, mean, var, False, 0.0, self.eps, out=(out, unused, unused.clone())
        )
        return out.relu_()

    def images(self, x: Tensor, batch: int, size: tuple[int, int]) -> Tensor:
        """relu(bn(x)) of a matrix (C, M), laid out as contiguous (N, C, H, W) for a convolution."""
        out = x.new_empty(batch, x.shape[0], *size)
        scale, shift = (number.view(-1, 1, 1, 1) for number in self.scale_and_shift())
        torch.addcmul(shift, x.view(-1, batch, *size), scale, out=out.transpose(0, 1)).relu_()
        return out

    def backward(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, weight and bias from the gradient of bn(x), see `mask_`.

        Both are contiguous and alike: (N, C, H, W), or matrices (C, M).
        """
        mean, var = self.statistics
        std_inverse = (var + self.eps).rsqrt()
        mapped = (grad, x) if x.dim() == 4 else (grad.unsqueeze(0), x.unsqueeze(0))
        grad_x, grad_weight, grad_bias = _aten.native_batch_norm_backward(
            *mapped, self.weight, mean, var, mean, std_inverse, self.batch, self.eps, [True, True, True]
        )
        return grad_x.view_as(x), grad_weight, grad_bias

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """bn(x) = scale * x + shift, each (C, 1)."""
        scale = self.weight * (self.statistics.var + self.eps).rsqrt()
        return scale.unsqueeze(1), (self.bias - self.statistics.mean * scale).unsqueeze(1)


def mask_(grad: Tensor, normalised: Tensor) -> Tensor:
    """ReLU's backward in place: `grad` is zeroed where `normalised` = relu(bn(x)) is; returns it."""
    _aten.threshold_backward.grad_input(grad, normalised, 0, grad_input=grad)
    return grad


class Line:
    """Per channel, the constant and the slope that batch statistics add to a gradient: constant + slope * x."""

    def __init__(self, channels: int, like: Tensor) -> None:
        self.constant = like.new_zeros(channels, 1)
        self.slope = like.new_zeros(channels, 1)

    def add_to(self, grad: Tensor, x: Tensor, start: int, stop: int) -> None:
        """Add the line to rows start..stop of `grad` (C, M), x being the map itself."""
        rows = grad[start:stop]
        rows.add_(self.constant[start:stop]).addcmul_(x[start:stop], self.slope[start:stop])


def project(x: Tensor, norm: NormRelu, weight: Tensor) -> Tensor:
    """weight @ relu(bn(x)): a BN-ReLU-1x1 convolution.

    Args:
        x: (C, M), rows contiguous.
        norm: For the C rows.
        weight: (O, C).

    Returns:
        (O, M). Beyond it one tile of scratch is alive.
    """
    out = x.new_empty(weight.shape[0], x.shape[1])
    _project(x, *norm.scale_and_shift(), weight, out, x.new_empty(x.shape[0], _tile_columns(x)))
    return out


def project_backward(
    grad_out: Tensor, x: Tensor, norm: NormRelu, weight: Tensor, *, grad: Tensor, line: Line
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `project`'s weight and of its norm's weight and bias; the gradient of x is added to `grad`.

    Args:
        grad_out: (O, M).
        x, norm, weight: As in forward.
        grad: (C, M), added to, without the terms through batch statistics.
        line: Those terms, added to its first C channels; `Line.add_to` completes `grad` once all readers have run.
    """
    channels, columns = x.shape
    scale, shift = norm.scale_and_shift()
    grad_weight = torch.zeros_like(weight)
    sums = x.new_zeros(2, channels)
    scratch = x.new_empty(2, channels, _tile_columns(x))
    mean = norm.statistics.mean.unsqueeze(1)
    _project_backward(grad_out, x, scale, shift, mean, weight, grad, grad_weight, sums, scratch)
    grad_sum, moment_sum = sums
    std_inverse = (norm.statistics.var + norm.eps).rsqrt()
    grad_norm_weight = moment_sum * std_inverse
    if norm.batch:
        slope = -scale.squeeze(1) * std_inverse * grad_norm_weight / columns
        line.slope[:channels, 0] += slope
        line.constant[:channels, 0] -= scale.squeeze(1) * grad_sum / columns + slope * norm.statistics.mean
    return grad_weight, grad_norm_weight, grad_sum


def _tile_columns(x: Tensor) -> int:
    """Columns of a tile of x (C, M) whose scratch has the size that suits the device."""
    limit = _TILE_BYTES.get(x.device.type, _TILE_BYTES_ELSEWHERE)
    return min(x.shape[1], max(512, limit // (x.shape[0] * x.element_size()) // 512 * 512))


def _tiles(x: Tensor, scratch: Tensor) -> Iterator[tuple[slice, int]]:
    """Slices of x's columns, each with its width."""
    columns, width = x.shape[1], scratch.shape[-1]
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        yield slice(start, stop), stop - start


# The walks over tiles are operators of their own, so that a trace on fake tensors sees one operation with its scratch
# instead of thousands, and torch.compile a node that it need not look into.


@torch.library.custom_op("memseg::project", mutates_args=("out", "scratch"))
def _project(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, out: Tensor, scratch: Tensor) -> None:
    """out (O, M) = weight (O, C) @ relu(scale * x + shift), x (C, M), through `scratch` (C, tile)."""
    for tile, width in _tiles(x, scratch):
        normalised = scratch[:, :width]
        torch.addcmul(shift, x[:, tile], scale, out=normalised).relu_()
        torch.mm(weight, normalised, out=out[:, tile])


@torch.library.custom_op("memseg::project_backward", mutates_args=("grad", "grad_weight", "sums", "scratch"))
def _project_backward(
    grad_out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    weight: Tensor,
    grad: Tensor,
    grad_weight: Tensor,
    sums: Tensor,
    scratch: Tensor,
) -> None:
    """Add to `grad` (C, M), `grad_weight` (O, C) and `sums` (2, C): sum(g) and sum(g * (x - mean))."""
    for tile, width in _tiles(x, scratch):
        normalised, grad_normalised = scratch[0, :, :width], scratch[1, :, :width]
        torch.addcmul(shift, x[:, tile], scale, out=normalised).relu_()
        grad_weight.addmm_(grad_out[:, tile], normalised.t())
        torch.mm(weight.t(), grad_out[:, tile], out=grad_normalised)
        mask_(grad_normalised, normalised)
        grad[:, tile].addcmul_(grad_normalised, scale)
        sums[0] += grad_normalised.sum(1)
        sums[1] += torch.sub(x[:, tile], mean, out=normalised).mul_(grad_normalised).sum(1)


@_project.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, out: Tensor, scratch: Tensor) -> None:
    return None


@_project_backward.register_fake
def _(
    grad_out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    weight: Tensor,
    grad: Tensor,
    grad_weight: Tensor,
    sums: Tensor,
    scratch: Tensor,
) -> None:
    return None


@register_flop_formula(torch.ops.memseg.project)
def _project_flops(x: torch.Size, scale: Any, shift: Any, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * weight[0] * weight[1] * x[1]


@register_flop_formula(torch.ops.memseg.project_backward)
def _project_backward_flops(grad_out: torch.Size, x: torch.Size, *_: Any, **__: Any) -> int:
    return 4 * grad_out[0] * x[0] * x[1]


def convolution_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, *, padding: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """Gradients of input and weight of a stride-1 convolution without bias; `x` is contiguous."""
    grad_x, grad_weight, _ = _aten.convolution_backward(
        grad_out.contiguous(),
        x,
        weight,
        None,
        [1, 1],
        [padding] * 2,
        [dilation] * 2,
        False,
        [0, 0],
        1,
        [True, True, False],
    )
    return cast(Tensor, grad_x), cast(Tensor, grad_weight)


def average_pool(x: Tensor, batch: int, size: tuple[int, int]) -> Tensor:
    """2x2 average pooling, stride 2, of a matrix (C, N * H * W)."""
    return F.avg_pool2d(x.view(x.shape[0], batch, *size), 2).flatten(1)


def average_pool_backward(grad: Tensor, batch: int, size: tuple[int, int]) -> Tensor:
    """Gradient (C, N * H * W) of `average_pool`'s input, `grad` being (C, N, H // 2, W // 2)."""
    channels, (height, width) = grad.shape[0], size
    out = grad.new_zeros(channels, batch, height, width)
    even = out[:, :, : height // 2 * 2, : width // 2 * 2]
    even.view(channels, batch, height // 2, 2, width // 2, 2).copy_(grad.mul(0.25)[:, :, :, None, :, None])
    return out.flatten(1)
