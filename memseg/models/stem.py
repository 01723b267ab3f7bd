"""The stem of DenseNets and ResNets."""

from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memseg.levels import NormMode, Recompute
from memseg.nn import BatchNorm2d, conv_norm_relu_pool
from memseg.nn.autograd import is_traced


class Stem(nn.Module):
    """7x7 stride-2 convolution, BN, ReLU, max-pooling of stride 2: (N, 3, H, W) to (N, C, H / 4, W / 4).

    Args:
        out_channels: C.
        norm: Mode of the norm.
        pool: The pooling; by default the paper's, 2x2.
        names: Of convolution, norm and pooling; by default torchvision's in a DenseNet.
        recompute: `none` keeps all; `norms` keeps the convolution's output; `units` and `segment` keep only the images
            and a byte for each number of the result.
    """

    levels: ClassVar[tuple[Recompute, ...]] = (Recompute.NONE, Recompute.NORMS, Recompute.UNITS)

    def __init__(
        self,
        out_channels: int,
        *,
        norm: NormMode,
        pool: nn.MaxPool2d | None = None,
        names: tuple[str, str, str] = ("conv0", "norm0", "pool0"),
        recompute: Recompute = Recompute.NONE,
    ) -> None:
        super().__init__()
        self.add_module(names[0], nn.Conv2d(3, out_channels, 7, stride=2, padding=3, bias=False))
        self.add_module(names[1], BatchNorm2d(out_channels, norm=norm))
        self.add_module(names[2], pool or nn.MaxPool2d(2))
        self.recompute = recompute

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, C, H / 4, W / 4)."""
        conv, norm, pool = cast(tuple[nn.Conv2d, BatchNorm2d, nn.MaxPool2d], tuple(self.children()))
        if is_traced() or (self.recompute is Recompute.NONE and torch.is_grad_enabled()):
            return cast(Tensor, pool(F.relu(norm(conv(images)), inplace=True)))
        keep_conv = self.recompute is Recompute.NORMS
        return conv_norm_relu_pool(images, conv=conv, norm=norm, pool=pool, keep_conv=keep_conv)
