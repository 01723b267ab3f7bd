"""How many kernels oneDNN compiles for a segment's convolutions: code that a CPU process holds from then on.

oneDNN writes machine code for each shape that it meets, in each direction, and for each reordering of a weight, and
keeps the last 1024 of them. Every kernel is a private, writable and executable mapping of its own, whatever its length
(`memseg.planning.outside.KERNEL_BYTES`), which the system counts as data. Where all layers differ, as in a dense block,
there are many.

Which shapes there are depends on the level: a rebuilding layer runs 1x1 convolutions over tiles of one size and a rest,
and in backward multiplies matrices with MKL, which compiles nothing of oneDNN's. With one thread torch does not take
oneDNN for 1x1 convolutions of fewer than 16 images.

Counted by system calls between oneDNN's log lines (ONEDNN_VERBOSE=2 under strace, torch 2.14.1, oneDNN 3.12, AVX-512):
brgconv_1x1 compiles 1, 2 or 4 kernels, mostly 2, forward and for the gradient of the input, jit_1x1 2 for that of the
weight; every other convolution 1 in each direction; a reordering 1. Without AVX-512 nobody has counted.
"""

from math import prod

from torch import Tensor, nn

from memseg.levels import Recompute
from memseg.nn.layout import band_limit

_FEW_IMAGES = 16
_POINTWISE, _POINTWISE_FORWARD, _OTHER = 2 + 2 + 2 + 3, 2 + 1, 1 + 1 + 1 + 3
"""Kernels of one shape: forward, gradients of input and weight, and what reorders the weight for each."""


def compiled_kernels(module: nn.Module, output: Tensor, level: Recompute, *, threads: int) -> int:
    """Kernels that one segment's convolutions need, alone; those that segments share are counted for each.

    Args:
        module: The segment.
        output: Of the segment, (N, C, H, W); only its shape and type are looked at.
        level: What it rebuilds.
        threads: Of the process.
    """
    if output.dim() != 4:
        return 0
    images, pixels = output.shape[0], output.shape[0] * prod(output.shape[2:])
    shapes = {
        (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.dilation, conv.groups)
        for conv in module.modules()
        if isinstance(conv, nn.Conv2d)
    }
    count = 0
    for in_channels, _, kernel, stride, _, groups in shapes:
        if kernel != (1, 1) or stride != (1, 1) or groups > 1:
            count += _OTHER
        elif threads > 1 or images >= _FEW_IMAGES:
            tiles = 2 if pixels * in_channels * output.element_size() > band_limit(output) else 1
            count += _POINTWISE if level is Recompute.NONE else _POINTWISE_FORWARD * tiles
    return count
