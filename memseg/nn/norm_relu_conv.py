"""The BN-ReLU-convolution unit that keeps only what it reads.

Outside its dense blocks a ladder DenseNet is made of these: transitions (with 2x2 average pooling), skip projections,
the context, logits, and blends, which first upsample one input and join it to another. Plain autograd keeps the
joined map, the rectified map and the pooling's input; here they are rebuilt, band by band, from the unit's inputs.
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
from memseg.nn.batch_norm import BatchNorm2d, check_norm
from memseg.nn.join import join, joined_size, joined_statistics, upsample_backward
from memseg.nn.layout import as_kernel, as_pixels, channels_last, empty_map, pixels
from memseg.nn.norm_relu import Line, NormRelu
from memseg.nn.operators import (
    convolve,
    convolve_backward,
    project,
    project_backward,
    project_pooled,
    project_pooled_backward,
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

    Under autocast the unit computes in autocast's dtype, its inputs included.

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
        check_norm(self.norm)
        if is_traced() or (self.recompute is Recompute.NONE and torch.is_grad_enabled()):
            out = self.conv(F.relu(self.norm(join(*inputs)), inplace=True))
            return F.avg_pool2d(out, 2) if self.pool else cast(Tensor, out)
        return norm_relu_conv(*inputs, norm=self.norm, conv=self.conv, pool=self.pool)

    def __prepare_scriptable__(self) -> None:
        refuse_scripting(self)


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


@_disable_dynamo
def norm_relu_conv(*inputs: Tensor, norm: BatchNorm2d, conv: nn.Conv2d, pool: bool = False) -> Tensor:
    """conv(relu(norm(x))) as one autograd node that keeps only its inputs and the norm's statistics.

    Args:
        inputs: x (N, C, H, W); or a coarse and a fine map, which are joined as in `join`.
        norm: Of all C channels.
        conv: Stride 1, one group, an odd square kernel, and as much padding by zeros as keeps the size.
        pool: Whether 2x2 average pooling follows; with a 1x1 kernel and one input only.

    Returns:
        (N, O, H, W), or (N, O, H // 2, W // 2) with `pool`; channels-last.
    """
    check_norm(norm)
    check_shapes(inputs, norm.num_features)
    for x in inputs:
        check_dtypes(x, conv.weight)
    dtype = compute_dtype(inputs[0])
    with without_autocast(inputs[0].device.type):
        wanted = [x.to(dtype) for x in inputs]
        out = _UnitNode.apply(norm, conv, pool, norm.weight, norm.bias, conv.weight, conv.bias, *wanted)
    return cast(Tensor, out)


class _UnitNode(torch.autograd.Function):
    """join, BN, ReLU, convolution, pooling as one node that saves the unit's inputs and per-channel statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        module: BatchNorm2d,
        conv: nn.Conv2d,
        pool: bool,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *inputs: Tensor,
    ) -> Tensor:
        maps = [as_pixels(x) for x in inputs]
        size, fine = joined_size(maps), maps[-1]
        if module.uses_batch_statistics:
            statistics = module.follow(module.join_replicas(joined_statistics(maps)))
        else:
            statistics = module.running_statistics
        norm = NormRelu.of(module, norm_weight, norm_bias, statistics)
        kernel, offset = weight.to(fine.dtype), None if bias is None else bias.to(fine.dtype)
        ctx.pointwise = weight.shape[2] == 1 and len(inputs) == 1
        ctx.pool, ctx.dilation, ctx.has_bias = pool, conv.dilation[0], bias is not None
        if pool:
            size = (size[0] // 2, size[1] // 2)
        out = empty_map(fine, fine.shape[0], weight.shape[0], size)
        if pool:
            project_pooled(fine, norm.scale, norm.shift, kernel.flatten(1), offset, out)
        elif ctx.pointwise:
            project(pixels(fine), norm.scale, norm.shift, kernel.flatten(1), offset, pixels(out))
        else:
            convolve(maps, norm.scale, norm.shift, kernel, offset, ctx.dilation, out)
        ctx.norm = norm.without_tensors()
        ctx.save_for_backward(norm_weight, norm_bias, weight, *statistics[:2], *inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        norm_weight, norm_bias, weight, mean, var, *inputs = ctx.saved_tensors
        norm: NormRelu = ctx.norm.over(norm_weight, norm_bias, mean, var)
        maps = [as_pixels(x) for x in inputs]
        fine, kernel = maps[-1], weight.to(inputs[-1].dtype)
        grad_out = as_pixels(grad_out) if ctx.pointwise else channels_last(grad_out)
        grad_bias = pixels(grad_out).sum(0, dtype=mean.dtype) if ctx.has_bias else None
        grads = [empty_map(fine, x.shape[0], x.shape[1], joined_size(maps)) for x in maps]
        numbers = (norm.scale, norm.shift, mean)
        if ctx.pointwise:
            (grad,), x, matrix = grads, pixels(fine), kernel.flatten(1)
            if ctx.pool:
                found = project_pooled_backward(grad_out, fine, *numbers, norm.offset, matrix, grad, norm.needs_sums)
            else:
                found = project_backward(
                    pixels(grad_out), x, *numbers, norm.offset, matrix, pixels(grad), False, norm.needs_sums
                )
            grad_weight, gradients = as_kernel(found[0], weight), norm.gradients_(found[1])
            if norm.uses_batch:
                line = Line(x.shape[1], mean)
                line.add(gradients)
                line.add_to(pixels(grad), x, slice(None))
        else:
            grad_weight, sums = convolve_backward(
                grad_out, maps, *numbers, kernel, ctx.dilation, grads, norm.needs_sums
            )
            gradients = norm.gradients_(sums)
            own = slice(-fine.shape[1], None)
            norm.complete_(pixels(grads[-1]), pixels(fine), gradients, own)
            if len(maps) > 1:
                norm.complete_upsampled_(grads[0], maps[0], gradients)
                grads[0] = upsample_backward(grads[0], maps[0])
        parameters = (gradients.weight, gradients.bias, grad_weight, grad_bias)
        wanted = ctx.needs_input_grad[3:7]
        dtypes = (norm_weight.dtype, norm_bias.dtype, weight.dtype, weight.dtype)
        of_parameters = (
            grad.to(dtype) if needed and grad is not None else None
            for grad, dtype, needed in zip(parameters, dtypes, wanted, strict=True)
        )
        return None, None, None, *of_parameters, *grads
