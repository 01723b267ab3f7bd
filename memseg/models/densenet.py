"""The DenseNet encoder as segments, and how a torchvision state dict fills it.

torchvision's names map onto ours like this; every key of the state dict is loaded or named as unused:

    features.conv0, features.norm0                 segments.stem.conv0, segments.stem.norm0
    features.denseblock1 .. 3.denselayerN          segments.block1 .. 3.denselayerN
    features.transition1 .. 3.norm, .conv          segments.transition1 .. 3.norm, .conv
    features.denseblock4.denselayerN, first half   segments.block4a.denselayerN
    features.denseblock4.denselayerN, second half  segments.block4b.denselayer(N - half)
    features.norm5, classifier                     unused: the ladder reads the blocks themselves

The files of torchvision's model zoo spell the layers' members `norm.1`, `conv.1`, ...; both spellings are taken.
Worked pyramid of DenseNet-121 at 1024x2048: stem 64 channels at /4, block1 256 at /4, block2 512 at /8, block3 1024 at
/16, block4a 768 at /32, block4b 1024 at /64.

Source: Huang et al., arXiv:1608.06993; the split of block 4: Kreso et al., ICCV workshops 2017.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memseg.errors import InputError, ProblemsError
from memseg.levels import NormMode, Recompute
from memseg.models.segmented import IMAGES, Segment, SegmentedModel
from memseg.nn import BatchNorm2d, DenseBlock, NormReluConv, conv_norm_relu_pool
from memseg.nn.autograd import is_traced


@dataclass(frozen=True)
class DenseNetConfig:
    """What makes a DenseNet: torchvision's names."""

    growth_rate: int
    """Channels that each dense layer adds."""
    block_config: tuple[int, int, int, int]
    """Dense layers of the four blocks; the last is even, for it is split into halves."""
    num_init_features: int
    """Channels of the stem."""


class Stem(nn.Module):
    """7x7 stride-2 convolution, BN, ReLU, 2x2 max-pooling: (N, 3, H, W) to (N, C, H / 4, W / 4).

    Levels: `none` keeps all; `norms` keeps the convolution's output; `units` and `segment` keep only the images and a
    byte for each number of the result.
    """

    levels: ClassVar[tuple[Recompute, ...]] = (Recompute.NONE, Recompute.NORMS, Recompute.UNITS)

    def __init__(self, out_channels: int, *, norm: NormMode, recompute: Recompute = Recompute.NONE) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, out_channels, 7, stride=2, padding=3, bias=False)
        self.norm0 = BatchNorm2d(out_channels, norm=norm)
        self.pool0 = nn.MaxPool2d(2)
        self.recompute = recompute

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, C, H / 4, W / 4)."""
        if is_traced() or (self.recompute is Recompute.NONE and torch.is_grad_enabled()):
            return cast(Tensor, self.pool0(F.relu(self.norm0(self.conv0(images)), inplace=True)))
        keep_conv = self.recompute is Recompute.NORMS
        return conv_norm_relu_pool(images, conv=self.conv0, norm=self.norm0, pool=self.pool0, keep_conv=keep_conv)


class HalfPool(nn.Module):
    """2x2 average pooling between the halves of block 4."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H / 2, W / 2)."""
        return F.avg_pool2d(x, 2)


@dataclass(frozen=True)
class Encoder:
    """The segments of a down path, with the names and widths that an up path joins."""

    blocks: list[tuple[list[Segment], int]]
    """Per skip, finest first: the segments up to and with the block that it reads, and that block's channels."""
    tail: list[Segment]
    """What follows the last skip; its last segment ends the path."""
    out_channels: int
    """Channels at the end."""

    @property
    def names(self) -> list[str]:
        """Names of all segments."""
        return [segment.name for part in [*(part for part, _ in self.blocks), self.tail] for segment in part]


