"""The two plain choices that every part of memseg shares: what to rebuild, and how batch norm counts."""

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
