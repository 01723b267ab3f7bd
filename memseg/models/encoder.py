"""What an encoder is to the rest of a network: levels that can be joined, and names that pretrained weights have."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from memseg.levels import NormMode
from memseg.models.segmented import Origin, Segment


class Level(NamedTuple):
    """Consecutive segments of an encoder, the last of which makes a map that an up path may join."""

    name: str
    """As in "skip1" and "blend1"."""
    segments: tuple[Segment, ...]
    channels: int
    """Of the map."""
    stride: int
    """Size of the images over that of the map."""


@dataclass(frozen=True)
class Encoder:
    """The down path of a network."""

    levels: tuple[Level, ...]
    """Finest first; the map of the last is what the context reads."""
    origin: Origin
    fan: Literal["fan_in", "fan_out"]
    """What its convolutions are initialised by, as in torchvision."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all segments."""
        return tuple(segment.name for level in self.levels for segment in level.segments)


class EncoderConfig(Protocol):
    """What makes an encoder."""

    def build(self, norm: NormMode) -> Encoder:
        """With random weights, all norms of that mode."""
        ...
