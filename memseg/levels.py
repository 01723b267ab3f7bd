"""The plain choices that every part of memseg shares: what to rebuild, how batch norm counts, in what precision."""

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
