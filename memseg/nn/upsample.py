"""Which rows of a coarse map a band of bilinearly upsampled rows is made of, and how they are mixed.

Upsampling is separable: a fine row is a mixture of two coarse rows, which is then upsampled along its width. So any
band of fine rows can be made by itself, whatever the layout of the map.

Source: `align_corners=False` as torch.nn.functional.interpolate has it (ATen/native/UpSample.h).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RowSources(NamedTuple):
    """Of a band of fine rows."""

    read: slice
    """The coarse rows they are made of."""
    position: Tensor
    """(fine rows,), float64: where each lies among those, in rows from the first."""

    def mix(self, source: Tensor, dim: int) -> Tensor:
        """Fine rows at the coarse width, of the coarse rows `read` of a map, which lie along `dim`."""
        upper = self.position.long()
        lower = (upper + 1).clamp_(max=source.shape[dim] - 1)
        share = (self.position - upper).to(source.dtype).view(-1, *[1] * (source.dim() - dim - 1))
        return source.index_select(dim, upper).lerp_(source.index_select(dim, lower), share)

    def shares(self, dtype: torch.dtype) -> Tensor:
        """(coarse rows, fine rows): what each coarse row gives to each fine one."""
        coarse = torch.arange(self.read.stop - self.read.start, device=self.position.device).unsqueeze(1)
        # A coarse row's share falls from 1 at its own place to 0 at the next.
        return (1 - (self.position - coarse).abs_()).clamp_(min=0).to(dtype)


def row_sources(coarse_height: int, height: float, start: int, stop: int, device: torch.device) -> RowSources:
    """Of rows start..stop of a map of `height` rows, or a fraction more, upsampled from one of `coarse_height`."""
    ratio = coarse_height / height
    first, last = (int(max((row + 0.5) * ratio - 0.5, 0)) for row in (start, stop - 1))
    fine = torch.arange(start, stop, device=device, dtype=torch.float64)
    position = ((fine + 0.5) * ratio - 0.5).clamp_(0, coarse_height - 1)
    return RowSources(slice(first, min(last + 2, coarse_height)), position - first)
