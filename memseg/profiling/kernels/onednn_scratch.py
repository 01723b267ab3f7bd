"""Scratchpads that oneDNN's convolution kernels book: what torch allocates for them beside maps and weights.

Each function is a kernel's `init_scratchpad` as arithmetic. A booking takes its size and, to be aligned, 128 bytes or
its own alignment more; pages where threads meet.

Threads share out a gradient of a weight over images and rows, and then each keeps a copy of it, or over channels, and
then none does: whichever moves the least memory by oneDNN's own estimate.

Source: oneDNN 3.12, src/cpu/x64/jit_brgemm_conv_utils.cpp, jit_brgemm_conv_bwd_utils.cpp,
jit_avx512_common_1x1_conv_kernel.cpp, jit_avx512_common_conv_kernel.cpp, jit_avx512_core_bf16_1x1_conv_kernel.cpp,
jit_avx512_core_bf16_conv_kernel.cpp, jit_uni_dw_conv_kernel_utils.cpp; src/cpu/gemm_convolution_utils.cpp.
"""

from collections.abc import Callable

import torch

from memseg.profiling.kernels.convolution_shape import Shape

ALIGNMENT = 128
"""Bytes that a booking takes beside its size."""
_PAGE = 4096
_BATCH_ELEMENT = 40
"""Bytes of one matrix product in a batch of brgemm."""
_BARRIER = 2 * _PAGE
"""A booked page where threads wait for each other."""
_VECTOR = 16
_UNROLLED_ROWS = 9
"""Fewer rows than these are not shared out among threads."""


