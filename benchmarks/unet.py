"""A U-Net in torch's own layers, as many a first segmentation network is written.

Source: Ronneberger et al., arXiv:1505.04597, with padded convolutions and batch norm.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn


class UNet(nn.Module):
    """Halves the map from one width to the next, and doubles it on the way back, each time beside the map of old.

    Args:
        widths: Channels at each size, the finest first.
        num_classes: Channels of the logits.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 256), num_classes: int = 21) -> None:
        super().__init__()
        self.down = nn.ModuleList(map(_double_convolution, (3, *widths), widths))
        self.pool = nn.MaxPool2d(2)
        coarser, finer = widths[:0:-1], widths[-2::-1]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(width, half, 2, stride=2) for width, half in zip(coarser, finer, strict=True)
        )
        self.join = nn.ModuleList(_double_convolution(2 * width, width) for width in finer)
        self.logits = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K, H, W) of images (N, 3, H, W), whose sides the coarsest map divides."""
        skips: list[Tensor] = []
        x = images
        for level, convolutions in enumerate(self.down):
            x = convolutions(self.pool(x) if level else x)
            skips.append(x)
        skips.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([skips.pop(), up(x)], dim=1))
        return cast(Tensor, self.logits(x))


def _double_convolution(in_channels: int, width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (in_channels, width):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
