"""The training step of a network of ours, as `memseg train` runs it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memseg.levels import Precision, Recompute
from memseg.models.segmented import SegmentedModel, SegmentGraph
from memseg.profiling.jobs.job import Job, OptimizerFactory, fused_adam
from memseg.profiling.measure import measure_job
from memseg.profiling.step import StepProfile, trace_job

_PREFIX = "segments."


def segmented_job(
    build: Callable[[], SegmentedModel],
    *,
    image: tuple[int, int],
    batch: int,
    recompute: Recompute | Mapping[str, Recompute] = Recompute.NONE,
    aux_weight: float = 0.3,
    optimizer: OptimizerFactory | None = fused_adam,
    precision: Precision = Precision.FLOAT32,
    accumulation: int = 1,
) -> Job:
    """The step on a random batch.

    Args:
        build: Makes the model.
        image: (height, width) of the images.
        batch: Images in the batch.
        recompute: Of all segments, or of the named ones.
        aux_weight: Of the objective.
        optimizer: Makes the optimizer; None for a step without one.
        precision: To compute in; `build` gives the parameters its `parameter_dtype`.
        accumulation: Batches to a step.

    Raises:
        InputError: the model cannot take images of that size.
        UnknownNameError: `recompute` names a segment that the model lacks.
    """
    model = build().train()
    model.check_image(image, batch=batch)
    model.set_recompute(recompute)
    objective = model.objective(aux_weight)
    images, target = random_batch(model, image, batch)
    return Job(
        name=model.name,
        model=model,
        compute=lambda: model.coarse_outputs(images),
        loss=lambda outputs: objective(*outputs, target),
        inputs=(images, target),
        layers=tuple(named_layers(model)),
        optimizer=optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
        if optimizer
        else None,
        levels={name: getattr(module, "levels", (Recompute.NONE,)) for name, module in model.segments.items()},
        precision=precision,
        accumulation=accumulation,
    )


def random_batch(model: SegmentedModel, image: tuple[int, int], batch: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W), channels-last, in the type of the parameters, and a target of the model's kind."""
    dtype = next(model.parameters()).dtype
    images = torch.randn(batch, 3, *image, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return images, model.make_target(batch, image)


def profile_step(build: Callable[[], SegmentedModel], *, device: str = "cpu", **step: Any) -> StepProfile:
    """Trace the step of a network of ours; arguments as for `segmented_job` and `trace_job`."""
    return trace_job(partial(segmented_job, build, **step), device=device)


def measure_step(build: Callable[[], SegmentedModel], **step: Any) -> int:
    """Peak bytes of real steps of a network of ours on the CPU; arguments as for `segmented_job`."""
    return measure_job(partial(segmented_job, build, **step))


def named_layers(graph: SegmentGraph) -> list[tuple[str, nn.Module]]:
    """All modules below the segments, by the names that reports use: "block1", "block1.denselayer1", ..."""
    return [(name.removeprefix(_PREFIX), module) for name, module in graph.named_modules() if name.startswith(_PREFIX)]