def batches(taps: int) -> int:
    """brgconv: the list of matrix products of each thread, one for each pixel of the kernel."""
    pages = -(-taps * _BATCH_ELEMENT // _PAGE) * _PAGE
    return _threads() * -(-pages // _BATCH_ELEMENT) * _BATCH_ELEMENT + _PAGE


def strided_gradient(shape: Shape) -> int:
    """brgconv_strided: one image of gradients for each thread, with what kernels reach beyond it."""
    over = [
        max(0, shape.extent[axis] - 1 - padding[axis]) // shape.stride[axis]
        for padding in (shape.padding, shape.end_padding)
        for axis in (0, 1)
    ]
    height, width = shape.out_size[0] + over[0] + over[2], shape.out_size[1] + over[1] + over[3]
    channels = shape.groups * shape.out_channels
    image = _pages(height * width * channels) * shape.itemsize
    return batches(shape.taps) + _threads() * image + _PAGE + _threads() * _PAGE + _PAGE


def pointwise_forward(shape: Shape) -> int:
    """jit_1x1: inputs of a strided one without the pixels that it skips; float32 sums of a bfloat16 one."""
    channels = _blocked(shape.in_channels)
    skipped = _booked(_threads() * shape.out_pixels * channels * shape.itemsize) if shape.is_strided else 0
    return skipped + _sums(shape, shape.out_channels)


def pointwise_of_input(shape: Shape) -> int:
    """jit_1x1: float32 sums of a bfloat16 one."""
    return _sums(shape, shape.in_channels)


def _sums(shape: Shape, channels: int) -> int:
    if not shape.is_half:
        return 0
    return _booked(_threads() * shape.out_pixels * _blocked(_up(channels, _channel_parts(shape, channels))) * 4)


def _channel_parts(shape: Shape, channels: int) -> int:
    """Where there are fewer images than threads, these may share out channels too, if they read less that way."""
    threads = _threads()
    if shape.images >= threads or shape.channels_last:
        return 1

    def read(parts: int) -> float:
        return (1 if parts == threads else 1.3) * (shape.images * shape.out_pixels * parts / threads + channels / parts)

    return min((parts for parts in range(1, threads + 1) if threads % parts == 0), key=read)


def pointwise_of_weight(shape: Shape) -> int:
    """jit_1x1: inputs without skipped pixels, a gradient for each thread, and for bfloat16 transposed maps."""
    in_blocks, out_blocks = _blocked(shape.in_channels) // _VECTOR, _blocked(shape.out_channels) // _VECTOR
    shares = _share_pointwise(shape, in_blocks, out_blocks)
    total = 0
    in_blocking = _best_divider(in_blocks, 5, in_blocks)
    if shape.is_strided:
        channels = shape.in_channels if shape.channels_last else in_blocking * _VECTOR
        total += _booked(_threads() * shape.out_pixels * channels * shape.itemsize)
    sums = in_blocks * out_blocks * _VECTOR**2 + (out_blocks * _VECTOR if shape.bias and shape.is_half else 0)
    total += _booked(sums * (shares.images if shape.is_half else shares.images - 1) * 4)
    if shares.images > 1:
        total += _BARRIER
    if shape.is_half and not (not shape.channels_last and min(shape.out_size) > 14):
        row = (shape.out_pixels + 1) // 2 * 2 * _VECTOR * shape.itemsize
        total += _booked(shares.threads * row * _best_divider(out_blocks, 16, out_blocks))
        total += _booked(shares.threads * row * in_blocking)
    return total


def direct_of_weight(shape: Shape) -> int:
    """jit: a gradient for each thread; bfloat16 takes its sums in float32 and transposes one image of maps for each."""
    if shape.is_half:
        return _direct_of_half_weight(shape)
    shares = _share_direct(shape)
    if shares.images <= 1:
        return 0
    width = 1 if shape.is_first else _VECTOR
    out_channels, in_channels = _blocked(shape.out_channels), -(-shape.in_channels // width) * width
    gradient = shape.groups * out_channels * (in_channels * shape.taps + 1)
    return _booked(gradient * (shares.images - 1) * shape.itemsize) + _BARRIER


def depthwise_of_weight(shape: Shape) -> int:
    """jit_dw: a gradient for each thread that shares images; bfloat16 takes its sums in float32."""
    threads = _threads() if shape.channels_last else 1
    channels = _blocked(shape.groups) if shape.channels_last else shape.groups
    copies = threads if shape.is_half else threads - 1
    return _booked(channels * shape.taps * copies * 4) + (_booked(shape.groups * copies * 4) if shape.bias else 0)


def product_of_input(shape: Shape) -> int:
    """gemm: gradients unfolded in float32, and bfloat16's sums; for each thread that shares out images."""
    outer = shape.images * shape.groups
    inner = _up(shape.in_pixels, _VECTOR) * _up(shape.in_channels, _VECTOR)
    shared = outer > 1 and (shape.images > 1 or shape.groups > 2) and _efficiency(outer) >= _efficiency(inner)
    threads = _threads() if shared and (shape.out_pixels // _threads() < 512 or shape.taps < 64) else 1
    total = _booked(threads * shape.in_channels * shape.taps * shape.out_pixels * 4)
    return total + (_booked(threads * shape.in_channels * shape.in_pixels * 4) if shape.is_half else 0)


def _efficiency(work: int) -> float:
    """Share of threads that are busy when they do so many equal parts."""
    return work / (_up(work, _threads()) * _threads())


def product_of_weight(shape: Shape) -> int:
    """gemm: an unfolded image, and one gradient for each thread, for which oneDNN books 4 bytes per byte."""
    many = shape.images != 1 or shape.groups > 2
    threads = _threads() if shape.out_pixels // _threads() < 256 and many else 1
    total = _booked(threads * shape.weight_bytes * 4)
    total += _booked(threads * shape.in_channels * shape.taps * shape.out_pixels * shape.itemsize)
    if shape.channels_last:
        total += _booked(threads * shape.in_channels * shape.in_pixels * shape.itemsize)
    if shape.is_half:
        total += _booked(shape.weight_bytes * 4)
        total += _booked(shape.groups * shape.out_channels * 4) if shape.bias else 0
    return total


def _direct_of_half_weight(shape: Shape) -> int:
    in_block = shape.in_channels if shape.is_first else _VECTOR
    in_blocks, out_blocks = -(-shape.in_channels // in_block), _blocked(shape.out_channels) // _VECTOR
    (height, width), (out_height, out_width) = shape.in_size, shape.out_size
    padding = max(shape.padding[1], max(0, shape.end_padding[1]) + 1)
    padding += padding % 2
    column = -(-width // shape.stride[1]) + padding
    column = (column + column % 2) * shape.stride[1]
    out_column = out_width + out_width % 2
    transposes_input = not (shape.is_first and (not shape.channels_last or shape.in_channels == 1))
    if not transposes_input:
        column = width
    shares = _share_half(shape, in_blocks, out_blocks, column, out_column)
    first_blocks_rows = shape.is_first and out_width >= 124 and out_height > 1 and _exceeds_cache(shape)
    total = 0
    if transposes_input:
        copies = shares.threads if first_blocks_rows else shares.images * in_blocks * shape.groups
        total += _booked((copies * column * in_block * height + padding) * 2)
    else:
        total += _booked(padding * 2)
    copies = shares.threads if first_blocks_rows else shares.images * out_blocks * shape.groups
    total += _booked(copies * out_column * _VECTOR * out_height * 2)
    for others in (shares.out_channels, shares.in_channels):
        if others > 1 and not first_blocks_rows:
            total += shares.threads // others * _PAGE + _PAGE
    gradient = shape.groups * out_blocks * _VECTOR * (in_blocks * in_block * shape.taps + int(shape.bias))
    total += _booked(gradient * shares.images * 4)
    return total + (0 if first_blocks_rows else _BARRIER)


def _exceeds_cache(shape: Shape) -> bool:
    """Whether gradients of one image exceed the second cache, as oneDNN asks it: 2 MiB on machines with AMX, else 1."""
    return shape.out_channels * shape.out_pixels * 4 >= 2 * 2**20


class _Shares:
    """Into how many parts threads divide images (with their rows), output and input channels."""

    def __init__(self, images: int = 1, out_channels: int = 1, in_channels: int = 1) -> None:
        self.images, self.out_channels, self.in_channels = images, out_channels, in_channels

    @property
    def threads(self) -> int:
        """That take part."""
        return self.images * self.out_channels * self.in_channels


def _candidates(threads: int, images: int, out_blocks: int, in_blocks: int) -> list[_Shares]:
    return [
        _Shares(of_images, of_out, min(threads // of_images // of_out, in_blocks))
        for of_images in range(1, min(threads, images) + 1)
        for of_out in range(1, min(threads // of_images, out_blocks) + 1)
    ]


def _cheapest(candidates: list[_Shares], cost: Callable[[_Shares], float]) -> _Shares:
    """The last of the cheapest, and no division at all if none is cheaper."""
    best, least = _Shares(), cost(_Shares())
    for one in candidates:
        if cost(one) <= least:
            best, least = one, cost(one)
    return best


def _share_pointwise(shape: Shape, in_blocks: int, out_blocks: int) -> _Shares:
    threads = _threads()
    if threads < shape.groups:
        return _Shares()
    steps = shape.images * _reduce_blocks(shape)
    length = shape.out_pixels * shape.images / steps
    strides = shape.stride[0] * shape.stride[1]
    weight = 12
    if shape.is_half:
        weight = 4 * (max(1, shape.out_channels // shape.in_channels) if strides == 1 else 1)

    def cost(one: _Shares) -> float:
        step, ins, outs = _up(steps, one.images), _up(in_blocks, one.in_channels), _up(out_blocks, one.out_channels)
        return step * (ins / strides + outs) * _VECTOR * length + weight * ins * outs * _VECTOR**2

    best = _cheapest(_candidates(threads, steps, out_blocks, in_blocks), cost)
    if threads // 2 < best.images < threads:
        best.images = min(shape.images, threads)
    return best


def _reduce_blocks(shape: Shape) -> int:
    """Parts of about 16 pixels into which one image is cut."""
    return max(1, shape.out_pixels // _VECTOR)


def _share_direct(shape: Shape) -> _Shares:
    threads = _threads()
    if threads < shape.groups:
        return _Shares()
    in_block = shape.in_channels if shape.is_first else _VECTOR
    in_blocks, out_blocks = _up(shape.in_channels, in_block), _up(shape.out_channels, _VECTOR)
    by_rows = not shape.is_dilated and shape.out_size[0] > _UNROLLED_ROWS and not shape.channels_last
    rows, out_rows = (shape.in_size[0], shape.out_size[0]) if by_rows else (1, 1)
    row = shape.in_pixels // rows // (shape.stride[0] * shape.stride[1])
    out_row = shape.out_pixels // out_rows

    def moved(one: _Shares) -> float:
        ins, outs = _up(in_blocks, one.in_channels), _up(out_blocks, one.out_channels)
        reads = _up(shape.images * rows, one.images) * ins * in_block * row
        reads += _up(shape.images * out_rows, one.images) * outs * _VECTOR * out_row
        return reads + 8 * outs * ins * shape.taps * in_block * _VECTOR

    def computed(one: _Shares) -> int:
        steps = _up(shape.images * out_rows, one.images)
        return steps * _up(out_blocks, one.out_channels) * _up(in_blocks, one.in_channels)

    most = shape.images * max(1, out_rows // _UNROLLED_ROWS)
    candidates = _candidates(threads // shape.groups, most, out_blocks, in_blocks)
    best = _cheapest(candidates, moved)
    least, work = moved(best), computed(best)
    # Less computation is worth a tenth more memory, and a quarter less any amount.
    for one in candidates:
        cheap = computed(one) <= work and moved(one) < 1.1 * least
        if cheap or 4 * computed(one) <= 3 * work:
            best, work = one, computed(one)
    if threads // 2 < best.images < threads:
        best.images = min(most, threads)
    return best


def _share_half(shape: Shape, in_blocks: int, out_blocks: int, column: int, out_column: int) -> _Shares:
    threads = _threads()
    if threads < shape.groups:
        return _Shares()
    in_block = shape.in_channels if shape.is_first else _VECTOR
    reads = shape.images * shape.in_channels * shape.in_size[0] * column * 2
    writes = shape.images * shape.out_channels * shape.out_size[0] * out_column * 2
    ratio = 0.5 * (reads + writes) / (shape.out_channels * shape.in_channels * shape.taps * 4)
    out_per_in = out_blocks / in_blocks
    read_weight = max(1 / out_per_in, 1) * (4 if ratio < 1 else 1)
    steps = shape.images if _is_whole_map(shape, column, out_column) else shape.images * shape.out_size[0]
    strides = shape.stride[0] * shape.stride[1]

    def cost(one: _Shares) -> float:
        ins, outs, part = _up(in_blocks, one.in_channels), _up(out_blocks, one.out_channels), _up(steps, one.images)
        read = part * ins * shape.images * in_block * shape.in_size[0] * column / (steps * strides)
        written = part * outs * shape.images * _VECTOR * shape.out_size[0] * out_column / steps
        gradient = outs * ins * shape.taps * in_block * _VECTOR
        return read_weight * read + max(out_per_in, 1) * written + max(ratio, 1) * gradient

    best = _cheapest(_candidates(threads, steps, out_blocks, in_blocks), cost)
    if threads // 2 < best.images < threads:
        best.images = min(steps, threads)
    return best


def _is_whole_map(shape: Shape, column: int, out_column: int) -> bool:
    """Whether the kernel walks whole maps: 3x3 and the like, of at least 128 channels, whose rows fit the cache."""
    same = shape.in_size == shape.out_size and 1 not in shape.kernel and not shape.is_strided and not shape.is_dilated
    centred = shape.padding == (shape.kernel[0] // 2, shape.kernel[1] // 2)
    rows = max(1, shape.padding[0], shape.end_padding[0])
    fits = _VECTOR * (column + out_column) * 2 * rows <= 48 * 1024
    return same and centred and fits and shape.in_channels >= 128


def _best_divider(value: int, least: int, most: int) -> int:
    """The smallest of the blockings of a value, from `least` to `most`, that leave the smallest share unused."""
    most = max(1, min(most, value))
    least = max(1, min(least, most))
    return min(range(least, most + 1), key=lambda divider: (1 - value / (_up(value, divider) * divider), divider))


def _threads() -> int:
    return torch.get_num_threads()


def _up(value: int, block: int) -> int:
    return -(-value // block)


def _blocked(channels: int) -> int:
    return _up(channels, _VECTOR) * _VECTOR


def _pages(size: int) -> int:
    return _up(size, _PAGE) * _PAGE


def _booked(size: int) -> int:
    return size + ALIGNMENT if size else 0
