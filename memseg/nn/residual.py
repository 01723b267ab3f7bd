"""Bottlenecks of a ResNet that keep nothing but what they hand on.

Plain autograd keeps six maps of a bottleneck: both outputs of its first two convolutions, each again normalised, the
third's output, four times as wide, and the result, which is the next bottleneck's input; for a width w, 12 w numbers
a pixel. Here a bottleneck is one autograd node, and of those

- the normalised maps are made band by band when they are needed (`memseg.nn.operators`);
- the third convolution's output is never needed again (`memseg.nn.projected_norm`), nor is that of a shortcut's;
- the result tells by itself where its ReLU let a gradient through, and that gradient is masked in place, where it is
  this node's alone (`memseg.nn.ownership`), and becomes the gradient of the input.

Recompute levels: `none` is the plain network under autograd; `norms` keeps the outputs of the first two convolutions
and the results, 6 w, and convolves nothing again; `units` keeps the results alone, 4 w; `segment` keeps what the first
bottleneck reads.

Source: He et al., arXiv:1512.03385; the stride lies on the 3x3 convolution, as in torchvision.
"""

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from memseg.levels import NormMode, Recompute
from memseg.nn.autograd import (
    check_dtypes,
    check_shapes,
    compute_dtype,
    is_traced,
    once_differentiable,
    refuse_scripting,
    without_autocast,
)
from memseg.nn.banded import banded
from memseg.nn.batch_norm import BatchNorm2d, check_norm
from memseg.nn.layout import as_kernel, as_pixels, channels_last, empty_map, images, pixels, tile_rows, tiles
from memseg.nn.norm_relu import NormRelu, add_line
from memseg.nn.operators import convolve, convolve_backward, project
from memseg.nn.ownership import take_over
from memseg.nn.products import product
from memseg.nn.projected_norm import projected_norm_backward
from memseg.nn.recompute import rebuild
from memseg.nn.strided import convolve_strided, convolve_strided_backward

EXPANSION = 4
"""Channels of a bottleneck's result, in multiples of its width."""


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with their norms, and a shortcut around them; torchvision's parameter names.

    Its forward is the plain one.

    Args:
        in_channels: Channels it reads.
        width: Channels of its 3x3 convolution; the result has four times as many.
        stride: Of the 3x3 convolution, and of the shortcut's.
        dilation: Of the 3x3 convolution.
        norm: Mode of all norms.
    """

    def __init__(self, in_channels: int, width: int, *, stride: int = 1, dilation: int = 1, norm: NormMode) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, EXPANSION * width
        self.stride, self.dilation = stride, dilation
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = BatchNorm2d(width, norm=norm)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = BatchNorm2d(width, norm=norm)
        self.conv3 = nn.Conv2d(width, self.out_channels, 1, bias=False)
        self.bn3 = BatchNorm2d(self.out_channels, norm=norm)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != self.out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, self.out_channels, 1, stride, bias=False),
                BatchNorm2d(self.out_channels, norm=norm),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, 4 * width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)

    @property
    def pairs(self) -> list[tuple[nn.Conv2d, BatchNorm2d]]:
        """Each convolution with the norm behind it, the shortcut's last."""
        pairs = [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]
        if self.downsample is not None:
            pairs.append(cast(tuple[nn.Conv2d, BatchNorm2d], tuple(self.downsample)))
        return pairs


