"""A dense block whose memory grows with its depth, not with its square.

A dense layer reads everything before it. Plain autograd keeps every layer's own concatenated, normalised input:
O(depth^2) bytes, although the layers' outputs together are only O(depth). So the block is one autograd node:

- One channel-major buffer holds all features: a prefix of channels is a matrix, concatenation is free, and the block's
  output is the buffer itself.
- A channel's batch statistics never change once it is written: they are computed once, not once per reader.
- The bottleneck's input is normalised and multiplied tile by tile (`memseg.nn.kernels`); it never exists whole.
- Backward walks the layers in reverse over one gradient buffer and rebuilds one bottleneck at a time.

Recompute levels: `none` is the plain network under autograd; `norms` also keeps the bottlenecks; `units` keeps the
buffer alone; `segment` keeps only the block's input and fills the buffer again in backward.

Source: Huang et al., arXiv:1608.06993; Pleiss et al., arXiv:1707.06990.
"""

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from memseg.levels import NormMode, Recompute
from memseg.nn.batch_norm import BatchNorm2d
from memseg.nn.kernels import (
    Line,
    NormRelu,
    Statistics,
    batch_statistics,
    convolution_backward,
    from_channels,
    mask_,
    project,
    project_backward,
    statistics_for,
    to_channels,
)
from memseg.nn.recompute import recompute

_PARAMETERS_PER_LAYER = 6
_STATISTICS_PER_LAYER = 4


class DenseLayer(nn.Module):
    """BN-ReLU-1x1-BN-ReLU-3x3, torchvision's parameter names; its forward is the plain one.

    Args:
        in_channels: Channels it reads.
        growth_rate: Channels it adds.
        bn_size: Bottleneck width, in multiples of `growth_rate`.
        norm: Mode of both norms.
    """

    def __init__(self, in_channels: int, growth_rate: int, *, bn_size: int = 4, norm: NormMode) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.norm1 = BatchNorm2d(in_channels, norm=norm)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm2 = BatchNorm2d(width, norm=norm)
        self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, growth_rate, H, W)."""
        bottleneck = self.conv1(F.relu(self.norm1(features), inplace=True))
        return cast(Tensor, self.conv2(F.relu(self.norm2(bottleneck), inplace=True)))

    def node_parameters(self) -> tuple[Tensor, ...]:
        """In the order that the autograd node takes them."""
        return (
            self.norm1.weight,
            self.norm1.bias,
            self.conv1.weight,
            self.norm2.weight,
            self.norm2.bias,
            self.conv2.weight,
        )


class DenseBlock(nn.Module):
    """Dense layers that each read everything before them; torchvision's parameter names (`denselayer1` ...).

    Args:
        num_layers: Dense layers.
        in_channels: Channels of its input.
        growth_rate: Channels that each layer adds.
        bn_size: Bottleneck width, in multiples of `growth_rate`.
        norm: Mode of all norms.
        recompute: What to rebuild in backward; may be changed at any time.

    Raises:
        ValueError: `num_layers`, `in_channels` or `growth_rate` is less than 1.
    """

    levels: ClassVar[tuple[Recompute, ...]] = tuple(Recompute)

    def __init__(
        self,
        num_layers: int,
        *,
        in_channels: int,
        growth_rate: int,
        bn_size: int = 4,
        norm: NormMode = NormMode.BATCH,
        recompute: Recompute = Recompute.NONE,
    ) -> None:
        super().__init__()
        if min(num_layers, in_channels, growth_rate) < 1:
            raise ValueError(
                "num_layers, in_channels and growth_rate must be at least 1, "
                f"got {num_layers}, {in_channels} and {growth_rate}"
            )
        self.in_channels, self.growth_rate = in_channels, growth_rate
        self.out_channels = in_channels + num_layers * growth_rate
        self.recompute = recompute
        for index in range(num_layers):
            layer = DenseLayer(in_channels + index * growth_rate, growth_rate, bn_size=bn_size, norm=norm)
            self.add_module(f"denselayer{index + 1}", layer)

    @property
    def layers(self) -> list[DenseLayer]:
        """The dense layers in order."""
        return [cast(DenseLayer, layer) for layer in self.children()]

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H, W); channel-major in memory unless the level is `none`."""
        if self.recompute is Recompute.NONE and torch.is_grad_enabled():
            for layer in self.layers:
                x = torch.cat([x, layer(x)], 1)
            return x
        if self.recompute is Recompute.SEGMENT:
            return recompute(self._node, x)
        return self._node(x)

    def _node(self, x: Tensor) -> Tensor:
        parameters = [parameter for layer in self.layers for parameter in layer.node_parameters()]
        return cast(Tensor, _DenseBlockNode.apply(self, x, *parameters))


