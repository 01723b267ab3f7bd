"""The training step of one card of a split model, as `memseg.running.pipeline` runs it.

What comes from an earlier stage lies in buffers that are there all step, and so do the gradients of what leaves for a
later one. The outputs of a stage are held until its backward is over.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memseg.levels import Recompute
from memseg.models.segmented import SegmentedModel
from memseg.profiling.jobs.job import Job, OptimizerFactory, fused_adam
from memseg.profiling.jobs.segmented import named_layers, random_batch


def stage_job(
    build: Callable[[], SegmentedModel],
    stages: Sequence[Sequence[str]],
    index: int,
    *,
    image: tuple[int, int],
    batch: int,
    recompute: dict[str, Recompute],
    aux_weight: float = 0.3,
    optimizer: OptimizerFactory = fused_adam,
    accumulation: int = 1,
) -> Job:
    """The step of one stage, in the precision of the parameters.

    Args:
        build: Makes the whole model.
        stages: Names of the segments of each stage, without the loss, in order.
        index: Of the stage.
        image: (height, width) of the images.
        batch: Images in the batch.
        recompute: Level of each of the stage's segments.
        aux_weight: Of the objective.
        optimizer: Makes the optimizer.
        accumulation: Batches to a step.

    Raises:
        InputError: the model cannot take images of that size.
        ValueError: the stages are not consecutive segments of the model.
    """
    model = build().train()
    model.check_image(image, batch=batch)
    model.set_recompute(recompute)
    images, target = random_batch(model, image, batch)
    stage, is_last = model.stage(stages[index]), index == len(stages) - 1
    received, leaving = _crossings(model, stages, images, index)
    gradients = () if is_last else tuple(torch.empty_like(tensor) for tensor in leaving)
    objective = model.objective(aux_weight)

    def backward(result: Any) -> None:
        if is_last:
            result.backward()
        else:
            torch.autograd.backward(result, gradients)

    reads_images = index == 0

    def compute() -> Any:
        for tensor in received:
            # What was sent back of the pass before; pipelining lets go of it as late as now.
            tensor.grad = None
        return stage.run(*((images,) if reads_images else received))

    inputs = (*((images,) if reads_images else ()), *((target,) if is_last else ()))
    return Job(
        name=f"{model.name}, stage {index + 1} of {len(stages)}",
        model=stage,
        compute=compute,
        loss=lambda outputs: objective(*outputs, target) if is_last else outputs,
        backward=backward,
        inputs=inputs,
        buffers=(*(() if reads_images else received), *gradients),
        layers=tuple(named_layers(stage)),
        optimizer=optimizer([parameter for parameter in stage.parameters() if parameter.requires_grad]),
        levels={name: getattr(module, "levels", (Recompute.NONE,)) for name, module in stage.segments.items()},
        keep_output=True,
        accumulation=accumulation,
    )


def _crossings(
    model: SegmentedModel, stages: Sequence[Sequence[str]], images: Tensor, index: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Tensors like those that enter and that leave a stage."""
    tensors: tuple[Tensor, ...] = (images,)
    entering = tensors
    with torch.no_grad():
        for names in stages[: index + 1]:
            entering = tensors
            tensors = model.stage(names).run(*entering)
    received = tuple(torch.empty_like(tensor).requires_grad_() for tensor in entering)
    return received, tuple(torch.empty_like(tensor) for tensor in tensors)