class ResidualLayer(nn.Module):
    """Bottlenecks one after the other; torchvision's names (`0`, `1`, ...).

    Args:
        num_blocks: Bottlenecks.
        in_channels: Channels of its input.
        width: Of each bottleneck.
        stride: Of the first bottleneck.
        dilation: Of all bottlenecks but the first.
        first_dilation: Of the first, which still sees the map as the layer before left it.
        norm: Mode of all norms.
        recompute: What to rebuild in backward; may be changed at any time.

    Under autocast the layer computes in autocast's dtype, its input included.

    Raises:
        ValueError: `num_blocks` is less than 1.
    """

    levels: ClassVar[tuple[Recompute, ...]] = tuple(Recompute)

    def __init__(
        self,
        num_blocks: int,
        *,
        in_channels: int,
        width: int,
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int = 1,
        norm: NormMode = NormMode.BATCH,
        recompute: Recompute = Recompute.NONE,
    ) -> None:
        super().__init__()
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.in_channels, self.out_channels, self.recompute = in_channels, EXPANSION * width, recompute
        first = Bottleneck(in_channels, width, stride=stride, dilation=first_dilation, norm=norm)
        self.add_module("0", first)
        for index in range(1, num_blocks):
            self.add_module(str(index), Bottleneck(self.out_channels, width, dilation=dilation, norm=norm))

    @property
    def blocks(self) -> list[Bottleneck]:
        """The bottlenecks in order."""
        return [cast(Bottleneck, block) for block in self.children()]

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, 4 * width, H / stride, W / stride)."""
        for block in self.blocks:
            for _, norm in block.pairs:
                check_norm(norm)
        if is_traced() or (self.recompute is Recompute.NONE and torch.is_grad_enabled()):
            for block in self.blocks:
                x = block(x)
            return x
        if self.recompute is Recompute.SEGMENT:
            return rebuild(self._nodes, x, owner=self)
        return self._nodes(x)

    @_disable_dynamo
    def _nodes(self, x: Tensor) -> Tensor:
        check_shapes([x], self.in_channels)
        for block in self.blocks:
            check_dtypes(x, block.conv1.weight)
        x = x.to(compute_dtype(x))
        keep = self.recompute is Recompute.NORMS
        with without_autocast(x.device.type):
            for block in self.blocks:
                x = cast(Tensor, _BottleneckNode.apply(block, keep, x, *_node_parameters(block)))
        return x

    def __prepare_scriptable__(self) -> None:
        refuse_scripting(self)


_PER_PAIR = 3


def _node_parameters(block: Bottleneck) -> list[Tensor]:
    """In the order that the autograd node takes them."""
    return [tensor for conv, norm in block.pairs for tensor in (conv.weight, norm.weight, norm.bias)]


class _BottleneckNode(torch.autograd.Function):
    """A bottleneck as one node. `block` gives structure and norms; tensors come as arguments."""

    @staticmethod
    def forward(ctx: Any, block: Bottleneck, keep: bool, x: Tensor, *parameters: Tensor) -> Tensor:
        weights = [weight.to(x.dtype) for weight in parameters[::_PER_PAIR]]
        norms: list[NormRelu] = []

        def follow(convolved: Tensor) -> NormRelu:
            place = len(norms)
            _, weight, bias = parameters[_PER_PAIR * place : _PER_PAIR * (place + 1)]
            module = block.pairs[place][1]
            norms.append(NormRelu.of(module, weight, bias, module.statistics(convolved)))
            return norms[-1]

        seen = as_pixels(x)
        first = _project(seen, weights[0])
        second = _strided_map(first, block.stride)
        _convolve(first, follow(first), weights[1], block.stride, block.dilation, second)
        kept = [first, second] if keep else []
        del first
        norm2 = follow(second)
        out = empty_map(second, second.shape[0], block.out_channels, (second.shape[2], second.shape[3]))
        project(pixels(second), norm2.scale, norm2.shift, weights[2].flatten(1), None, pixels(out))
        norm3, shortcut = follow(out), seen
        numbers: list[Tensor] = []
        if block.downsample is not None:
            shortcut = _project(_every(seen, block.stride), weights[3])
            norm4 = follow(shortcut)
            numbers = [norm4.scale, norm4.shift]
        add_shortcut(pixels(out), norm3.scale, norm3.shift, pixels(shortcut), numbers)
        ctx.norms = [norm.without_tensors() for norm in norms]
        ctx.stride, ctx.dilation, ctx.has_downsample = block.stride, block.dilation, block.downsample is not None
        statistics = [tensor for norm in norms for tensor in norm.statistics[:2]]
        ctx.save_for_backward(x, out, *parameters, *statistics, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, out, *saved = ctx.saved_tensors
        pairs = len(ctx.norms)
        parameters, saved = saved[: _PER_PAIR * pairs], saved[_PER_PAIR * pairs :]
        statistics, kept = saved[: 2 * pairs], saved[2 * pairs :]
        weights = [weight.to(x.dtype) for weight in parameters[::_PER_PAIR]]
        norms = [
            norm.over(*parameters[_PER_PAIR * place + 1 :][:2], *statistics[2 * place :][:2])
            for place, norm in enumerate(ctx.norms)
        ]
        seen, stride = as_pixels(x), ctx.stride
        grad = take_over(grad_out, like=out)
        del grad_out
        torch.ops.aten.threshold_backward.grad_input(grad, channels_last(out), 0, grad_input=grad)
        if ctx.has_downsample:
            read = _every(seen, stride)
            grad_shortcut = torch.empty_like(read)
            shortcut = projected_norm_backward(
                pixels(grad), pixels(read), None, weights[3].flatten(1), norms[3], pixels(grad_shortcut)
            )
            del read
        if kept:
            first, second = (channels_last(one) for one in kept)
        else:
            first = _project(seen, weights[0])
            second = _strided_map(first, stride)
            _convolve(first, norms[0], weights[1], stride, ctx.dilation, second)
        grad_second = torch.empty_like(second)
        third = projected_norm_backward(
            pixels(grad), pixels(second), norms[1], weights[2].flatten(1), norms[2], pixels(grad_second)
        )
        of_norm2 = norms[1].gradients_(third.sums)
        if norms[1].uses_batch:
            add_line(pixels(grad_second), pixels(second), of_norm2.constant, of_norm2.slope)
        del second, kept
        grad_first = torch.empty_like(first)
        grad_weight2, sums = _convolve_backward(
            grad_second, first, norms[0], weights[1], stride, ctx.dilation, grad_first
        )
        of_norm1 = norms[0].gradients_(sums)
        norms[0].complete_(pixels(grad_first), pixels(first), of_norm1)
        del first, grad_second
        grad_weight1 = torch.mm(pixels(grad_first).t(), pixels(seen))
        grad_x = None
        if ctx.needs_input_grad[2] and ctx.has_downsample:
            grad_x = _project(grad_first, weights[0].transpose(0, 1))
            grad_x[:, :, ::stride, ::stride] += grad_shortcut
        elif ctx.needs_input_grad[2]:
            grad_x = grad
            pixels(grad_x).addmm_(pixels(grad_first), weights[0].flatten(1))
        found = [(grad_weight1, of_norm1), (grad_weight2, of_norm2), (third.weight, third.norm)]
        if ctx.has_downsample:
            found.append((shortcut.weight, shortcut.norm))
        flat = [tensor for weight, of_norm in found for tensor in (weight, of_norm.weight, of_norm.bias)]
        of_parameters = (
            _shaped(gradient, parameter) if needed else None
            for gradient, parameter, needed in zip(flat, parameters, ctx.needs_input_grad[3:], strict=True)
        )
        return None, None, grad_x, *of_parameters


def _narrow_shortcut(x: Tensor, scale: Any, shift: Any, shortcut: Tensor, numbers: Any) -> tuple[Any, ...]:
    two = slice(0, 2 * tile_rows(x))
    return x[two], scale, shift, shortcut[two], numbers


@banded(mutates=["x"], narrow=_narrow_shortcut)
def add_shortcut(x: Tensor, scale: Tensor, shift: Tensor, shortcut: Tensor, numbers: list[Tensor]) -> None:
    """x = relu(scale * x + shift + shortcut) in place, of matrices (M, C).

    Args:
        numbers: Scale and shift that the shortcut is first normalised with, or none.
    """
    for tile in tiles(x):
        part, other = torch.addcmul(shift, x[tile].to(scale.dtype), scale), shortcut[tile]
        if numbers:
            other = torch.addcmul(numbers[1], other.to(scale.dtype), numbers[0])
        x[tile] = part.add_(other).relu_()
        del part, other


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """(N, C, H, W) times a 1x1 kernel (O, C, 1, 1): (N, O, H, W), channels-last."""
    batch, _, height, width = x.shape
    matrix = weight.flatten(1).contiguous()
    return images(product(pixels(x), matrix).view(batch, height, width, matrix.shape[0]))


def _every(x: Tensor, stride: int) -> Tensor:
    """The pixels that a 1x1 convolution of that stride reads; channels-last."""
    return channels_last(x[:, :, ::stride, ::stride]) if stride > 1 else x


def _strided_map(x: Tensor, stride: int) -> Tensor:
    """A new map of as many channels as x, for what a padded 3x3 convolution of that stride makes of it."""
    return empty_map(x, x.shape[0], x.shape[1], (-(-x.shape[2] // stride), -(-x.shape[3] // stride)))


def _convolve(x: Tensor, norm: NormRelu, weight: Tensor, stride: int, dilation: int, out: Tensor) -> None:
    if stride == 1:
        convolve([x], norm.scale, norm.shift, weight, None, dilation, out)
    else:
        convolve_strided(x, norm.scale, norm.shift, weight, stride, dilation, out)


def _convolve_backward(
    grad_out: Tensor, x: Tensor, norm: NormRelu, weight: Tensor, stride: int, dilation: int, grad: Tensor
) -> tuple[Tensor, Tensor]:
    numbers = (norm.scale, norm.shift, norm.statistics.mean)
    if stride == 1:
        return convolve_backward(grad_out, [x], *numbers, weight, dilation, [grad], norm.needs_sums)
    return convolve_strided_backward(grad_out, x, *numbers, weight, stride, dilation, grad, norm.needs_sums)


def _shaped(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its parameter."""
    is_matrix = parameter.dim() == 4 and gradient.dim() == 2
    return (as_kernel(gradient, parameter) if is_matrix else gradient).to(parameter.dtype)
