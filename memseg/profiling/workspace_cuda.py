"""What cuDNN takes while a convolution runs.

It runs float32 3x3 stride-1 convolutions as non-fused Winograd F(4x4, 3x3), which transforms 4x4 tiles into 6x6:
36 / 16 = 2.25 values for each one of input and output, and 36 / 9 = 4 for each one of the weight. A hypothesis: it
brings predictions closer to published peaks of V100 cards, but has not been measured by us on a GPU.

Source: Lavin and Gray, arXiv:1509.09308, for F(4x4, 3x3).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memseg.profiling.transient import Transient

_aten = torch.ops.aten


def cuda_workspace(func: Any, args: tuple[Any, ...]) -> list[Transient]:
    """What a convolution or its backward allocates beside its outputs, in order; nothing for other operations.

    Args:
        func: The operator (an overload of torch.ops.aten).
        args: Its positional arguments.
    """
    packet = func.overloadpacket
    if packet is _aten.convolution:
        x, weight, stride = args[0], args[1], args[3]
        return _beside(1, _winograd_bytes(x, weight, stride, _out_pixels(args)))
    if packet is _aten.convolution_backward:
        grad, x, weight, stride = args[0], args[1], args[2], args[4]
        size_bytes = _winograd_bytes(x, weight, stride, grad.numel() // grad.shape[1])
        wants_input, wants_weight, _ = args[10]
        of_input = _beside(1, size_bytes) if wants_input else []
        return of_input + (_beside(1 + wants_input, size_bytes) if wants_weight else [])
    return []


def _beside(outputs_made: int, size_bytes: int) -> list[Transient]:
    return [Transient(outputs_made, size_bytes)] if size_bytes else []


def _winograd_bytes(x: Tensor, weight: Tensor, stride: Sequence[int], out_pixels: int) -> int:
    if weight.shape[2] != 3 or tuple(stride) != (1, 1) or x.dtype != torch.float32:
        return 0
    out_channels, in_channels = weight.shape[:2]
    in_pixels = x.numel() // x.shape[1]
    maps = in_pixels * in_channels + out_pixels * out_channels
    return int((2.25 * maps + 4 * in_channels * out_channels * 9) * x.element_size())


def _out_pixels(args: tuple[Any, ...]) -> int:
    """Of a convolution's output, all images together."""
    x, weight, _, stride, padding, dilation = args[:6]
    height, width = (
        (x.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (weight.shape[2 + axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    )
    return int(x.shape[0] * height * width)
