"""What a convolution allocates on the CPU while it runs, beside its outputs.

torch has three ways. oneDNN takes float32, bfloat16 and float16: operands are copied into the layouts that its kernel
wants (`memseg.profiling.kernels.onednn`), the output is made in one and, for contiguous maps, copied back. torch's own
convolution takes the rest, float64 above all: it unfolds the whole batch and multiplies; a dilated or transposed one
unfolds an image at a time. Groups are convolved one by one and concatenated.

Which way a convolution goes is asked of torch itself. The order of copies was read off the allocator's own events,
torch 2.14.1: `python -m benchmarks.convolution_workspace`.

Source: aten/src/ATen/native/mkldnn/Conv.cpp, ConvolutionMM2d.cpp, NaiveDilatedConvolution.cpp,
NaiveConvolutionTranspose2d.cpp and Convolution.cpp of pytorch.
"""

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from memseg.profiling.kernels import onednn
from memseg.profiling.kernels.convolution_shape import Shape, round_up
from memseg.profiling.kernels.onednn import Kernel, Layout
from memseg.profiling.kernels.onednn_scratch import ALIGNMENT
from memseg.profiling.kernels.transient import Ledger, Transient

_aten = torch.ops.aten
_Backend = torch._C._ConvBackend  # type: ignore[attr-defined]
_OWN = (_Backend.Slow2d, _Backend.SlowDilated2d, _Backend.SlowTranspose2d)
"""The rest is oneDNN's: torch has no name for its transposed one."""


def cpu_convolution_workspace(func: Any, args: tuple[Any, ...]) -> list[Transient]:
    """What a convolution or its backward allocates beside its outputs; nothing for other operations.

    Args:
        func: The operator (an overload of torch.ops.aten).
        args: Its positional arguments.
    """
    packet = func.overloadpacket
    if packet is _aten.convolution:
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
        geometry = stride, padding, dilation, transposed, output_padding, groups
        backend = _backend(x, weight, bias, geometry)
        ledger = Ledger()
        if backend not in _OWN:
            _onednn_forward(
                ledger, _shape(x, weight, geometry, bias=bias is not None), x, weight, transposed=transposed
            )
        else:
            _own_forward(ledger, backend, _shape(x, weight, geometry, bias=bias is not None), x, weight)
        return ledger.transients()
    if packet is _aten.convolution_backward:
        grad, x, weight, _, stride, padding, dilation, transposed, output_padding, groups, wanted = args
        geometry = stride, padding, dilation, transposed, output_padding, groups
        backend = _backend(x, weight, None, geometry)
        ledger, shape = Ledger(), _shape(x, weight, geometry, bias=bool(wanted[2]))
        if backend not in _OWN:
            _onednn_backward(ledger, shape, grad, x, weight, wanted, transposed=transposed)
        else:
            _own_backward(ledger, backend, shape, grad, x, weight, wanted)
        return ledger.transients()
    return []


