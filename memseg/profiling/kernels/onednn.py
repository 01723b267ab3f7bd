"""Which oneDNN kernel a convolution on the CPU runs, and in which layouts: what has to be copied for it.

oneDNN has a list of kernels for each direction and type, and takes the first that accepts the shape. Each one wants
maps in a layout of its own: as they lie, channels-last, or in blocks of 16 channels, padded. It wants the weight in
blocks of both channels, padded as well. And each one books a scratchpad.

Only what decides about memory is modelled, for x86 with AVX-512 and without AMX, where it was compared with the
allocator's events and with oneDNN's own log: `python -m benchmarks.convolution_workspace`. On other machines blocks
are taken to be 8 channels wide, and kernels to be the same, which nobody has measured.

Left out: that brgemm kernels sometimes pad a weight to blocks of 48 or 64 channels instead of 16 (up to 6 % of that
weight), the padded bias (one value for each channel), and the scratchpad of the matrix product that runs a forward
convolution whose dilation exceeds the map.

Source: oneDNN 3.12, src/cpu/cpu_convolution_list.cpp and the init_conf of the kernels named below; ONEDNN_VERBOSE.
"""

from enum import Enum
from typing import NamedTuple

import torch

from memseg.profiling.kernels import onednn_scratch as scratch
from memseg.profiling.kernels.convolution_shape import Shape, round_up, simd_width

_PASS, _LONG_PASS, _HALF_PASS = 28, 8, 14
"""Pixels of a row that registers hold: of float32, with the code for both ends of a long row, of bfloat16."""
_KERNEL, _HALF_KERNEL = 14, 24
"""Columns of the widest kernel for which there is code."""


class Layout(Enum):
    """How a kernel wants its maps."""

    PLAIN = "nchw"
    BLOCKED = "nChw16c"
    LAST = "nhwc"


class Kernel(NamedTuple):
    """What one direction of a convolution needs beside its operands."""

    layout: Layout
    """Of both maps."""
    weight_bytes: int
    """Of the weight in the kernel's own layout; 0 where it is read as it lies."""
    scratch_bytes: int
    block: int = 16
    """Channels in a block of a blocked map."""
    product: bool = False
    """Whether it is gemm: matrix products over unfolded maps."""


def forward(shape: Shape) -> Kernel:
    """The kernel that makes the output."""
    if shape.is_depthwise:
        # jit_dw, and brgemm's brdgmm_dw for channels-last maps.
        return Kernel(_preferred(shape), _depthwise_weight_bytes(shape), 0)
    if shape.channels_last or shape.dtype == torch.float16:
        return _brgemm(shape, shape.in_channels, shape.out_channels)
    if shape.is_pointwise and not shape.is_first:
        return Kernel(Layout.BLOCKED, _blocked_weight_bytes(shape), scratch.pointwise_forward(shape))
    if not _is_direct(shape, long_row=28):
        return Kernel(Layout.PLAIN, 0, 0, product=True)
    return Kernel(Layout.BLOCKED, _blocked_weight_bytes(shape), 0, _map_block(shape))


def of_input(shape: Shape) -> Kernel:
    """The kernel that makes the gradient of the input."""
    brgemm_fits = not shape.is_depthwise or shape.is_half
    if shape.is_strided and brgemm_fits and not _has_small_groups(shape):
        # brgconv_strided: a map of gradients is laid out anew, with its padding, for each thread.
        weight_bytes = shape.padded_weight_bytes(simd_width(), _rows(shape))
        return Kernel(Layout.LAST, weight_bytes, scratch.strided_gradient(shape))
    if shape.is_depthwise and shape.dtype != torch.float16:
        if not shape.is_dilated:
            return Kernel(_preferred(shape), _depthwise_weight_bytes(shape), 0)
        if shape.channels_last:
            return Kernel(Layout.LAST, shape.padded_weight_bytes(simd_width(), simd_width()), 0)
        return Kernel(Layout.PLAIN, 0, scratch.product_of_input(shape), product=True)
    if shape.channels_last or shape.dtype == torch.float16:
        kernel = _brgemm(shape, shape.out_channels, shape.in_channels)
        return kernel._replace(scratch_bytes=kernel.scratch_bytes and kernel.scratch_bytes + scratch.ALIGNMENT)
    if shape.is_pointwise:
        return Kernel(Layout.BLOCKED, _blocked_weight_bytes(shape), scratch.pointwise_of_input(shape))
    if not _is_direct(shape, long_row=80):
        return Kernel(Layout.PLAIN, 0, scratch.product_of_input(shape), product=True)
    return Kernel(Layout.BLOCKED, _blocked_weight_bytes(shape), 0, _map_block(shape))


