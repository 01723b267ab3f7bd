"""The plain choices that every part of memseg shares: what to rebuild, how batch norm counts, who runs what."""

from enum import StrEnum


class Recompute(StrEnum):
    """How much a segment throws away in forward and rebuilds in backward."""

    NONE = "none"
    """Keep everything autograd keeps."""
    NORMS = "norms"
    """Rebuild concatenation, batch norm and ReLU; keep the outputs of convolutions."""
    UNITS = "units"
    """Keep only the output of each unit (a dense layer, a BN-ReLU-convolution)."""
    SEGMENT = "segment"
    """Keep only what the segment reads."""


class NormMode(StrEnum):
    """What batch norm normalises with."""

    BATCH = "batch"
    """The statistics of the batch; running statistics follow it."""
    FROZEN = "frozen"
    """Running statistics, never updated, and a fixed affine: the paper's frozen-BN."""
    SYNCED = "synced"
    """The statistics of the batches of all replicas together; with one replica, the same as `batch`."""


class Precision(StrEnum):
    """What a training step computes in."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"
    """Autocast: parameters, their gradients, statistics and the loss in float32, maps and convolutions in bfloat16."""
    FLOAT16 = "float16"
    """The same in float16, with a gradient scaler."""

    @property
    def parameters(self) -> str:
        """Name of the type of parameters, gradients and optimizer state.

        >>> Precision.BFLOAT16.parameters
        'float32'
        """
        return "float64" if self is Precision.FLOAT64 else "float32"

    @property
    def is_half(self) -> bool:
        """Whether autocast is on."""
        return self in (Precision.BFLOAT16, Precision.FLOAT16)


class Strategy(StrEnum):
    """Who runs what."""

    SINGLE = "single"
    """One card, everything."""
    SPLIT = "split"
    """Consecutive segments on each card."""
    REPLICATE = "replicate"
    """The whole model on each card, with a share of the batch."""
    REPLICATE_SPLIT = "replicate-split"
    """Several splits of the same kind, each with a share of the batch."""

    @property
    def replicates(self) -> bool:
        """Whether the batch is shared out."""
        return self in (Strategy.REPLICATE, Strategy.REPLICATE_SPLIT)

    @property
    def splits(self) -> bool:
        """Whether the segments are."""
        return self in (Strategy.SPLIT, Strategy.REPLICATE_SPLIT)


class Schedule(StrEnum):
    """In what order the stages of a split take several micro-batches."""

    GPIPE = "gpipe"
    """All forwards, then all backwards. Source: Huang et al., arXiv:1811.06965."""
    ONE_F_ONE_B = "1f1b"
    """A backward as soon as there is one to do; needs as many micro-batches as stages. Source: Narayanan et al.,
    arXiv:2006.09503 (PipeDream-Flush)."""
