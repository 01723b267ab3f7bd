"""Networks as other people write them, which the tests cut into segments."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.segmentation import fcn_resnet50

from benchmarks.unet import UNet


def fcn_with_aux(num_classes, weights=None, weights_backbone="DEFAULT"):
    # Were weights_backbone not given as None, this would fetch a file.
    return fcn_resnet50(
        weights=weights, weights_backbone=weights_backbone, num_classes=num_classes, aux_loss=True, progress=False
    )


def unet(num_classes):
    return UNet((8, 12, 16, 24), num_classes)


def seven_classes():
    return nn.Sequential(nn.Conv2d(3, 7, 1))


def plain_sequence(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.GELU(),
        nn.Conv2d(16, num_classes, 1),
    )


class DropPath(nn.Module):
    """Drops whole images by a mask that evaluation does not make, as in timm."""

    def forward(self, x):
        if not self.training:
            return x
        mask = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device) < 0.7
        return x * mask / 0.7


class PreActivated(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.drop = DropPath()

    def forward(self, x):
        out = self.conv1(F.relu(self.norm1(x)))
        out = self.conv2(F.dropout(F.relu(self.norm2(out)), 0.2, self.training))
        return x + self.drop(out)


class Sizes(nn.Module):
    """Takes sizes of images and of early maps late in its forward, and computes with them."""

    def __init__(self, num_classes, margin=0):
        super().__init__()
        self.margin = margin
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(PreActivated(8) for _ in range(3)))
        self.deep = nn.Conv2d(8, 8, 2, stride=2)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.aux, self.last = (nn.Conv2d(8, num_classes, 3, padding=1) for _ in range(2))

    def forward(self, images):
        batch, _, height, width = images.shape
        x = self.blocks(self.stem(images)) * self.scale
        deep = self.deep(x)
        pooled = F.adaptive_avg_pool2d(deep, 1).view(batch, -1, 1, 1)
        wide = F.interpolate(deep + pooled, (height // 2 + self.margin, width - self.margin))
        return {"aux": self.aux(wide), "out": self.last(F.interpolate(deep, (height, width), mode="bilinear"))}


def sizes(num_classes):
    return Sizes(num_classes)


def sizes_with_a_margin(num_classes):
    return Sizes(num_classes, 3)


class Branch(nn.Module):
    """Branches on a size, which torch.fx cannot follow."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Conv2d(16, num_classes, 1)

    def forward(self, images):
        x = self.stem(images)
        if x.shape[-1] < 16:
            raise ValueError("too narrow")
        x = self.drop(F.relu_(self.norm(self.down(x))))
        return F.interpolate(self.head(x), images.shape[2:], mode="bilinear")


def branch(num_classes):
    return Branch(num_classes)


class Gate(nn.Module):
    """Looks at values."""

    def forward(self, x):
        return x * 2 if x.mean() > 0 else x


def gated(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Gate(), nn.Conv2d(4, num_classes, 1))


class EachChannel(nn.Module):
    """Loops over a size."""

    def forward(self, x):
        return torch.stack([x[:, channel] * channel for channel in range(x.shape[1])], dim=1)


def each_channel(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), EachChannel(), nn.Conv2d(4, num_classes, 1))


class InTheOpen(nn.Module):
    """Looks at values outside any module that could be kept whole."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.logits = nn.Conv2d(3, num_classes, 1)

    def forward(self, images):
        return self.logits(images if images.mean() > 0 else -images)


class TwoInputs(nn.Module):
    def forward(self, images, mask):
        return images * mask


class Tied(nn.Module):
    """One convolution in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = (nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 5, 1))

    def forward(self, images):
        x = F.relu(self.again(F.relu(self.first(images))))
        return self.last(self.again(F.relu(x)))


def fails():
    raise RuntimeError("no such luck")


def no_module():
    return 3
