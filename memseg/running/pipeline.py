"""A split model: each process runs consecutive segments, torch.distributed.pipelining carries tensors between them.

Tensors that skip a stage are passed through it (SegmentGraph.stage). Shapes are told in advance, from a run on meta
tensors, so that pipelining need not find them out by running the stage, which would count a batch in batch norm.

With one micro-batch, as batch statistics need it, the stages take turns. With several they work at the same time, in
the order of a schedule: F forward, B backward, numbers are micro-batches.

    one      rank 0   F  .  .  B
             rank 1   .  F  B  .

    GPipe    rank 0   F0 F1 .  .  B0 B1
             rank 1   .  F0 F1 B0 B1 .

    1F1B     rank 0   F0 F1 .  B0 F2 B1 .  B2
             rank 1   .  F0 B0 F1 B1 F2 B2 .

Each of several replicas is such a pipeline. In the backward of the last micro-batch of the last pass, gradients of a
stage are averaged over the replicas.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from memseg.levels import Schedule
from memseg.models.segmented import SegmentedModel, Stage
from memseg.running.grid import Grid
from memseg.running.mean_loss import MeanLoss
from memseg.running.replica import Replica
from memseg.running.runner import Batch


class PipelineRunner:
    """One stage of a split model; every process of the grid makes its own.

    Args:
        model: The whole model, its parameters on the CPU or the meta device. Of this process's own segments they are
            moved to its device.
        stages: Names of the segments of each stage, in order.
        loss: Of the step that all replicas make together.
        grid: The place of this process.
        micro_batch_shape: (N, 3, H, W) of the micro-batches of this replica.
        micro_batches: In each pass.
        schedule: In what order they go through the stages; None with a single one.
        accumulation: Passes in a step.
        device: Of this process.
    """

    def __init__(
        self,
        model: SegmentedModel,
        stages: Sequence[Sequence[str]],
        loss: MeanLoss,
        *,
        grid: Grid,
        micro_batch_shape: tuple[int, ...],
        micro_batches: int,
        schedule: Schedule | None,
        accumulation: int,
        device: torch.device,
    ) -> None:
        self._stages, self._grid, self._device = stages, grid, device
        self._loss, self._accumulation = loss, accumulation
        # The other segments stay where they are: a card has room for its own.
        self.module: Stage = model.stage(stages[grid.stage]).to(device)
        self.output_stride, self.num_classes = model.output_stride, model.num_classes
        self.reads_images, self.reads_target = grid.is_first, grid.is_last
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        self._replica = Replica(self.module, grid.across)
        self._meta = meta_twin(model).eval()
        make = Schedule1F1B if schedule is Schedule.ONE_F_ONE_B else ScheduleGPipe
        self._stage = self._pipeline_stage(self._replica.called, micro_batch_shape)
        self._training = make(
            self._stage,
            n_microbatches=micro_batches,
            loss_fn=lambda outputs, target: loss(*outputs, target),
            scale_grads=False,
        )
        self._evaluating: dict[tuple[int, ...], ScheduleGPipe] = {}
        """The schedule of the last shape that was evaluated, and no other."""

    def step(self, passes: Iterator[Batch]) -> float:
        """Forward and backward of a step; the loss."""
        # What an evaluation received lies in buffers that training has been promised.
        self._evaluating.clear()
        self._replica.clear_gradients()
        for number in range(self._accumulation):
            self._stage.averages = self._replica.begin_pass(last=number == self._accumulation - 1)
            self._pass(*next(passes))
        return self._loss.finish(self.module.parameters())

    def _pass(self, images: Tensor | None, target: Tensor | None) -> None:
        batch = (images,) if self.reads_images else ()
        self._training.step(*batch, target=target, return_outputs=False)

    @torch.no_grad()
    def coarse_outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """Coarse logits on the last stage; elsewhere one zero per class, to stand for them."""
        shape = tuple(images.shape)
        if shape not in self._evaluating:
            self._evaluating.clear()
            self._evaluating[shape] = ScheduleGPipe(self._pipeline_stage(self.module, shape), n_microbatches=1)
        outputs = self._evaluating[shape].eval(*((images,) if self.reads_images else ()))
        if not self._grid.is_last:
            return (images.new_zeros(images.shape[0], self.num_classes, 1, 1),)
        return tuple(outputs)

    def _pipeline_stage(self, module: nn.Module, shape: tuple[int, ...]) -> "_AveragingStage":
        grid, crossings = self._grid, self._crossings(shape)
        stage = _AveragingStage(
            module,
            grid.stage,
            grid.stages,
            self._device,
            input_args=crossings[grid.stage],
            output_args=crossings[grid.stage + 1],
            group=grid.along,
        )
        stage.stage_index_to_group_rank = {number: grid.group_rank(number) for number in range(grid.stages)}
        return stage

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


class _AveragingStage(PipelineStage):
    """A stage that averages gradients over replicas in the last backward of a pass, but only of passes that it should.

    By itself it does so in every pass: pipelining takes a pass for a step.
    """

    averages = True

    def backward_maybe_with_nosync(self, backward_type: Any, bwd_kwargs: Any, last_backward: bool = False) -> Any:
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward and self.averages)


def meta_twin(model: SegmentedModel) -> SegmentedModel:
    """A copy of a model without its memory, to find shapes with."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return deepcopy(model, memo)