def _backend(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Any:
    """Which way torch goes on the CPU; it would not say so of meta tensors, on which bodies of operators are traced."""
    if not x.is_meta:
        return torch._C._select_conv_backend(x, weight, bias, *geometry, None)
    with unset_fake_temporarily(), FakeTensorMode():
        twins = [
            None if one is None else torch.empty_strided(one.shape, one.stride(), dtype=one.dtype)
            for one in (x, weight, bias)
        ]
        return torch._C._select_conv_backend(*twins, *geometry, None)


def _shape(x: Tensor, weight: Tensor, geometry: tuple[Any, ...], *, bias: bool) -> Shape:
    stride, padding, dilation, transposed, output_padding, groups = geometry
    stride, padding, dilation, output_padding = (
        (one[0], one[-1]) for one in (stride, padding, dilation, output_padding)
    )
    kernel, size = weight.shape[-2:], x.shape[-2:]
    if transposed:
        out_size = [
            (size[axis] - 1) * stride[axis]
            - 2 * padding[axis]
            + dilation[axis] * (kernel[axis] - 1)
            + output_padding[axis]
            + 1
            for axis in (0, 1)
        ]
    else:
        out_size = [
            (size[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
            for axis in (0, 1)
        ]
    return Shape(
        images=x.shape[0],
        groups=groups,
        in_channels=x.shape[1] // groups,
        out_channels=weight.shape[1] if transposed else weight.shape[0] // groups,
        in_size=(size[0], size[1]),
        out_size=(out_size[0], out_size[1]),
        kernel=(kernel[0], kernel[1]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        dtype=x.dtype,
        channels_last=torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight)),
        bias=bias,
    )


def _onednn_forward(ledger: Ledger, shape: Shape, x: Tensor, weight: Tensor, *, transposed: bool) -> None:
    copied = _relaid_bytes(shape, x) + _relaid_bytes(shape, weight)
    kernel = onednn.of_input(shape.turned()) if transposed else onednn.forward(shape)
    nested = ALIGNMENT if transposed and kernel.scratch_bytes else 0
    ledger.take(copied)
    if shape.channels_last:
        ledger.make()
        ledger.take(kernel.scratch_bytes + nested, kernel.weight_bytes)
        return
    out_bytes = _map_bytes(shape, kernel, _out_channels(shape), shape.out_pixels)
    reads = _copy_bytes(shape, kernel, _in_channels(shape), shape.in_pixels), kernel.weight_bytes
    ledger.take(kernel.scratch_bytes + nested, *reads, out_bytes)
    ledger.give(kernel.scratch_bytes + nested, *reads)
    _make_plain(ledger, shape, kernel, out_bytes, _plain_bytes(shape, _out_channels(shape), shape.out_pixels))


def _onednn_backward(
    ledger: Ledger, shape: Shape, grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], *, transposed: bool
) -> None:
    ledger.take(*(_relaid_bytes(shape, tensor) for tensor in (grad, x, weight)))
    in_channels, out_channels = _in_channels(shape), _out_channels(shape)
    if wanted[0]:
        kernel = onednn.forward(shape.turned()) if transposed else onednn.of_input(shape)
        if shape.channels_last:
            ledger.make()
            ledger.pass_by(kernel.weight_bytes, kernel.scratch_bytes)
        else:
            in_bytes = _map_bytes(shape, kernel, in_channels, shape.in_pixels)
            reads = _copy_bytes(shape, kernel, out_channels, shape.out_pixels), kernel.weight_bytes
            ledger.take(*reads, in_bytes)
            ledger.pass_by(kernel.scratch_bytes)
            ledger.give(*reads)
            _make_plain(ledger, shape, kernel, in_bytes, _plain_bytes(shape, in_channels, shape.in_pixels))
    if not (wanted[1] or wanted[2]):
        return
    kernel = onednn.of_weight(shape.turned() if transposed else shape)
    bias_bytes = out_channels * shape.itemsize if wanted[2] else 0
    copies = [0]
    if not shape.channels_last:
        if not shape.is_first:
            copies.append(_copy_bytes(shape, kernel, in_channels, shape.in_pixels))
        copies.append(_copy_bytes(shape, kernel, out_channels, shape.out_pixels))
    ledger.take(*copies, kernel.weight_bytes)
    ledger.take(kernel.scratch_bytes, bias_bytes)
    ledger.give(kernel.scratch_bytes, *copies)
    # The gradients leave oneDNN's layout for torch's; that of a weight over channels-last maps becomes so in a copy.
    ledger.take(bias_bytes)
    if shape.channels_last:
        ledger.take(weight.nbytes)
    ledger.make()
    ledger.give(bias_bytes)
    ledger.make()


def _make_plain(ledger: Ledger, shape: Shape, kernel: Kernel, taken_bytes: int, made_bytes: int) -> None:
    """Copy a kernel's result, that is taken, to the contiguous output."""
    if kernel.layout is Layout.LAST:
        # It leaves oneDNN's tensor as it lies, and is made contiguous after that.
        ledger.take(made_bytes)
    ledger.make()
    ledger.give(taken_bytes)
    if kernel.layout is Layout.LAST:
        ledger.give(made_bytes)


def _in_channels(shape: Shape) -> int:
    return shape.groups * shape.in_channels


def _out_channels(shape: Shape) -> int:
    return shape.groups * shape.out_channels


def _relaid_bytes(shape: Shape, tensor: Tensor) -> int:
    """Of the copy that torch makes of an operand which does not lie as the convolution wants all of them."""
    layout = torch.channels_last if shape.channels_last else torch.contiguous_format
    if tensor.is_contiguous(memory_format=layout):
        return 0
    return tensor.numel() * tensor.element_size()


def _plain_bytes(shape: Shape, channels: int, pixels: int) -> int:
    return shape.images * channels * pixels * shape.itemsize


def _map_bytes(shape: Shape, kernel: Kernel, channels: int, pixels: int) -> int:
    """Of a map in a kernel's layout."""
    if kernel.layout is Layout.BLOCKED:
        channels = round_up(channels, kernel.block)
    return _plain_bytes(shape, channels, pixels)


def _copy_bytes(shape: Shape, kernel: Kernel, channels: int, pixels: int) -> int:
    """Of a contiguous map's copy in a kernel's layout; none of what is read as it lies."""
    if kernel.layout is Layout.PLAIN or (channels <= 3 and kernel.layout is Layout.BLOCKED):
        return 0
    return _map_bytes(shape, kernel, channels, pixels)


def _own_forward(ledger: Ledger, backend: Any, shape: Shape, x: Tensor, weight: Tensor) -> None:
    one_group = _columns_bytes(backend, shape, shape.images)
    made = _plain_bytes(shape, _out_channels(shape), shape.out_pixels)
    ledger.take(_relaid_bytes(shape, x), _relaid_bytes(shape, weight))
    if shape.groups > 1:
        part = _plain_bytes(shape, shape.in_channels, shape.in_pixels)
        ledger.take(made - made // shape.groups)
        ledger.pass_by(one_group, part, made // shape.groups)
        ledger.take(made // shape.groups)
        ledger.make()
        return
    if backend == _Backend.Slow2d:
        ledger.take(one_group)
        ledger.make()
    else:
        ledger.make()
        ledger.pass_by(one_group)


def _own_backward(
    ledger: Ledger, backend: Any, shape: Shape, grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]
) -> None:
    columns = _columns_bytes(backend, shape, shape.images, backward=True)
    ledger.take(*(_relaid_bytes(shape, tensor) for tensor in (grad, x, weight)))
    if shape.groups > 1:
        parts = [x.nbytes * wanted[0], weight.nbytes * wanted[1]]
        reads = [_plain_bytes(shape, shape.in_channels, shape.in_pixels)]
        reads.append(_plain_bytes(shape, shape.out_channels, shape.out_pixels))
        ledger.take(*parts)
        ledger.pass_by(columns, *reads)
        for _ in range(sum(wanted)):
            ledger.make()
        return
    if backend != _Backend.Slow2d and wanted[0]:
        ledger.make()
        ledger.pass_by(columns)
    elif wanted[0]:
        ledger.make()
    for _ in range(sum(wanted[1:])):
        ledger.make()
    # The whole batch is unfolded for the gradient of the weight alone.
    if wanted[1] or backend != _Backend.Slow2d:
        ledger.take(columns)


def _columns_bytes(backend: Any, shape: Shape, images: int, *, backward: bool = False) -> int:
    """Of the maps of one group unfolded: of all images, or of one."""
    if backend == _Backend.Slow2d:
        if shape.kernel == (1, 1) and not shape.is_strided and shape.padding == (0, 0):
            return 0
        return images * shape.in_channels * shape.taps * shape.out_pixels * shape.itemsize
    if backend == _Backend.SlowDilated2d:
        return shape.in_channels * shape.taps * shape.out_pixels * shape.itemsize
    if backend == _Backend.SlowTranspose2d:
        unfolded = shape.out_channels * shape.taps * shape.in_pixels * shape.itemsize
        return unfolded if backward else images * unfolded
    return 0
