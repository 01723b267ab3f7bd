"""The BN-ReLU-convolution unit that keeps only what it reads.

Outside its dense blocks a ladder DenseNet is made of these: transitions (with 2x2 average pooling), skip projections,
the context, logits, and blends, which first upsample one input and join it to another. Plain autograd keeps the
joined map, the rectified map and the pooling's input; here they are rebuilt from the unit's inputs.
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
    average_pool,
    average_pool_backward,
    convolution_backward,
    from_channels,
    mask_,
    project,
    project_backward,
    statistics_for,
    to_channels,
)


class NormReluConv(nn.Module):
    """Convolution of relu(bn(x)), the same size out as in, or half of it with `pool`.

    Args:
        in_channels: Channels of x; of both inputs together where there are two.
        out_channels: Channels of the result.
        kernel_size: 1 or 3.
        dilation: Of a 3x3 kernel.
        bias: Whether the convolution has one.
        pool: Whether 2x2 average pooling follows, as in a DenseNet transition.
        norm: Mode of the norm.
        recompute: `none` is the plain network under autograd; any other level keeps only the unit's inputs.

    Raises:
        ValueError: `kernel_size` is neither 1 nor 3, or pooling is asked of a 3x3 convolution.
    """

    levels: ClassVar[tuple[Recompute, ...]] = (Recompute.NONE, Recompute.UNITS)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        dilation: int = 1,
        bias: bool = False,
        pool: bool = False,
        norm: NormMode = NormMode.BATCH,
        recompute: Recompute = Recompute.NONE,
    ) -> None:
        super().__init__()
        if kernel_size not in (1, 3):
            raise ValueError(f"kernel_size must be 1 or 3, got {kernel_size}")
        if pool and kernel_size != 1:
            raise ValueError("pool needs kernel_size 1, as in a DenseNet transition, got 3")
        padding = dilation if kernel_size == 3 else 0
        self.norm = BatchNorm2d(in_channels, norm=norm)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=bias)
        self.pool = pool
        self.recompute = recompute

    def forward(self, *inputs: Tensor) -> Tensor:
        """(N, C, H, W), or a coarse and a fine map to be joined as in `join`, to (N, out_channels, H, W)."""
        if self.recompute is Recompute.NONE and torch.is_grad_enabled():
            out = self.conv(F.relu(self.norm(join(*inputs)), inplace=True))
            return F.avg_pool2d(out, 2) if self.pool else cast(Tensor, out)
        parameters = (self.norm.weight, self.norm.bias, self.conv.weight, self.conv.bias)
        return cast(Tensor, _UnitNode.apply(self, *parameters, *inputs))


class Blend(NormReluConv):
    """The paper's transition-up: a coarse map upsampled to a skip's size, joined to it, BN-ReLU-3x3.

    Args:
        coarse_channels, skip_channels: Channels of the two inputs.
        out_channels: Channels of the result.
        norm, recompute: As in NormReluConv.
    """

    def __init__(
        self,
        coarse_channels: int,
        skip_channels: int,
        out_channels: int,
        *,
        norm: NormMode = NormMode.BATCH,
        recompute: Recompute = Recompute.NONE,
    ) -> None:
        super().__init__(coarse_channels + skip_channels, out_channels, kernel_size=3, norm=norm, recompute=recompute)


def join(*inputs: Tensor) -> Tensor:
    """One map as it is; of two, the first upsampled bilinearly to the second's size, then both concatenated."""
    if len(inputs) == 1:
        return inputs[0]
    coarse, skip = inputs
    upsampled = F.interpolate(coarse, skip.shape[2:], mode="bilinear", align_corners=False)
    return torch.cat([upsampled, skip], 1)


def _join_backward(grad: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    if len(inputs) == 1:
        return [grad]
    coarse, skip = inputs
    channels = coarse.shape[1]
    grad_coarse = torch.ops.aten.upsample_bilinear2d_backward(
        grad[:, :channels].contiguous(), list(skip.shape[2:]), list(coarse.shape), False, None, None
    )
    return [grad_coarse, grad[:, channels:].contiguous()]


class _UnitNode(torch.autograd.Function):
    """join, BN, ReLU, convolution, pooling as one node that saves the unit's inputs and per-channel statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: NormReluConv,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *inputs: Tensor,
    ) -> Tensor:
        x = join(*inputs)
        batch, _, height, width = x.shape
        ctx.pointwise = weight.shape[2] == 1
        x = to_channels(x) if ctx.pointwise else x.contiguous()
        statistics = statistics_for(unit.norm, x)
        norm = NormRelu(norm_weight, norm_bias, statistics, unit.norm.eps, unit.norm.uses_batch_statistics)
        if ctx.pointwise:
            size = (height, width)
            out = project(x, norm, weight.flatten(1))
            if bias is not None:
                out += bias.unsqueeze(1)
            if unit.pool:
                out, size = average_pool(out, batch, size), (height // 2, width // 2)
            out = from_channels(out, batch, size)
        else:
            ctx.dilation = unit.conv.dilation[0]
            out = F.conv2d(norm.whole(x), weight, bias, padding=ctx.dilation, dilation=ctx.dilation)
        ctx.eps, ctx.batch_statistics, ctx.pool = unit.norm.eps, norm.batch, unit.pool
        ctx.has_bias = bias is not None
        ctx.save_for_backward(norm_weight, norm_bias, weight, *statistics, *inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        norm_weight, norm_bias, weight, mean, var, *inputs = ctx.saved_tensors
        x = join(*inputs)
        batch, _, height, width = x.shape
        norm = NormRelu(norm_weight, norm_bias, Statistics(mean, var), ctx.eps, ctx.batch_statistics)
        grad_bias = grad_out.sum((0, 2, 3)) if ctx.has_bias else None
        if ctx.pointwise:
            x = to_channels(x)
            if ctx.pool:
                grad_conv = average_pool_backward(grad_out.transpose(0, 1), batch, (height, width))
            else:
                grad_conv = to_channels(grad_out)
            grad_x = torch.zeros_like(x)
            line = Line(x.shape[0], x)
            grad_weight, grad_norm_weight, grad_norm_bias = project_backward(
                grad_conv, x, norm, weight.flatten(1), grad=grad_x, line=line
            )
            line.add_to(grad_x, x, 0, x.shape[0])
            grad_x = from_channels(grad_x, batch, (height, width))
        else:
            x = x.contiguous()
            normalised = norm.whole(x)
            grad_normalised, grad_weight = convolution_backward(
                grad_out, normalised, weight, padding=ctx.dilation, dilation=ctx.dilation
            )
            mask_(grad_normalised, normalised)
            del normalised
            grad_x, grad_norm_weight, grad_norm_bias = norm.backward(grad_normalised, x)
            del grad_normalised
        grads = (grad_norm_weight, grad_norm_bias, grad_weight.view_as(weight), grad_bias)
        wanted = ctx.needs_input_grad[1:5]
        kept = (grad if needed else None for grad, needed in zip(grads, wanted, strict=True))
        return None, *kept, *_join_backward(grad_x, inputs)
