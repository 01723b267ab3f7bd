"""What kernels on CUDA take while they run.

Convolutions. cuDNN runs float32 3x3 convolutions of stride 1 and dilation 1 as non-fused Winograd F(4x4, 3x3): maps are
cut into tiles of 4x4 outputs, each transformed into 6x6 = 36 values in every channel, and transformed input, output and
weights exist together. All others are counted as nothing: implicit products, whose tables take KiB, and torch's own
kernels for depthwise ones. A hypothesis, which explains published peaks of V100 cards (`python -m benchmarks.prediction
--published`) where a head's 3x3 convolution decides the peak; for Ampere and later, where TF32 kernels may copy into
other layouts, there is no evidence. Not measured by us on a GPU.

Softmax. Its backward first multiplies gradient and result into a tensor of its own.

Source: Lavin and Gray, arXiv:1509.09308, for F(4x4, 3x3); cuDNN 7.3 release notes for dilated ones;
aten/src/ATen/native/cuda/SoftMax.cu (softmax_backward_cuda_out), pytorch/pytorch issue 72450.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memseg.profiling.kernels.transient import Transient

_aten = torch.ops.aten


def cuda_workspace(func: Any, args: tuple[Any, ...]) -> list[Transient]:
    """What a convolution or its backward allocates beside its outputs, in order; nothing for other operations.

    Args:
        func: The operator (an overload of torch.ops.aten).
        args: Its positional arguments.
    """
    packet = func.overloadpacket
    if packet is _aten.convolution:
        x, weight, _, stride, padding, dilation, transposed = args[:7]
        sides = [
            (x.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (weight.shape[2 + axis] - 1) - 1) // stride[axis]
            + 1
            for axis in range(x.dim() - 2)
        ]
        return _beside(1, _winograd_bytes(x, weight, stride, dilation, sides, transposed=transposed))
    if packet is _aten.convolution_backward:
        grad, x, weight, _, stride, _, dilation, transposed = args[:8]
        size_bytes = _winograd_bytes(x, weight, stride, dilation, grad.shape[2:], transposed=transposed)
        wants_input, wants_weight, _ = args[10]
        of_input = _beside(1, size_bytes) if wants_input else []
        return of_input + (_beside(1 + wants_input, size_bytes) if wants_weight else [])
    if packet is _aten._softmax_backward_data:
        return _beside(0, args[0].nbytes)
    return []


def _beside(outputs_made: int, size_bytes: int) -> list[Transient]:
    return [Transient(outputs_made, size_bytes)] if size_bytes else []


def _winograd_bytes(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    sides: Sequence[int],
    *,
    transposed: bool,
) -> int:
    out_channels, in_channels, *kernel = weight.shape
    fits = kernel == [3, 3] and tuple(stride) == tuple(dilation) == (1, 1) and in_channels == x.shape[1]
    if not fits or transposed or x.dtype != torch.float32:
        return 0
    tiles = x.shape[0] * math.prod(math.ceil(side / 4) for side in sides)
    return 36 * (tiles * (in_channels + out_channels) + in_channels * out_channels) * x.element_size()
