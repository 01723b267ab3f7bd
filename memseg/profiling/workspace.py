"""Memory that a convolution takes while it runs: not a tensor of ours, but allocated all the same.

CPU. oneDNN computes on layouts in which channels lie in blocks of the vector width (16 floats under AVX-512, else 8).
It copies every operand into that layout, takes the result in it, and copies the result back. The copies come from
torch's allocator. Read off the allocator's own events, torch 2.14.1, for 3x3, 1x1, 7x7, strided and dilated
convolutions: `python -m benchmarks.convolution_workspace`. float32 only; float64 convolutions unfold their input
instead and are not predicted.

CUDA. cuDNN runs float32 3x3 stride-1 convolutions as non-fused Winograd F(4x4, 3x3), which transforms 4x4 tiles into
6x6: 36 / 16 = 2.25 values for each one of input and output, and 36 / 9 = 4 for each one of the weight. A hypothesis:
it brings predictions closer to published peaks of V100 cards, but has not been measured by us on a GPU.

Source: oneDNN developer guide, "Understanding memory formats"; Lavin and Gray, arXiv:1509.09308, for F(4x4, 3x3).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten


class Transient(NamedTuple):
    """Bytes that live only for a moment of an operation, when some of its outputs exist already."""

    outputs_made: int
    size_bytes: int


def convolution_workspace(func: Any, args: tuple[Any, ...], device: str) -> list[Transient]:
    """What a convolution or its backward allocates beside its outputs, in order; nothing for other operations.

    Args:
        func: The operator (an overload of torch.ops.aten).
        args: Its positional arguments.
        device: "cpu" or "cuda", where the operation would run.
    """
    packet = func.overloadpacket
    if packet is _aten.convolution:
        x, weight = args[0], args[1]
        if not _is_float32(x):
            return []
        return _forward_cpu(x, weight, args) if device == "cpu" else _winograd(x, weight, args[3], _out_size(args))
    if packet is _aten.convolution_backward:
        grad, x, weight = args[0], args[1], args[2]
        if not _is_float32(x):
            return []
        if device == "cpu":
            return _backward_cpu(grad, x, weight, wants_input=args[10][0])
        return _winograd(x, weight, args[4], grad.numel())
    return []


def _is_float32(x: Tensor) -> bool:
    return x.dtype == torch.float32


def _forward_cpu(x: Tensor, weight: Tensor, args: tuple[Any, ...]) -> list[Transient]:
    out = _blocked(weight.shape[0]) * _out_size(args) // weight.shape[0] * 4
    return [Transient(0, _blocked_bytes(x) + _blocked_weight_bytes(weight) + out), Transient(1, out)]


def _backward_cpu(grad: Tensor, x: Tensor, weight: Tensor, *, wants_input: bool) -> list[Transient]:
    grad_bytes, x_bytes, weight_bytes = _blocked_bytes(grad), _blocked_bytes(x), _blocked_weight_bytes(weight)
    transients = []
    if wants_input:
        transients += [Transient(0, grad_bytes + weight_bytes + x_bytes), Transient(1, x_bytes)]
    made = len(transients) // 2
    # Threads share out the gradient of a weight and add their parts: one more copy of it.
    return [*transients, Transient(made, grad_bytes + x_bytes + 2 * weight_bytes), Transient(made + 1, weight_bytes)]


def _winograd(x: Tensor, weight: Tensor, stride: list[int], out_size: int) -> list[Transient]:
    if tuple(weight.shape[2:]) != (3, 3) or tuple(stride) != (1, 1):
        return []
    return [Transient(0, int((2.25 * (x.numel() + out_size) + 4 * weight.numel()) * x.element_size()))]


def _out_size(args: tuple[Any, ...]) -> int:
    """Elements of a convolution's output."""
    x, weight, _, stride, padding, dilation = args[:6]
    height, width = (
        (x.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (weight.shape[2 + axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    )
    return int(x.shape[0] * weight.shape[0] * height * width)


def _blocked(channels: int) -> int:
    block = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    return -(-channels // block) * block


def _blocked_bytes(x: Tensor) -> int:
    """A map's copy in oneDNN's layout; images of up to 3 channels are read as they lie."""
    channels = int(x.shape[1])
    return 0 if channels <= 3 else x.numel() // channels * _blocked(channels) * x.element_size()


def _blocked_weight_bytes(weight: Tensor) -> int:
    out_channels, in_channels = int(weight.shape[0]), int(weight.shape[1])
    width = in_channels if in_channels <= 3 else _blocked(in_channels)
    return weight.numel() // (out_channels * in_channels) * _blocked(out_channels) * width * weight.element_size()