def of_weight(shape: Shape) -> Kernel:
    """The kernel that makes the gradients of weight and bias."""
    if shape.dtype == torch.float16:
        # No kernel but the reference takes float16; it reads everything as it lies.
        return Kernel(_as_it_lies(shape), shape.weight_bytes, 0)
    if shape.is_depthwise and max(shape.kernel) <= 3 and not shape.is_dilated:
        return Kernel(_preferred(shape), _depthwise_weight_bytes(shape), scratch.depthwise_of_weight(shape))
    if not _is_direct_of_weight(shape):
        size_bytes = scratch.product_of_weight(shape)
        return Kernel(_as_it_lies(shape), shape.weight_bytes, size_bytes, product=True)
    layout = _preferred(shape)
    if shape.groups > 1 and shape.channels_last:
        weight_bytes = shape.padded_weight_bytes(simd_width(), simd_width())
    else:
        weight_bytes = _blocked_weight_bytes(shape)
    if shape.is_pointwise and not shape.is_first:
        return Kernel(layout, weight_bytes, scratch.pointwise_of_weight(shape))
    return Kernel(layout, weight_bytes, scratch.direct_of_weight(shape), _map_block(shape))


def _brgemm(shape: Shape, read_channels: int, made_channels: int) -> Kernel:
    """Batches of small matrix products over channels-last maps (brgconv); jit where groups are too small for them."""
    if _has_small_groups(shape):
        return Kernel(Layout.LAST, shape.weight_bytes, 0)
    made, read = round_up(made_channels, simd_width()), round_up(read_channels, _rows(shape))
    weight_bytes = shape.groups * made * read * shape.taps * shape.itemsize
    return Kernel(Layout.LAST, weight_bytes, scratch.batches(shape.taps))


def _rows(shape: Shape) -> int:
    """Values of a weight that lie together: bfloat16 is multiplied in pairs."""
    return 2 if shape.dtype == torch.bfloat16 else 1


def _is_direct(shape: Shape, *, long_row: int) -> bool:
    """Whether a direct (jit) kernel takes contiguous maps, forward or back; else they are unfolded and multiplied.

    One pass over a row must cover its padding: all of a short row, else as many pixels as there are registers, and
    fewer where the code for both ends of a row longer than `long_row` would not fit.
    """
    width = simd_width()
    if shape.groups > 1:
        return any(shape.in_channels % b == shape.out_channels % b == 0 for b in (width, width // 2, width // 4))
    padding, row = max(shape.padding[1], shape.end_padding[1]), shape.out_size[1]
    if shape.is_half:
        return padding <= _HALF_PASS
    return padding <= (min(row, _PASS) if row <= long_row else _LONG_PASS)


def _is_direct_of_weight(shape: Shape) -> bool:
    """Whether a direct kernel makes the gradient of a weight."""
    width = simd_width()
    fits = shape.kernel[1] <= (_HALF_KERNEL if shape.is_half else _KERNEL)
    fits = fits and max(shape.padding[1], shape.end_padding[1]) <= _PASS
    fits = fits and not (shape.is_dilated and (shape.is_strided or shape.extent[0] > shape.in_size[0]))
    fits = fits and max(shape.padding[0], shape.end_padding[0]) <= shape.extent[0] // 2
    if shape.channels_last:
        return fits
    if shape.is_first and shape.is_half:
        return fits and shape.out_channels % width == 0
    blocks = (width,) if shape.is_half else (width, width // 2)
    return fits and (shape.groups == 1 or any(shape.in_channels % b == shape.out_channels % b == 0 for b in blocks))


def _has_small_groups(shape: Shape) -> bool:
    """Whether groups fill no more than one vector, for which there are direct kernels."""
    if shape.groups == 1 or shape.is_depthwise:
        return False
    return max(shape.in_channels, shape.out_channels) <= simd_width()


def _map_block(shape: Shape) -> int:
    width = simd_width()
    if shape.groups == 1 or shape.in_channels % width == shape.out_channels % width == 0:
        return width
    return next((b for b in (width // 2, width // 4) if shape.in_channels % b == shape.out_channels % b == 0), width)


def _preferred(shape: Shape) -> Layout:
    return Layout.LAST if shape.channels_last else Layout.BLOCKED


def _as_it_lies(shape: Shape) -> Layout:
    return Layout.LAST if shape.channels_last else Layout.PLAIN


def _depthwise_weight_bytes(shape: Shape) -> int:
    return round_up(shape.groups, simd_width()) * shape.taps * shape.itemsize


def _blocked_weight_bytes(shape: Shape) -> int:
    width = simd_width()
    if shape.is_first:
        return shape.padded_weight_bytes(1, width)
    if shape.groups > 1:
        return shape.weight_bytes
    return shape.padded_weight_bytes(width, width)
