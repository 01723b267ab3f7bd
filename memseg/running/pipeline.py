"""A split model: each process runs consecutive segments, torch.distributed.pipelining carries tensors between them.

Tensors that skip a stage are passed through it (SegmentGraph.stage). Shapes are told in advance, from a run on meta
tensors, so that pipelining need not find them out by running the stage, which would count a batch in batch norm.

With one micro-batch, as batch statistics need it, the stages take turns: F forward, B backward.

    rank 0   F . . B
    rank 1   . F B .
"""

from copy import deepcopy

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from memseg.models.objective import Objective
from memseg.models.segmented import SegmentedModel, Stage


class PipelineRunner:
    """One stage of a split model; every process of the group makes its own.

    Args:
        model: The whole model, its parameters here or on the meta device; this process uses its own segments' only.
        stages: Names of the segments of each rank, in order.
        objective: Of the model's coarse outputs.
        batch_shape: (N, 3, H, W) of training batches.
        device: Of this process.
    """

    def __init__(
        self,
        model: SegmentedModel,
        stages: list[list[str]],
        objective: Objective,
        *,
        batch_shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self._rank, self._stages, self._device = dist.get_rank(), stages, device
        self.module: Stage = model.stage(stages[self._rank])
        self.output_stride, self.num_classes = model.output_stride, model.num_classes
        self.reads_images = self._rank == 0
        self.knows_loss = self._rank == len(stages) - 1
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        self._meta = meta_twin(model).eval()
        self._batch_shape = batch_shape
        self._training = ScheduleGPipe(
            self._pipeline_stage(batch_shape),
            n_microbatches=1,
            loss_fn=lambda outputs, target: objective(*outputs, target),
        )
        self._evaluating: dict[tuple[int, ...], ScheduleGPipe] = {}
        """The schedule of the last shape that was evaluated, and no other."""

    def step(self, images: Tensor | None, target: Tensor | None) -> Tensor | None:
        """Forward and backward of one batch; the loss on the last stage."""
        # What an evaluation received lies in buffers that training has been promised.
        self._evaluating.clear()
        losses: list[Tensor] = []
        batch = (images,) if self.reads_images else ()
        labels = target if self.knows_loss else None
        self._training.step(*batch, target=labels, losses=losses, return_outputs=False)
        return losses[0].detach() if losses else None

    @torch.no_grad()
    def coarse_outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Coarse logits on the last stage; elsewhere one zero per class, to stand for them."""
        shape = tuple(images.shape)
        if shape not in self._evaluating:
            self._evaluating.clear()
            self._evaluating[shape] = ScheduleGPipe(self._pipeline_stage(shape), n_microbatches=1)
        outputs = self._evaluating[shape].eval(*((images,) if self.reads_images else ()))
        if not self.knows_loss:
            return (images.new_zeros(images.shape[0], self.num_classes, 1, 1),)
        return tuple(outputs)

    def _pipeline_stage(self, shape: tuple[int, ...]) -> PipelineStage:
        crossings = self._crossings(shape)
        inputs, outputs = crossings[self._rank], crossings[self._rank + 1]
        return PipelineStage(
            self.module, self._rank, len(self._stages), self._device, input_args=inputs, output_args=outputs
        )

    def _crossings(self, shape: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
        """Meta tensors that enter each stage, and at the end the model's outputs."""
        tensors: tuple[Tensor, ...] = (torch.empty(shape, dtype=next(self._meta.parameters()).dtype, device="meta"),)
        crossings = [tensors]
        with torch.no_grad():
            for names in self._stages:
                tensors = self._meta.stage(names).run(*tensors)
                crossings.append(tensors)
        return [
            tuple(
                torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").requires_grad_(index > 0) for tensor in one
            )
            for index, one in enumerate(crossings)
        ]


def meta_twin(model: SegmentedModel) -> SegmentedModel:
    """A copy of a model without its memory, to find shapes with."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return deepcopy(model, memo)
