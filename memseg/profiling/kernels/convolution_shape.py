"""One convolution as a value: all that its memory depends on, and what follows from it."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from memseg.nn.autograd import HALF_DTYPES


@dataclass(frozen=True)
class Shape:
    """One convolution, as far as its memory depends on it; channels are those of a group."""

    images: int
    groups: int
    in_channels: int
    out_channels: int
    in_size: tuple[int, int]
    """(height, width)"""
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    dtype: torch.dtype
    channels_last: bool
    bias: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return self.dtype.itemsize

    @property
    def is_half(self) -> bool:
        """Whether values have 2 bytes."""
        return self.dtype in HALF_DTYPES

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is convolved alone."""
        return self.groups > 1 and self.in_channels == self.out_channels == 1

    @property
    def is_strided(self) -> bool:
        """Whether it skips pixels."""
        return self.stride != (1, 1)

    @property
    def is_dilated(self) -> bool:
        """Whether the kernel has holes."""
        return self.dilation != (1, 1)

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel is 1x1."""
        return self.kernel == (1, 1) and self.groups == 1

    @property
    def is_first(self) -> bool:
        """Whether images of up to 3 channels are read: as they lie."""
        return self.groups == 1 and self.in_channels <= 3

    @property
    def extent(self) -> tuple[int, int]:
        """(height, width) of the kernel with its holes."""
        height, width = ((size - 1) * step + 1 for size, step in zip(self.kernel, self.dilation, strict=True))
        return height, width

    @property
    def taps(self) -> int:
        """Pixels of the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def in_pixels(self) -> int:
        """Of one image."""
        return self.in_size[0] * self.in_size[1]

    @property
    def out_pixels(self) -> int:
        """Of one image."""
        return self.out_size[0] * self.out_size[1]

    @property
    def weight_bytes(self) -> int:
        """Of the weight as it is."""
        return self.groups * self.out_channels * self.in_channels * self.taps * self.itemsize

    @cached_property
    def end_padding(self) -> tuple[int, int]:
        """Rows below and columns right of the input that the last outputs read; below 0 where some are left over."""
        bottom, right = (
            (self.out_size[axis] - 1) * self.stride[axis] + self.extent[axis] - self.in_size[axis] - self.padding[axis]
            for axis in (0, 1)
        )
        return bottom, right

    def padded_weight_bytes(self, in_block: int, out_block: int) -> int:
        """Of the weight whose channels lie in blocks."""
        out_channels, in_channels = round_up(self.out_channels, out_block), round_up(self.in_channels, in_block)
        return self.groups * out_channels * in_channels * self.taps * self.itemsize

    def turned(self) -> "Shape":
        """The convolution whose gradient of the input a transposed one is; `self` has the transposed one's operands."""
        return replace(
            self,
            in_channels=self.out_channels,
            out_channels=self.in_channels,
            in_size=self.out_size,
            out_size=self.in_size,
        )


def simd_width() -> int:
    """Floats in a vector of this machine."""
    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


def round_up(value: int, block: int) -> int:
    """The next multiple of a block."""
    return -(-value // block) * block
