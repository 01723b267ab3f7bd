"""Memory that a convolution takes while it runs: not a tensor of ours, but allocated all the same.

CPU, channels-last maps. oneDNN reads and writes them as they lie. It copies the weight into a layout in which channels
lie in blocks of the vector width (16 floats under AVX-512, else 8), after torch has copied it to channels-last, and
takes a few KiB for each thread. The gradient of a bfloat16 weight also takes a transposed copy of one image's maps.

CPU, contiguous (N, C, H, W) maps. Every operand is copied into the blocked layout, the result taken in it and copied
back.

Both were read off the allocator's own events, torch 2.14.1, for 3x3, 1x1, 7x7, strided and dilated convolutions:
`python -m benchmarks.convolution_workspace`. float64 convolutions unfold their input instead and are not predicted.

CUDA. cuDNN runs float32 3x3 stride-1 convolutions as non-fused Winograd F(4x4, 3x3), which transforms 4x4 tiles into
6x6: 36 / 16 = 2.25 values for each one of input and output, and 36 / 9 = 4 for each one of the weight. A hypothesis:
it brings predictions closer to published peaks of V100 cards, but has not been measured by us on a GPU.

Source: oneDNN developer guide, "Understanding memory formats"; Lavin and Gray, arXiv:1509.09308, for F(4x4, 3x3).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memseg.nn.autograd import HALF_DTYPES

_aten = torch.ops.aten


class Transient(NamedTuple):
    """Bytes that live only for a moment of an operation, when some of its outputs exist already."""

    outputs_made: int
    size_bytes: int


@dataclass(frozen=True)
class ConvolutionShape:
    """One convolution over channels-last maps, as far as its workspace depends on it."""

    in_channels: int
    """Of a group."""
    out_channels: int
    kernel_size: int
    dtype: torch.dtype
    in_pixels: int
    """Of all images."""
    out_pixels: int
    images: int
    strided: bool = False

    def forward_bytes(self, device: str) -> int:
        """Beside the output."""
        if device != "cpu":
            return self._winograd_bytes()
        return 0 if self.is_product else _per_thread_bytes() + self._weight_bytes(_blocked(self.out_channels))

    def of_input_bytes(self, device: str) -> int:
        """Of the gradient of the input, beside it."""
        if device != "cpu":
            return self._winograd_bytes()
        if self.is_product:
            return 0
        width = _blocked(self.in_channels)
        return _per_thread_bytes() + self._weight_bytes(self.out_channels) // self.in_channels * width

    def of_weight_bytes(self, device: str) -> tuple[int, int]:
        """Of the gradient of the weight: before it is there, and beside it."""
        if device != "cpu":
            return 0, self._winograd_bytes()
        if self.is_product:
            return 0, 0
        width = self.in_channels if self.in_channels <= 3 else _blocked(self.in_channels)
        blocked = self._weight_bytes(_blocked(self.out_channels)) // self.in_channels * width
        # Threads share out the gradient of a weight and add their parts: one more copy of it.
        parts = blocked if torch.get_num_threads() > 1 else 0
        if self.dtype in HALF_DTYPES:
            maps = self.in_pixels * self.in_channels + self.out_pixels * self.out_channels
            parts = 2 * blocked + maps * self.dtype.itemsize // self.images
        return blocked + parts, blocked + self._weight_bytes(self.out_channels)

    @property
    def is_product(self) -> bool:
        """Whether torch multiplies matrices instead: in float64, and for 1x1 kernels on a single thread."""
        alone = self.kernel_size == 1 and not self.strided and torch.get_num_threads() == 1 and self.images < 16
        return self.dtype == torch.float64 or (alone and self.dtype == torch.float32)

    def _weight_bytes(self, out_channels: int) -> int:
        return out_channels * self.in_channels * self.kernel_size**2 * self.dtype.itemsize

    def _winograd_bytes(self) -> int:
        if self.kernel_size != 3 or self.strided or self.dtype != torch.float32:
            return 0
        maps = self.in_pixels * self.in_channels + self.out_pixels * self.out_channels
        return int((2.25 * maps + 4 * self.in_channels * self.out_channels * 9) * self.dtype.itemsize)


def convolution_workspace(func: Any, args: tuple[Any, ...], device: str) -> list[Transient]:
    """What a convolution or its backward allocates beside its outputs, in order; nothing for other operations.

    Args:
        func: The operator (an overload of torch.ops.aten).
        args: Its positional arguments.
        device: "cpu" or "cuda", where the operation would run.
    """
    packet = func.overloadpacket
    if packet is _aten.convolution:
        x, weight, stride = args[0], args[1], args[3]
        shape = _shape(x, weight, stride, _out_pixels(args))
        if device != "cpu" or _is_channels_last(x):
            copied = _copied_weight_bytes(weight, shape, device)
            return _nonzero(Transient(1, copied + shape.forward_bytes(device)))
        return [] if shape.is_product or x.dtype != torch.float32 else _forward_cpu(x, weight, args)
    if packet is _aten.convolution_backward:
        grad, x, weight, stride = args[0], args[1], args[2], args[4]
        shape = _shape(x, weight, stride, grad.numel() // grad.shape[1])
        wants_input, wants_weight, _ = args[10]
        if device != "cpu" or _is_channels_last(x):
            copied = _copied_weight_bytes(weight, shape, device)
            of_input = Transient(1, copied + shape.of_input_bytes(device) if wants_input else 0)
            of_weight = shape.of_weight_bytes(device) if wants_weight else (0, 0)
            before, beside = (copied + size if size else 0 for size in of_weight)
            made = int(wants_input)
            return _nonzero(of_input, Transient(made, before), Transient(made + 1, beside))
        if shape.is_product or x.dtype != torch.float32:
            return []
        return _backward_cpu(grad, x, weight, wants_input=wants_input)
    return []


def _nonzero(*transients: Transient) -> list[Transient]:
    return [transient for transient in transients if transient.size_bytes]


def _shape(x: Tensor, weight: Tensor, stride: list[int], out_pixels: int) -> ConvolutionShape:
    out_channels, in_channels, kernel_size = weight.shape[:3]
    return ConvolutionShape(
        in_channels,
        out_channels,
        kernel_size,
        x.dtype,
        x.numel() // x.shape[1],
        out_pixels,
        x.shape[0],
        strided=tuple(stride) != (1, 1),
    )


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _copied_weight_bytes(weight: Tensor, shape: ConvolutionShape, device: str) -> int:
    """Of the channels-last copy that torch makes of a contiguous weight."""
    needless = device != "cpu" or shape.is_product or weight.is_contiguous(memory_format=torch.channels_last)
    return 0 if needless else weight.nbytes


def _forward_cpu(x: Tensor, weight: Tensor, args: tuple[Any, ...]) -> list[Transient]:
    out = _blocked(weight.shape[0]) * _out_pixels(args) * 4
    return [Transient(0, _blocked_bytes(x) + blocked_weight_bytes(weight) + out), Transient(1, out)]


def _backward_cpu(grad: Tensor, x: Tensor, weight: Tensor, *, wants_input: bool) -> list[Transient]:
    grad_bytes, x_bytes, weight_bytes = _blocked_bytes(grad), _blocked_bytes(x), blocked_weight_bytes(weight)
    transients = []
    if wants_input:
        transients += [Transient(0, grad_bytes + weight_bytes + x_bytes), Transient(1, x_bytes)]
    made = len(transients) // 2
    # Threads share out the gradient of a weight and add their parts: one more copy of it.
    first = Transient(made, grad_bytes + x_bytes + 2 * weight_bytes)
    return [*transients, first, Transient(made + 1, weight_bytes)]


def _out_pixels(args: tuple[Any, ...]) -> int:
    """Of a convolution's output, all images together."""
    x, weight, _, stride, padding, dilation = args[:6]
    height, width = (
        (x.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (weight.shape[2 + axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    )
    return int(x.shape[0] * height * width)


def _per_thread_bytes() -> int:
    """oneDNN's scratchpad of a channels-last convolution: a page, and a page with a little more for each thread."""
    return 4096 + 4120 * torch.get_num_threads()


def _blocked(channels: int) -> int:
    block = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    return -(-channels // block) * block


def _blocked_bytes(x: Tensor) -> int:
    """A map's copy in oneDNN's layout; images of up to 3 channels are read as they lie."""
    channels = int(x.shape[1])
    return 0 if channels <= 3 else x.numel() // channels * _blocked(channels) * x.element_size()


def blocked_weight_bytes(weight: Tensor) -> int:
    """A weight's copy in oneDNN's layout."""
    out_channels, in_channels = int(weight.shape[0]), int(weight.shape[1])
    width = in_channels if in_channels <= 3 else _blocked(in_channels)
    return weight.numel() // (out_channels * in_channels) * _blocked(out_channels) * width * weight.element_size()