class _DenseBlockNode(torch.autograd.Function):
    """The whole block as one node. `block` gives structure, norms and level; tensors come as arguments."""

    @staticmethod
    def forward(ctx: Any, block: DenseBlock, x: Tensor, *parameters: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        columns = batch * height * width
        layers = block.layers
        growth = block.growth_rate
        shared = layers[0].norm1.uses_batch_statistics
        buffer = x.new_empty(block.out_channels, columns)
        from_channels(buffer[: block.in_channels], batch, (height, width)).copy_(x)
        mean, var = x.new_empty(block.out_channels), x.new_empty(block.out_channels)
        measured = 0
        bottlenecks: list[Tensor] = []
        statistics: list[Tensor] = []
        for index, layer in enumerate(layers):
            channels = block.in_channels + index * growth
            features = buffer[:channels]
            if shared:
                mean[measured:channels], var[measured:channels] = batch_statistics(buffer[measured:channels])
                measured = channels
                first = Statistics(mean[:channels], var[:channels])
                layer.norm1.follow(*first, columns)
            else:
                first = Statistics(layer.norm1.running_mean, layer.norm1.running_var)
            norm1 = NormRelu(layer.norm1.weight, layer.norm1.bias, first, layer.norm1.eps, shared)
            bottleneck = project(features, norm1, layer.conv1.weight.flatten(1))
            second = statistics_for(layer.norm2, bottleneck)
            norm2 = NormRelu(layer.norm2.weight, layer.norm2.bias, second, layer.norm2.eps, shared)
            normalised = norm2.images(bottleneck, batch, (height, width))
            if block.recompute is Recompute.NORMS:
                bottlenecks.append(bottleneck)
            del bottleneck
            grown = F.conv2d(normalised, layer.conv2.weight, padding=1)
            from_channels(buffer[channels : channels + growth], batch, (height, width)).copy_(grown)
            del normalised, grown
            statistics += [*first, *second]
        out = from_channels(buffer, batch, (height, width))
        ctx.batch_statistics, ctx.growth, ctx.in_channels = shared, growth, block.in_channels
        ctx.eps = [(layer.norm1.eps, layer.norm2.eps) for layer in layers]
        ctx.save_for_backward(out, *parameters, *statistics, *bottlenecks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        out, *saved = ctx.saved_tensors
        num_layers = len(ctx.eps)
        parameters = saved[: num_layers * _PARAMETERS_PER_LAYER]
        statistics = saved[len(parameters) : len(parameters) + num_layers * _STATISTICS_PER_LAYER]
        bottlenecks = saved[len(parameters) + len(statistics) :]
        batch, _, height, width = out.shape
        size = (height, width)
        buffer = to_channels(out)
        grad = torch.empty_like(buffer)
        from_channels(grad, batch, size).copy_(grad_out)
        line = Line(buffer.shape[0], buffer)
        gradients: list[tuple[Tensor, ...]] = []
        for index in reversed(range(num_layers)):
            weight1, bias1, conv1, weight2, bias2, conv2 = parameters[index * _PARAMETERS_PER_LAYER :][:6]
            mean1, var1, mean2, var2 = statistics[index * _STATISTICS_PER_LAYER :][:4]
            eps1, eps2 = ctx.eps[index]
            channels = ctx.in_channels + index * ctx.growth
            norm1 = NormRelu(weight1, bias1, Statistics(mean1, var1), eps1, ctx.batch_statistics)
            norm2 = NormRelu(weight2, bias2, Statistics(mean2, var2), eps2, ctx.batch_statistics)
            features, projection = buffer[:channels], conv1.flatten(1)
            line.add_to(grad, buffer, channels, channels + ctx.growth)
            bottleneck = bottlenecks[index] if bottlenecks else project(features, norm1, projection)
            normalised = norm2.images(bottleneck, batch, size)
            grad_grown = from_channels(grad[channels : channels + ctx.growth], batch, size)
            grad_normalised, grad_conv2 = convolution_backward(grad_grown, normalised, conv2, padding=1, dilation=1)
            mask_(grad_normalised, normalised)
            del normalised
            grad_rows = to_channels(grad_normalised)
            del grad_normalised
            grad_bottleneck, grad_weight2, grad_bias2 = norm2.backward(grad_rows, bottleneck)
            del grad_rows, bottleneck
            grad_conv1, grad_weight1, grad_bias1 = project_backward(
                grad_bottleneck, features, norm1, projection, grad=grad[:channels], line=line
            )
            del grad_bottleneck
            gradients.append(
                (grad_weight1, grad_bias1, grad_conv1.view_as(conv1), grad_weight2, grad_bias2, grad_conv2)
            )
        line.add_to(grad, buffer, 0, ctx.in_channels)
        # A copy, so that the gradient of the whole buffer does not stay alive behind that of the input.
        grad_x = from_channels(grad[: ctx.in_channels].clone(), batch, size)
        flat = [gradient for layer in reversed(gradients) for gradient in layer]
        wanted = ctx.needs_input_grad[2:]
        return None, grad_x, *(gradient if needed else None for gradient, needed in zip(flat, wanted, strict=True))
