"""What widens the view at an encoder's end: a dilated convolution, or a pyramid of averages."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memseg.levels import NormMode, Recompute
from memseg.nn import NormReluConv, rebuild
from memseg.nn.autograd import is_traced


class Context(nn.Module):
    """BN-ReLU-convolution units that share a recompute level: `segment` also drops what passes between them."""

    levels: ClassVar[tuple[Recompute, ...]] = (Recompute.NONE, Recompute.UNITS, Recompute.SEGMENT)

    def __init__(self) -> None:
        super().__init__()
        self._recompute = Recompute.NONE

    @property
    def recompute(self) -> Recompute:
        """The level of all units together."""
        return self._recompute

    @recompute.setter
    def recompute(self, level: Recompute) -> None:
        self._recompute = level
        for module in self.modules():
            if isinstance(module, NormReluConv):
                module.recompute = level

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H, W)."""
        if self._recompute is Recompute.SEGMENT and not is_traced():
            return rebuild(self._run, x, owner=self)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class DilatedContext(Context):
    """BN-ReLU-1x1, then a dilated BN-ReLU-3x3.

    Args:
        in_channels: Channels of the encoder's end.
        width: Channels of the bottleneck (512 in the paper).
        out_channels: Channels of the result (128).
        norm: Mode of the norms.

    Source: Kreso et al., ICCV workshops 2017.
    """

    def __init__(self, in_channels: int, width: int, out_channels: int, *, norm: NormMode) -> None:
        super().__init__()
        self.bottleneck = NormReluConv(in_channels, width, kernel_size=1, norm=norm)
        self.dilated = NormReluConv(width, out_channels, kernel_size=3, dilation=2, norm=norm)

    def _run(self, x: Tensor) -> Tensor:
        out: Tensor = self.dilated(self.bottleneck(x))
        return out


class PyramidPooling(Context):
    """Spatial pyramid pooling: a bottleneck beside its averages over 1, 4, 9 and 36 cells of the map, joined by a 1x1.

    Each unit normalises and projects the whole map, and averages are taken of that. It is the projection of the
    averages, as both are linear; but a lone image can be normalised. In the joined map an average over everything is
    one number an image, of which the batch statistics of two images leave the sign alone.

    Args:
        in_channels, width, out_channels, norm: As of DilatedContext; each average has a quarter of `width`.

    Source: Zhao et al., PSPNet, arXiv:1612.01105; He et al., arXiv:1406.4729.
    """

    bins: ClassVar[tuple[int, ...]] = (1, 2, 3, 6)
    """Cells along each side of the map, as in PSPNet."""

    def __init__(self, in_channels: int, width: int, out_channels: int, *, norm: NormMode) -> None:
        super().__init__()
        part = width // len(self.bins)
        self.bottleneck = NormReluConv(in_channels, width, kernel_size=1, norm=norm)
        self.parts = nn.ModuleList(NormReluConv(width, part, kernel_size=1, norm=norm) for _ in self.bins)
        joined = width + part * len(self.bins)
        self.join = NormReluConv(joined, out_channels, kernel_size=1, norm=norm)

    def _run(self, x: Tensor) -> Tensor:
        x = self.bottleneck(x)
        maps = [x]
        for cells, unit in zip(self.bins, self.parts, strict=True):
            averages = F.adaptive_avg_pool2d(unit(x), cells)
            maps.append(F.interpolate(averages, x.shape[2:], mode="bilinear", align_corners=False))
        out: Tensor = self.join(torch.cat(maps, 1))
        return out
