"""A dense block whose memory grows with its depth, not with its square.

A dense layer reads everything before it. Plain autograd keeps every layer's own concatenated, normalised input:
O(depth^2) bytes, although the layers' outputs together are only O(depth). So the block is one autograd node:

- One channels-last buffer holds all features: a prefix of channels is a matrix with a row stride, concatenation is
  free, and the block's output is the buffer itself.
- A channel's batch statistics never change once it is written: they are computed once, not once per reader.
- The normalised inputs of both convolutions are made band by band (`memseg.nn.operators`); they never exist whole.
- Backward walks the layers in reverse over one gradient buffer and rebuilds one bottleneck at a time.

Recompute levels: `none` is the plain network under autograd; `norms` also keeps the bottlenecks; `units` keeps the
buffer alone; `segment` keeps only the block's input and fills the buffer again in backward. With dropout, all but
`none` and `segment` also keep its masks, a byte for each number that a layer makes.

Source: Huang et al., arXiv:1608.06993; Pleiss et al., arXiv:1707.06990.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
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
from memseg.nn.batch_norm import BatchNorm2d, Statistics, batch_statistics, check_norm
from memseg.nn.layout import as_kernel, channels_last, empty_map, pixels
from memseg.nn.norm_relu import Line, NormRelu
from memseg.nn.operators import convolve, convolve_backward, project, project_backward
from memseg.nn.ownership import take_over
from memseg.nn.recompute import rebuild

_PARAMETERS_PER_LAYER = 6


class DenseLayer(nn.Module):
    """BN-ReLU-1x1-BN-ReLU-3x3, torchvision's parameter names; its forward is the plain one.

    Args:
        in_channels: Channels it reads.
        growth_rate: Channels it adds.
        bn_size: Bottleneck width, in multiples of `growth_rate`.
        dilation: Of the 3x3 convolution.
        drop_rate: Probability that dropout zeroes a number it adds.
        norm: Mode of both norms.
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        *,
        bn_size: int = 4,
        dilation: int = 1,
        drop_rate: float = 0.0,
        norm: NormMode,
    ) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.norm1 = BatchNorm2d(in_channels, norm=norm)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm2 = BatchNorm2d(width, norm=norm)
        self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=dilation, dilation=dilation, bias=False)
        self.drop_rate = drop_rate

    def forward(self, features: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, growth_rate, H, W)."""
        bottleneck = self.conv1(F.relu(self.norm1(features), inplace=True))
        grown = cast(Tensor, self.conv2(F.relu(self.norm2(bottleneck), inplace=True)))
        return F.dropout(grown, self.drop_rate, self.training) if self.drops else grown

    @property
    def drops(self) -> bool:
        """Whether a forward now would drop anything."""
        return self.training and self.drop_rate > 0

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
        dilation: Of the 3x3 convolutions.
        drop_rate: Of dropout behind each layer, 0..1.
        norm: Mode of all norms.
        recompute: What to rebuild in backward; may be changed at any time.

    Under autocast the whole block computes in autocast's dtype, its input included.

    Raises:
        ValueError: `num_layers`, `in_channels`, `growth_rate` or `dilation` is less than 1, or `drop_rate` not within
            0..1.
    """

    levels: ClassVar[tuple[Recompute, ...]] = tuple(Recompute)

    def __init__(
        self,
        num_layers: int,
        *,
        in_channels: int,
        growth_rate: int,
        bn_size: int = 4,
        dilation: int = 1,
        drop_rate: float = 0.0,
        norm: NormMode = NormMode.BATCH,
        recompute: Recompute = Recompute.NONE,
    ) -> None:
        super().__init__()
        if min(num_layers, in_channels, growth_rate, dilation) < 1:
            raise ValueError(
                "num_layers, in_channels, growth_rate and dilation must be at least 1, "
                f"got {num_layers}, {in_channels}, {growth_rate} and {dilation}"
            )
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate must be at least 0 and less than 1, got {drop_rate}")
        self.in_channels, self.growth_rate, self.width = in_channels, growth_rate, bn_size * growth_rate
        self.out_channels = in_channels + num_layers * growth_rate
        self.dilation, self.recompute = dilation, recompute
        for index in range(num_layers):
            layer = DenseLayer(
                in_channels + index * growth_rate,
                growth_rate,
                bn_size=bn_size,
                dilation=dilation,
                drop_rate=drop_rate,
                norm=norm,
            )
            self.add_module(f"denselayer{index + 1}", layer)

    @property
    def layers(self) -> list[DenseLayer]:
        """The dense layers in order."""
        return [cast(DenseLayer, layer) for layer in self.children()]

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H, W), channels-last unless the level is `none`."""
        for layer in self.layers:
            check_norm(layer.norm1)
            check_norm(layer.norm2)
        if is_traced() or (self.recompute is Recompute.NONE and torch.is_grad_enabled()):
            for layer in self.layers:
                x = torch.cat([x, layer(x)], 1)
            return x
        if self.recompute is Recompute.SEGMENT:
            return rebuild(self._node, x, owner=self)
        return self._node(x)

    @_disable_dynamo
    def _node(self, x: Tensor) -> Tensor:
        check_shapes([x], self.in_channels)
        for layer in self.layers:
            check_dtypes(x, layer.conv1.weight)
        parameters = [parameter for layer in self.layers for parameter in layer.node_parameters()]
        dtype = compute_dtype(x)
        with without_autocast(x.device.type):
            return cast(Tensor, _DenseBlockNode.apply(self, x.to(dtype), *parameters))

    def __prepare_scriptable__(self) -> None:
        refuse_scripting(self)


@dataclass(frozen=True)
class _Layer:
    """What backward knows of one layer beside the tensors that autograd keeps."""

    channels: int
    """Channels that it reads."""
    norm1: NormRelu
    norm2: NormRelu
    keep_rate: float


class _DenseBlockNode(torch.autograd.Function):
    """The whole block as one node. `block` gives structure, norms and level; tensors come as arguments."""

    @staticmethod
    def forward(ctx: Any, block: DenseBlock, x: Tensor, *parameters: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        out = empty_map(x, batch, block.out_channels, (height, width))
        out[:, : block.in_channels].copy_(x)
        features = pixels(out)
        layers = block.layers
        known = _Known(block, x) if any(layer.norm1.uses_batch_statistics for layer in layers) else None
        bottleneck = empty_map(x, batch, block.width, (height, width))
        notes: list[_Layer] = []
        statistics: list[Tensor] = []
        bottlenecks: list[Tensor] = []
        masks: list[Tensor] = []
        for index, layer in enumerate(layers):
            channels = block.in_channels + index * block.growth_rate
            weight1, bias1, conv1, weight2, bias2, conv2 = parameters[index * _PARAMETERS_PER_LAYER :][:6]
            if block.recompute is Recompute.NORMS and bottlenecks:
                bottleneck = torch.empty_like(bottleneck)
            first = layer.norm1.running_statistics
            if known and layer.norm1.uses_batch_statistics:
                first = known.of(layer.norm1, channels)
            norm1 = NormRelu.of(layer.norm1, weight1, bias1, first)
            projection = conv1.to(x.dtype).flatten(1)
            project(features[:, :channels], norm1.scale, norm1.shift, projection, None, pixels(bottleneck))
            norm2 = NormRelu.of(layer.norm2, weight2, bias2, layer.norm2.statistics(bottleneck))
            grown = out[:, channels : channels + block.growth_rate]
            convolve([bottleneck], norm2.scale, norm2.shift, conv2.to(x.dtype), None, block.dilation, grown)
            if layer.drops:
                dropped, mask = torch.native_dropout(channels_last(grown), layer.drop_rate, True)
                grown.copy_(dropped)
                masks.append(mask)
                del dropped
            if known and index + 1 < len(layers):
                known.learn(channels_last(grown))
            if block.recompute is Recompute.NORMS:
                bottlenecks.append(bottleneck)
            statistics += [*first[:2], *norm2.statistics[:2]]
            keep_rate = 1 - layer.drop_rate if layer.drops else 1.0
            notes.append(_Layer(channels, norm1.without_tensors(), norm2.without_tensors(), keep_rate))
        ctx.layers, ctx.in_channels, ctx.growth, ctx.width = notes, block.in_channels, block.growth_rate, block.width
        ctx.dilation = block.dilation
        ctx.save_for_backward(out, *parameters, *statistics, *masks, *bottlenecks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        out, *saved = ctx.saved_tensors
        layers: list[_Layer] = ctx.layers
        parameters, saved = _split(saved, len(layers) * _PARAMETERS_PER_LAYER)
        statistics, saved = _split(saved, len(layers) * 4)
        masks, bottlenecks = _split(saved, sum(layer.keep_rate < 1 for layer in layers))
        batch, _, height, width = out.shape
        features = pixels(out)
        grad_map = take_over(grad_out, like=out)
        del grad_out
        grad = pixels(grad_map)
        wide = statistics[0]
        line = Line(features.shape[1], wide)
        bottleneck = out.new_empty(0)
        if not bottlenecks:
            bottleneck = empty_map(out, batch, ctx.width, (height, width))
        grad_bottleneck = empty_map(out, batch, ctx.width, (height, width))
        gradients: list[tuple[Tensor, ...]] = []
        for index in reversed(range(len(layers))):
            layer = layers[index]
            weight1, bias1, conv1, weight2, bias2, conv2 = parameters[index * _PARAMETERS_PER_LAYER :][:6]
            norm1 = layer.norm1.over(weight1, bias1, *statistics[4 * index : 4 * index + 2])
            norm2 = layer.norm2.over(weight2, bias2, *statistics[4 * index + 2 : 4 * index + 4])
            read, made = features[:, : layer.channels], slice(layer.channels, layer.channels + ctx.growth)
            line.add_to(grad, features, made)
            grad_grown = grad_map[:, made]
            if layer.keep_rate < 1:
                grad_grown.mul_(masks.pop()).div_(layer.keep_rate)
            projection = conv1.to(out.dtype).flatten(1)
            if bottlenecks:
                bottleneck = bottlenecks.pop()
            else:
                project(read, norm1.scale, norm1.shift, projection, None, pixels(bottleneck))
            grad_conv2, sums = convolve_backward(
                grad_grown,
                [bottleneck],
                norm2.scale,
                norm2.shift,
                norm2.statistics.mean,
                conv2.to(out.dtype),
                ctx.dilation,
                [grad_bottleneck],
                norm2.needs_sums,
            )
            second = norm2.gradients_(sums)
            norm2.complete_(pixels(grad_bottleneck), pixels(bottleneck), second)
            grad_conv1, sums = project_backward(
                pixels(grad_bottleneck),
                read,
                norm1.scale,
                norm1.shift,
                norm1.statistics.mean,
                norm1.offset,
                projection,
                grad[:, : layer.channels],
                True,
                norm1.needs_sums,
            )
            first = norm1.gradients_(sums)
            line.add(first)
            gradients.append(
                (first.weight, first.bias, as_kernel(grad_conv1, conv1), second.weight, second.bias, grad_conv2)
            )
        line.add_to(grad, features, slice(0, ctx.in_channels))
        grad_x = None
        if ctx.needs_input_grad[1]:
            # A copy, so that the gradient of the whole buffer does not stay alive behind that of the input.
            grad_x = empty_map(out, batch, ctx.in_channels, (height, width)).copy_(grad_map[:, : ctx.in_channels])
        flat = [gradient for layer_gradients in reversed(gradients) for gradient in layer_gradients]
        wanted = ctx.needs_input_grad[2:]
        return (
            None,
            grad_x,
            *(
                gradient.to(parameter.dtype) if needed else None
                for gradient, parameter, needed in zip(flat, parameters, wanted, strict=True)
            ),
        )


class _Known:
    """Batch statistics of the channels written so far, each computed once; for each group of replicas that syncs."""

    def __init__(self, block: DenseBlock, x: Tensor) -> None:
        following = [layer.norm1 for layer in block.layers if layer.norm1.uses_batch_statistics]
        self._norms = {norm.replicas: norm for norm in following}
        self._size, self._channels = block.out_channels - block.growth_rate, 0
        self._found: dict[distributed.ProcessGroup | None, Statistics] = {}
        self.learn(x)

    def learn(self, written: Tensor) -> None:
        """Of channels that have just been written, (N, C, H, W)."""
        own = batch_statistics(written)
        stop = self._channels + own.mean.numel()
        for group, norm in self._norms.items():
            part = norm.join_replicas(own)
            if group not in self._found:
                mean, var = (numbers.new_empty(self._size) for numbers in part[:2])
                self._found[group] = Statistics(mean, var, part.values)
            for known, numbers in zip(self._found[group][:2], part[:2], strict=True):
                known[self._channels : stop] = numbers
        self._channels = stop

    def of(self, norm: BatchNorm2d, channels: int) -> Statistics:
        """Of the first channels, all replicas' together; the running ones of `norm` follow."""
        mean, var, values = self._found[norm.replicas]
        return norm.follow(Statistics(mean[:channels], var[:channels], values))


def _split(tensors: list[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
    return tensors[:count], tensors[count:]
