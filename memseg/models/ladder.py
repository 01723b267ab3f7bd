"""The ladder: a slim up path that blends each block's features back in, from /64 to /4.

    stem - block1 - block2 - block3 - block4a - block4b - context - aux_logits (auxiliary loss)
             |skip1   |skip2   |skip3    |skip4               |
    logits - blend1 - blend2 - blend3 - blend4 ---------------+

Every width of the up path is the same (128 in the paper), so it costs little beside the encoder. Skip projections
stand right behind their block: where a model is cut there, their 128 channels cross to the next card, not the block's
256 to 1280.

Source: Kreso, Krapac, Segvic, "Ladder-style DenseNets for Semantic Segmentation of Large Natural Images", 2017.
"""

from typing import ClassVar

from torch import Tensor, nn

from memseg.levels import NormMode, Recompute
from memseg.models.densenet import DenseNetConfig, Encoder, densenet_encoder
from memseg.models.segmented import Segment, SegmentedModel
from memseg.nn import Blend, NormReluConv, rebuild
from memseg.nn.autograd import is_traced


class Context(nn.Module):
    """BN-ReLU-1x1, then a dilated BN-ReLU-3x3: widens the view at the coarsest map.

    Args:
        in_channels: Channels of the encoder's end.
        width: Channels of the bottleneck (512 in the paper).
        out_channels: Channels of the result (128).
        norm: Mode of the norms.
        recompute: `segment` also drops the bottleneck.
    """

    levels: ClassVar[tuple[Recompute, ...]] = (Recompute.NONE, Recompute.UNITS, Recompute.SEGMENT)

    def __init__(self, in_channels: int, width: int, out_channels: int, *, norm: NormMode) -> None:
        super().__init__()
        self.bottleneck = NormReluConv(in_channels, width, kernel_size=1, norm=norm)
        self.dilated = NormReluConv(width, out_channels, kernel_size=3, dilation=2, norm=norm)
        self._recompute = Recompute.NONE

    @property
    def recompute(self) -> Recompute:
        """The level of both units together."""
        return self._recompute

    @recompute.setter
    def recompute(self, level: Recompute) -> None:
        self._recompute = self.bottleneck.recompute = self.dilated.recompute = level

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H, W)."""
        if self._recompute is Recompute.SEGMENT and not is_traced():
            return rebuild(self._run, x, owner=self)
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        out: Tensor = self.dilated(self.bottleneck(x))
        return out


def ladder_densenet(
    name: str,
    config: DenseNetConfig,
    *,
    num_classes: int,
    width: int = 128,
    context_width: int = 512,
    norm: NormMode = NormMode.BATCH,
) -> SegmentedModel:
    """A LadderDenseNet with auxiliary logits at /64 and logits at /4.

    Args:
        name: Its name in the zoo.
        config: Of its encoder.
        num_classes: Channels of the logits.
        width: Channels of skips, blends and the context's result.
        context_width: Channels of the context's bottleneck.
        norm: Mode of all norms.
    """
    encoder = densenet_encoder(config, norm=norm)
    segments = [*_down_path(encoder, width, norm), *encoder.tail]
    segments.append(
        Segment("context", Context(encoder.out_channels, context_width, width, norm=norm), (segments[-1].name,))
    )
    segments.append(Segment("aux_logits", _logits(width, num_classes, norm), ("context",)))
    coarse = "context"
    for index in range(len(encoder.blocks), 0, -1):
        segments.append(Segment(f"blend{index}", Blend(width, width, width, norm=norm), (coarse, f"skip{index}")))
        coarse = f"blend{index}"
    segments.append(Segment("logits", _logits(width, num_classes, norm), (coarse,)))
    model = SegmentedModel(
        name,
        segments,
        outputs=("logits", "aux_logits"),
        num_classes=num_classes,
        output_stride=64,
        encoder=encoder.names,
        published_cut=("transition2",),
    )
    _initialise(model)
    return model


def _down_path(encoder: Encoder, width: int, norm: NormMode) -> list[Segment]:
    segments: list[Segment] = []
    for index, (part, channels) in enumerate(encoder.blocks, start=1):
        skip = NormReluConv(channels, width, kernel_size=1, norm=norm)
        segments += [*part, Segment(f"skip{index}", skip, (part[-1].name,))]
    return segments


def _logits(channels: int, num_classes: int, norm: NormMode) -> NormReluConv:
    return NormReluConv(channels, num_classes, kernel_size=1, bias=True, norm=norm)


def _initialise(model: nn.Module) -> None:
    """As torchvision's DenseNet: He initialisation of convolutions, unit norms, no biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
