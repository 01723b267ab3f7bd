"""What a trainer asks of the process it runs in, whatever strategy the plan has."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from memseg.models.segmented import SegmentGraph


class Batch(NamedTuple):
    """What a process reads of one pass; None for what it does not."""

    images: Tensor | None
    """(N, 3, H, W)."""
    target: Tensor | None
    """(N, H, W)."""


class Runner(Protocol):
    """One process's part of a model in training."""

    @property
    def module(self) -> SegmentGraph:
        """The segments that this process trains; its parameter names are those of the whole model."""

    output_stride: int
    num_classes: int
    reads_images: bool
    """Whether `step` needs the images here."""
    reads_target: bool
    """Whether `step` needs the target here."""
    scaler: torch.amp.GradScaler
    """Scales the loss of float16 steps, whose gradients it has to unscale; of others it changes nothing."""

    def step(self, passes: Iterator[Batch]) -> float:
        """Forward and backward of a whole step, in every process at once.

        Afterwards the parameters' `.grad` is the gradient of what it returns: the mean loss over all labelled pixels of
        the step, whichever process read them. What was there before is gone.

        Args:
            passes: What this process reads, in as many passes as the run accumulates. A pass is asked for when the one
                before it is over, and not held.
        """

    def coarse_outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Coarse logits of images (N, 3, H, W), as the module's mode has it, without gradients.

        Every process of a replica calls it, with images of the same shape; what it returns counts in the last one.
        """
