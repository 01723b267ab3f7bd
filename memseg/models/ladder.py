"""A segmentation network: an encoder, a context at its end, and an up path that blends the encoder's maps back in.

The ladder joins every level of the encoder, here that of a DenseNet with block 4 halved, from /64 to /4:

    stem - block1 - block2 - block3 - block4a - block4b - context - aux_logits (auxiliary loss)
             |skip1   |skip2   |skip3    |skip4               |
    logits - blend1 - blend2 - blend3 - blend4 ---------------+

Other networks join fewer levels: one whose last blocks are dilated the first alone, and one without an up path none,
so that its logits read the context. Every width of the up path is the same (128 in the paper), so it costs little
beside the encoder. Skip projections stand right behind their block: where a model is cut there, their 128 channels
cross to the next card, not the block's 256 to 2048.

Source: Kreso, Krapac, Segvic, "Ladder-style DenseNets for Semantic Segmentation of Large Natural Images", 2017.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from memseg.levels import NormMode
from memseg.models.context import Context, DilatedContext
from memseg.models.encoder import Encoder, EncoderConfig
from memseg.models.segmented import Segment, SegmentedModel
from memseg.nn import Blend, NormReluConv


@dataclass(frozen=True)
class Architecture:
    """What a network is made of."""

    encoder: EncoderConfig
    joined: int | None = None
    """How many of the encoder's levels the up path joins, the finest ones; None: all but the last."""
    context: Callable[..., Context] = DilatedContext
    """Takes the encoder's channels, its bottleneck's, its output's, and `norm`."""
    has_aux: bool = True
    """Whether the context's output makes auxiliary logits."""
    width: int = 128
    """Channels of skips, blends and the context's output."""
    context_width: int = 512
    """Channels of the context's bottleneck."""
    published_cut: tuple[str, ...] = ()
    """As of SegmentedModel."""


def build_architecture(
    name: str, architecture: Architecture, *, num_classes: int, norm: NormMode = NormMode.BATCH
) -> SegmentedModel:
    """A network with random weights.

    Args:
        name: Its name in the zoo.
        architecture: What it is made of.
        num_classes: Channels of the logits.
        norm: Mode of all norms.
    """
    encoder, width = architecture.encoder.build(norm), architecture.width
    *joinable, end = encoder.levels
    joined = joinable[: architecture.joined]
    segments: list[Segment] = []
    for level in encoder.levels:
        segments += level.segments
        if level in joined:
            skip = NormReluConv(level.channels, width, kernel_size=1, norm=norm)
            segments.append(Segment(f"skip{level.name}", skip, (segments[-1].name,)))
    context = architecture.context(end.channels, architecture.context_width, width, norm=norm)
    segments.append(Segment("context", context, (end.segments[-1].name,)))
    outputs = ["logits"]
    if architecture.has_aux:
        segments.append(Segment("aux_logits", _logits(width, num_classes, norm), ("context",)))
        outputs.append("aux_logits")
    coarse = "context"
    for level in reversed(joined):
        blend = Blend(width, width, width, norm=norm)
        segments.append(Segment(f"blend{level.name}", blend, (coarse, f"skip{level.name}")))
        coarse = f"blend{level.name}"
    segments.append(Segment("logits", _logits(width, num_classes, norm), (coarse,)))
    model = SegmentedModel(
        name,
        segments,
        outputs=outputs,
        num_classes=num_classes,
        output_stride=end.stride,
        encoder=encoder.names,
        origin=encoder.origin,
        published_cut=architecture.published_cut,
    )
    _initialise(model, encoder)
    return model


def _logits(channels: int, num_classes: int, norm: NormMode) -> NormReluConv:
    return NormReluConv(channels, num_classes, kernel_size=1, bias=True, norm=norm)


def _initialise(model: SegmentedModel, encoder: Encoder) -> None:
    """He initialisation of convolutions, in the encoder as torchvision does it; unit norms, no biases."""
    for name, segment in model.segments.items():
        fan = encoder.fan if name in encoder.names else "fan_in"
        for module in segment.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
