"""The ResNet encoder as segments, by torchvision's names.

    stem (conv1, bn1, max-pooling), layer1, layer2, layer3, layer4

Where a layer is more dilated than the one before it does not stride. Its first bottleneck then still has the dilation
of the layer before, as torchvision's `replace_stride_with_dilation` has it: so every filter sees what it saw in the
network that strides.

Worked pyramid of ResNet-50 at 1024x2048: stem 64 channels at /4, layer1 256 at /4, layer2 512 at /8, layer3 1024 at
/16, layer4 2048 at /32.

Source: He et al., arXiv:1512.03385; dilation: Yu and Koltun, arXiv:1511.07122.
"""

from dataclasses import dataclass

from torch import nn

from memseg.levels import NormMode
from memseg.models.encoder import Encoder, Level
from memseg.models.segmented import IMAGES, Origin, Segment
from memseg.models.stem import Stem
from memseg.nn import ResidualLayer

_STEM_CHANNELS = 64


@dataclass(frozen=True)
class ResNetConfig:
    """What makes a ResNet of bottlenecks."""

    layers: tuple[int, int, int, int]
    """Bottlenecks of the four layers."""
    torchvision: str | None = None
    """Its name there, if it has one."""
    width: int = 64
    """Of the bottlenecks of the first layer; each further layer doubles it."""
    dilations: tuple[int, int, int, int] = (1, 1, 1, 1)
    """Of the layers' 3x3 convolutions."""

    def build(self, norm: NormMode) -> Encoder:
        """The encoder, with random weights."""
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        stem = Stem(_STEM_CHANNELS, norm=norm, pool=pool, names=("conv1", "bn1", "maxpool"))
        segments = [Segment("stem", stem, (IMAGES,))]
        prefixes = {"stem.conv1": "conv1", "stem.bn1": "bn1"}
        levels: list[Level] = []
        channels, stride, before = _STEM_CHANNELS, 4, 1
        for number, (num_blocks, dilation) in enumerate(zip(self.layers, self.dilations, strict=True), start=1):
            name, step = f"layer{number}", 2 if number > 1 and dilation == before else 1
            layer = ResidualLayer(
                num_blocks,
                in_channels=channels,
                width=self.width * 2 ** (number - 1),
                stride=step,
                dilation=dilation,
                first_dilation=before,
                norm=norm,
            )
            segments.append(Segment(name, layer, (segments[-1].name if segments else levels[-1].segments[-1].name,)))
            prefixes[name] = name
            channels, stride, before = layer.out_channels, stride * step, dilation
            levels.append(Level(str(number), tuple(segments), channels, stride))
            segments = []
        return Encoder(tuple(levels), Origin(self.torchvision, "ResNet", prefixes, ("fc.",)), "fan_out")
