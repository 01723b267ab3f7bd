"""The DenseNet encoder as segments, and where torchvision's weights go.

    stem, block1, transition1, block2, transition2, block3, transition3, block4

A block may be halved, with 2x2 average pooling between the halves: block4a, transition4, block4b. The layers of a half
are numbered from 1, though in torchvision's state dict they go on. Where a block is more dilated than the one before,
the transition between them does not pool.

Worked pyramid of DenseNet-121 at 1024x2048, block 4 halved: stem 64 channels at /4, block1 256 at /4, block2 512 at /8,
block3 1024 at /16, block4a 768 at /32, block4b 1024 at /64.

Source: Huang et al., arXiv:1608.06993; the halves: Kreso et al., ICCV workshops 2017.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from memseg.levels import NormMode
from memseg.models.encoder import Encoder, Level
from memseg.models.segmented import IMAGES, Origin, Segment
from memseg.models.stem import Stem
from memseg.nn import DenseBlock, NormReluConv


@dataclass(frozen=True)
class DenseNetConfig:
    """What makes a DenseNet: torchvision's names."""

    growth_rate: int
    """Channels that each dense layer adds."""
    block_config: tuple[int, int, int, int]
    """Dense layers of the four blocks."""
    num_init_features: int
    """Channels of the stem."""
    torchvision: str | None = None
    """Its name there, if it has one."""
    halved: tuple[int, ...] = (4,)
    """Numbers of the blocks that are halved; the last block's second half ends the encoder."""
    dilations: tuple[int, int, int, int] = (1, 1, 1, 1)
    """Of the blocks' 3x3 convolutions."""

    def build(self, norm: NormMode) -> Encoder:
        """The encoder, with random weights."""
        return _Builder(self, norm).encoder()


class HalfPool(nn.Module):
    """2x2 average pooling between the halves of a block."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H / 2, W / 2)."""
        return F.avg_pool2d(x, 2)


class _Builder:
    def __init__(self, config: DenseNetConfig, norm: NormMode) -> None:
        self._config, self._norm = config, norm
        self._levels: list[Level] = []
        self._segments: list[Segment] = []
        self._previous, self._channels, self._stride = IMAGES, config.num_init_features, 4
        self._prefixes = {"stem": "features"}

    def encoder(self) -> Encoder:
        """All four blocks with what lies before and between them."""
        config = self._config
        self._add("stem", Stem(config.num_init_features, norm=self._norm))
        for number in range(1, 5):
            if number > 1:
                self._add_transition(number)
            if number in config.halved:
                self._add_halves(number)
            else:
                self._add_block(str(number), str(number), config.block_config[number - 1], first=1)
        origin = Origin(config.torchvision, "DenseNet", self._prefixes, ("features.norm5.", "classifier."))
        return Encoder(tuple(self._levels), origin, "fan_in")

    def _add(self, name: str, module: nn.Module) -> None:
        self._segments.append(Segment(name, module, (self._previous,)))
        self._previous = name

    def _add_halves(self, number: int) -> None:
        num_layers = self._config.block_config[number - 1]
        half = num_layers // 2
        # Nothing joins the second half of the last block, so that its first half is the block to what does.
        self._add_block(f"{number}a", str(number) if number == 4 else f"{number}a", half, first=1)
        self._add("transition4" if number == 4 else f"transition{number}a", HalfPool())
        self._stride *= 2
        self._add_block(f"{number}b", f"{number}b", num_layers - half, first=half + 1)

    def _add_block(self, name: str, level: str, num_layers: int, *, first: int) -> None:
        """A block or half of one, which ends a level; `first` is the number of its first layer in torchvision's."""
        number, growth_rate = int(name[0]), self._config.growth_rate
        block = DenseBlock(
            num_layers,
            in_channels=self._channels,
            growth_rate=growth_rate,
            dilation=self._config.dilations[number - 1],
            norm=self._norm,
        )
        for index in range(num_layers):
            theirs = f"features.denseblock{number}.denselayer{first + index}"
            self._prefixes[f"block{name}.denselayer{index + 1}"] = theirs
        self._add(f"block{name}", block)
        self._channels = block.out_channels
        self._levels.append(Level(level, tuple(self._segments), self._channels, self._stride))
        self._segments = []

    def _add_transition(self, number: int) -> None:
        """Of the block before that number."""
        name, dilations = f"transition{number - 1}", self._config.dilations
        pool = dilations[number - 1] == dilations[number - 2]
        self._add(name, NormReluConv(self._channels, self._channels // 2, kernel_size=1, pool=pool, norm=self._norm))
        self._prefixes[name] = f"features.{name}"
        self._channels //= 2
        self._stride *= 2 if pool else 1
