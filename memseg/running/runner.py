"""What a trainer asks of the process it runs in, whatever strategy the plan has."""

from typing import Protocol

import torch
from torch import Tensor

from memseg.levels import Precision
from memseg.models.objective import Objective
from memseg.models.segmented import SegmentedModel, SegmentGraph
from memseg.nn.precision import computing


class Runner(Protocol):
    """One process's part of a model in training."""

    @property
    def module(self) -> SegmentGraph:
        """The segments that this process trains; its parameter names are those of the whole model."""

    output_stride: int
    num_classes: int
    reads_images: bool
    """Whether `step` needs the images here."""
    knows_loss: bool
    """Whether `step` needs the target here and returns the loss."""
    scaler: torch.amp.GradScaler
    """Scales the loss of float16 steps, whose gradients it has to unscale; of others it changes nothing."""

    def step(self, images: Tensor | None, target: Tensor | None) -> Tensor | None:
        """Forward and backward of one batch: gradients are in the parameters' `.grad` afterwards; the mean loss."""

    def coarse_outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Coarse logits of images (N, 3, H, W), as the module's mode has it, without gradients.

        Every process calls it, with images of the same shape; what it returns counts where `knows_loss` is true.
        """


class SingleRunner:
    """The whole model in one process."""

    reads_images = True
    knows_loss = True

    def __init__(self, model: SegmentedModel, objective: Objective, precision: Precision = Precision.FLOAT32) -> None:
        self.module, self._objective, self._precision = model, objective, precision
        device = next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=precision is Precision.FLOAT16)
        self.output_stride, self.num_classes = model.output_stride, model.num_classes

    def step(self, images: Tensor | None, target: Tensor | None) -> Tensor | None:
        """Forward and backward of one batch; the loss."""
        assert images is not None
        assert target is not None
        with computing(self._precision, images.device.type):
            loss: Tensor = self._objective(*self.module.run(images), target)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @torch.no_grad()
    def coarse_outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Coarse logits of images (N, 3, H, W)."""
        with computing(self._precision, images.device.type):
            return self.module.run(images)