def densenet_encoder(config: DenseNetConfig, *, norm: NormMode) -> Encoder:
    """Stem, blocks 1 to 3, and block 4 in halves, each with the transition before it."""
    channels = config.num_init_features
    first, second, third, fourth = config.block_config
    head = [Segment("stem", Stem(channels, norm=norm), (IMAGES,))]
    blocks: list[tuple[list[Segment], int]] = []
    previous = "stem"
    for index, num_layers in enumerate((first, second, third, fourth // 2), start=1):
        name = f"block{index}" if index < 4 else "block4a"
        block = DenseBlock(num_layers, in_channels=channels, growth_rate=config.growth_rate, norm=norm)
        blocks.append(([*head, Segment(name, block, (previous,))], block.out_channels))
        previous, channels = name, block.out_channels
        if index < 4:
            transition = NormReluConv(channels, channels // 2, kernel_size=1, pool=True, norm=norm)
            head = [Segment(f"transition{index}", transition, (previous,))]
            previous, channels = f"transition{index}", channels // 2
    last = DenseBlock(fourth - fourth // 2, in_channels=channels, growth_rate=config.growth_rate, norm=norm)
    tail = [Segment("transition4", HalfPool(), (previous,)), Segment("block4b", last, ("transition4",))]
    return Encoder(blocks, tail, last.out_channels)


def load_encoder(model: SegmentedModel, weights: Mapping[str, Tensor], *, where: str = "encoder weights") -> list[str]:
    """Fill a model's encoder from a torchvision DenseNet state dict; the mapping is at the top of this module.

    Returns:
        The keys that were not used, which are those of `norm5` and `classifier`.

    Raises:
        ProblemsError: keys are missing or unknown, or shapes differ; all are named, and nothing has been changed.
    """
    half = len(list(model.segments["block4a"].children()))
    own = model.state_dict()
    wanted = {key for key in own if key.split(".")[1] in model.encoder}
    chosen: dict[str, Tensor] = {}
    unused: list[str] = []
    problems: list[str] = []
    for key, value in weights.items():
        name = _our_name(key, half)
        if name is None:
            unused.append(key)
        elif name not in wanted:
            problems.append(f"{key}: the encoder of {model.name} has no such layer")
        elif own[name].shape != value.shape:
            problems.append(f"{key}: shape must be {tuple(own[name].shape)}, got {tuple(value.shape)}")
        else:
            chosen[name] = value
    # Files from before torch 0.4.1 count no batches; the counter is of no use with a fixed momentum.
    missing = sorted(name for name in wanted - chosen.keys() if not name.endswith("num_batches_tracked"))
    problems += [f"nothing in it fills {name}" for name in missing]
    if problems:
        more = len(problems) - 10
        shown = [*problems[:10], f"and {more} more"] if more > 0 else problems
        raise ProblemsError(f"{where} (a torchvision DenseNet of the same size is needed)", shown)
    model.load_state_dict(chosen, strict=False)
    return unused


def load_encoder_file(model: SegmentedModel, path: Path) -> list[str]:
    """`load_encoder` from a .pth file, read with weights_only=True.

    Raises:
        InputError: the file cannot be read as a state dict.
        ProblemsError: as `load_encoder`.
    """
    return load_encoder(model, read_weights(path, "a torchvision DenseNet state dict"), where=str(path))


def read_weights(path: Path, what: str) -> Mapping[str, Tensor]:
    """The state dict in a file saved by torch.save, read with weights_only=True.

    Args:
        path: Of the file.
        what: It must be, in words.

    Raises:
        InputError: the file cannot be read as a state dict.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise InputError(f"{path}: must be {what} saved by torch.save, cannot be read: {reason}") from None
    if not isinstance(weights, Mapping):
        raise InputError(f"{path}: must hold a state dict (names to tensors), got {type(weights).__name__}")
    return weights


def _our_name(key: str, half: int) -> str | None:
    """Our name of a torchvision key, or None for a key that the encoder does not use."""
    key = re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key)
    if key.startswith(("classifier.", "features.norm5.")):
        return None
    key = key.removeprefix("features.")
    if match := re.fullmatch(r"denseblock4\.denselayer(\d+)\.(.+)", key):
        index = int(match[1])
        part, index = ("block4a", index) if index <= half else ("block4b", index - half)
        return f"segments.{part}.denselayer{index}.{match[2]}"
    key = re.sub(r"^denseblock(\d)\.", r"block\1.", key)
    key = re.sub(r"^(conv0|norm0)\.", r"stem.\1.", key)
    return f"segments.{key}"
