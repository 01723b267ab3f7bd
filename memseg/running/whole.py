"""The whole model in one process: alone, or as one of several replicas.

Two replicas, two passes: F forward, B backward, A gradients averaged meanwhile.

    replica 0   F B . F B
                      A A
    replica 1   F B . F B
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from memseg.levels import Precision
from memseg.models.segmented import SegmentedModel
from memseg.nn.precision import computing
from memseg.running.grid import Grid
from memseg.running.mean_loss import MeanLoss
from memseg.running.replica import Replica
from memseg.running.runner import Batch


class WholeRunner:
    """The whole model in this process.

    Args:
        model: On its device; of replicas each with the same weights.
        loss: Of the step that all replicas make together.
        grid: The place of this process.
        accumulation: Passes in a step.
        precision: What a step computes in.
    """

    reads_images = True
    reads_target = True

    def __init__(
        self, model: SegmentedModel, loss: MeanLoss, *, grid: Grid, accumulation: int, precision: Precision
    ) -> None:
        self.module, self._loss, self._accumulation, self._precision = model, loss, accumulation, precision
        self._replica = Replica(model, grid.across)
        self._device = next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(self._device, enabled=precision is Precision.FLOAT16)
        self.output_stride, self.num_classes = model.output_stride, model.num_classes

    def step(self, passes: Iterator[Batch]) -> float:
        """Forward and backward of a step; the loss."""
        self._replica.clear_gradients()
        for number in range(self._accumulation):
            self._pass(*next(passes), averages=self._replica.begin_pass(last=number == self._accumulation - 1))
        return self._loss.finish(self.module.parameters())

    def _pass(self, images: Tensor | None, target: Tensor | None, *, averages: bool) -> None:
        assert images is not None
        assert target is not None
        with self._replica.alone(unless=averages):
            with computing(self._precision, self._device):
                loss = self._loss(*self._replica.called(images), target)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def coarse_outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Coarse logits of images (N, 3, H, W)."""
        with computing(self._precision, self._device):
            return self.module.run(images)
